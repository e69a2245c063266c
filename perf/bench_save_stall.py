"""How long does a save hold up training? One command, on the CPU and on GPUs:

    python -m perf.bench_save_stall OUT [--recipe FILE] [--saves 2] [--apart 3] [--scratch DIR] [--section.key VALUE …]

Trains on random tokens and saves: once to begin with (that save plans how ranks share the work and makes the memory for
snapshots), once waiting for the disk (checkpoint.asynchronous: false), then `--saves` times beside training.
Each save begins `--apart` steps after the one before is on the disk. A save's stall is the time inside the call plus
what the steps until its commit took longer than the median step that no save touched. At the end the last checkpoint is
loaded and compared, bit for bit, with copies from before its save; exit code 1 when a number differs.

Without --recipe it is Qwen3-8B's shape: on GPUs with 2 of 36 layers and a small vocabulary, so that a checkpoint has
6 GB on one GPU, and the disk must hold two of them; much smaller on the CPU. Checkpoints go to a folder in --scratch
(default: the current folder), which is removed at the end. OUT/save_stall.json has every step's time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mcore_swift.errors import EXIT_FAILED, EXIT_INPUT, InputError
from mcore_swift.recipe import Recipe
from mcore_swift.recipe_checks import check_recipe
from mcore_swift.recipe_io import load_recipe

RECIPE = Path(__file__).parent.parent / "launch" / "recipes" / "bench_qwen3_8b_8layers.yaml"
SHAPES = {
    # 0.45 G parameters, 14 bytes each: bf16 weights, fp32 weights and moments
    "cuda": {"model.overrides": {"num_hidden_layers": 2, "vocab_size": 8192}},
    # a step takes a second or two on a few cores
    "cpu": {
        "model.overrides": {"num_hidden_layers": 2, "hidden_size": 512, "intermediate_size": 1536, "vocab_size": 8192},
        "data.sequence_length": 512,
        "schedule.global_batch_size": 2,
        "schedule.micro_batch_size": 1,
    },
}
WARMUP_STEPS = 3
ENDLESS = 1_000_000  # steps; the trainer ends by itself
FIRST, WAITING, BESIDE = "first", "synchronous", "asynchronous"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.bench_save_stall", allow_abbrev=False)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the report")
    parser.add_argument("--recipe", metavar="FILE", type=Path, help=f"default: {RECIPE.name}, cut to fit")
    parser.add_argument("--saves", type=int, default=2, help="asynchronous ones; default: %(default)s")
    parser.add_argument("--apart", type=int, default=3, help="steps between saves; default: %(default)s")
    parser.add_argument("--scratch", metavar="DIR", type=Path, default=Path(), help="where checkpoints go for a moment")
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.saves < 1 or arguments.apart < 1:
        parser.error("--saves and --apart: at least 1")
    for folder in (arguments.out, arguments.scratch):
        folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="save-stall-", dir=arguments.scratch))
    try:
        recipe = bench_recipe(arguments.recipe, overrides, folder=folder)
        kinds = [FIRST, WAITING, *[BESIDE] * arguments.saves]
        code = run(recipe, folder / "times", kinds=kinds, apart=arguments.apart)
        if code:
            return code
        report = summarize([json.loads(path.read_text()) for path in sorted((folder / "times").iterdir())])
    except InputError as error:
        print(f"bench_save_stall: error: {error}", file=sys.stderr)
        return EXIT_INPUT
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    (arguments.out / "save_stall.json").write_text(json.dumps(report, indent=1) + "\n")
    print(page(report), flush=True)
    return 0 if report["same_after_loading"] else EXIT_FAILED


def bench_recipe(path: Path | None, overrides: list[str], *, folder: Path) -> Recipe:
    """The recipe without anything that would take time but steps and saves."""
    from mcore_swift.platform import select

    words: list[str] = []
    if path is None:
        device = select(load_recipe(RECIPE, overrides).runtime.device).name
        words = [word for key, value in SHAPES[device].items() for word in (f"--{key}", json.dumps(value))]
    recipe = load_recipe(path or RECIPE, [*words, *overrides])
    recipe = replace(
        recipe,
        schedule=replace(recipe.schedule, steps=ENDLESS, epochs=None),
        checkpoint=replace(recipe.checkpoint, dir=str(folder), keep=1, final=False, export=False),
        logging=replace(recipe.logging, interval=ENDLESS),
    )
    check_recipe(recipe)
    return recipe


def run(recipe: Recipe, times: Path, *, kinds: Sequence[str], apart: int) -> int:
    """Trains with a trainer that notes in `times` what each rank measured; returns the exit code."""
    from mcore_swift.platform import select
    from mcore_swift.ranks import launch
    from mcore_swift.training import run as training

    platform = select(recipe.runtime.device)
    plan = training.plan_ranks(recipe, platform)
    source = training.model_source(recipe)
    training.check_micro_batches(recipe, plan)
    for name, value in training.environment(recipe).items():
        os.environ.setdefault(name, value)
    times.mkdir()

    def rank() -> None:
        import torch.distributed as dist

        from mcore_swift import parallel

        trainer = _timed_trainer()(recipe, source, plan, platform)
        trainer.kinds, trainer.apart = kinds, apart
        trainer.run()
        (times / f"rank-{dist.get_rank():05d}.json").write_text(json.dumps(trainer.found))
        parallel.shutdown()

    threads = training.threads(recipe, platform, plan)
    return launch(rank, ranks=plan.world_size, preload=lambda: training.preload(platform), threads=threads)


def _timed_trainer() -> Any:
    from torch import Tensor

    from mcore_swift.training import optimizer_state
    from mcore_swift.training.trainer import Trainer
    from mcore_swift.weights import dist_checkpoint
    from mcore_swift.weights.host_copies import HostCopies

    class TimedTrainer(Trainer):
        """Steps and saves as they are asked for, each of them timed to the end of what it started on the GPU."""

        kinds: Sequence[str]
        apart: int

        def _loop(self) -> None:
            assert self.checkpoints is not None
            self.found: dict[str, Any] = {"device": self.platform.device_name(), "saves": []}
            _time_copies(HostCopies, self.found)
            _time_writing(dist_checkpoint.PendingWrite, self.found)
            self._times(WARMUP_STEPS)
            self.found["free"] = []
            before: list[Tensor] = []
            for number, kind in enumerate(self.kinds):
                self.found["free"] += self._times(self.apart)
                if number == len(self.kinds) - 1:
                    before = [held.cpu() if held.is_cuda else held.clone() for held in self._held()]
                self._timed_save(kind)
            self.found["same_after_loading"] = self._loads_back(before)

        def _times(self, steps: int) -> list[float]:
            return [self._seconds(self._step) for _ in range(steps)]

        def _seconds(self, work: Any) -> float:
            self.platform.synchronize()
            begin = time.perf_counter()
            work()
            self.platform.synchronize()
            return time.perf_counter() - begin

        def _timed_save(self, kind: str) -> None:
            assert self.checkpoints is not None
            self.checkpoints.section = replace(self.checkpoints.section, asynchronous=kind != WAITING)
            save: dict[str, Any] = {"kind": kind, "inside": self._seconds(self._save), "beside": []}
            save["copy_seconds"], save["copy_bytes"] = self.found.pop("copied")
            while self.checkpoints.pending:
                save["beside"].append(self._seconds(self._step_and_commit))
            self._finish_saves()
            save["writer_seconds"] = self.found.pop("written")
            self.found["saves"].append(save)

        def _step_and_commit(self) -> None:
            self._step()
            self._committed()

        def _held(self) -> list[Tensor]:
            """All that a checkpoint has of this rank: its model's and optimizer's own tensors, or views of them."""
            model = dist_checkpoint.model_items(self.model.models)
            items = [*model.tensors(), *optimizer_state.optimizer_items(self.model.optimizer, model.parts)]
            return [item.data for item in items if item.data is not None]

        def _loads_back(self, before: list[Tensor]) -> bool:
            assert self.checkpoints is not None
            newest = self.checkpoints.newest()
            assert newest is not None
            for held in self._held():
                held.zero_()
            self.checkpoints.load(newest, models=self.model.models, optimizer=self.model.optimizer)
            after = self._held()
            return len(before) == len(after) and all(
                bool((old.to(new.device) == new).all()) for old, new in zip(before, after, strict=True)
            )

    return TimedTrainer


def _time_copies(copies: Any, found: dict[str, Any]) -> None:
    """From here on, (seconds, bytes) of a snapshot are noted in `found`, so that planning can be told from copying."""
    take = copies.take

    def timed(self: Any, tensors: Sequence[Any]) -> list[Any]:
        begin = time.perf_counter()
        taken = take(self, tensors)
        found["copied"] = time.perf_counter() - begin, sum(copy.nbytes for copy in taken)
        return taken

    copies.take = timed


def _time_writing(write: Any, found: dict[str, Any]) -> None:
    """From here on, the CPU seconds of the thread that writes are noted in `found`."""
    work = write.write

    def timed(self: Any) -> None:
        work(self)
        found["written"] = time.thread_time()  # the thread is made for this save

    write.write = timed


# --- the report -------------------------------------------------------------------------------------------------------


def summarize(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What the rank with the longest stalls measured, in seconds, bytes and shares of a step; and all ranks' times."""
    reports = [_of_rank(rank) for rank in ranks]
    worst = max(reports, key=lambda report: report[BESIDE]["stall"])
    same = all(rank["same_after_loading"] for rank in ranks)
    return {**worst, "ranks": len(ranks), "same_after_loading": same, "times": ranks}


def _of_rank(rank: dict[str, Any]) -> dict[str, Any]:
    step = statistics.median(rank["free"])
    report: dict[str, Any] = {"device": rank["device"], "step": step, "spread": statistics.pstdev(rank["free"]) / step}
    for kind in (FIRST, WAITING, BESIDE):
        saves = [save for save in rank["saves"] if save["kind"] == kind]
        stalls = [save["inside"] + sum(seconds - step for seconds in save["beside"]) for save in saves]
        keys = ("inside", "copy_seconds", "copy_bytes", "writer_seconds")
        report[kind] = {
            "stall": statistics.median(stalls),
            "stall_share": statistics.median(stalls) / step,
            "steps_beside": statistics.median(len(save["beside"]) for save in saves),
            **{key: statistics.median(save[key] for save in saves) for key in keys},
        }
    return report


def page(report: dict[str, Any]) -> str:
    """The report for a person."""
    first, waiting, beside = (report[kind] for kind in (FIRST, WAITING, BESIDE))
    speed = beside["copy_bytes"] / beside["copy_seconds"] / 1e9
    slower = beside["stall"] - beside["inside"]
    return "\n".join(
        (
            f"{report['device']}, {report['ranks']} ranks; {beside['copy_bytes'] / 1e9:.2f} GB a rank are saved",
            f"step without a save: {report['step']:.3f} s (± {100 * report['spread']:.1f} %)",
            f"synchronous save: {waiting['stall']:.3f} s, {100 * waiting['stall_share']:.1f} % of a step",
            f"asynchronous save: {beside['stall']:.3f} s, {100 * beside['stall_share']:.1f} % of a step:"
            f" {beside['inside']:.3f} s inside the call ({beside['copy_seconds']:.3f} s of copying, {speed:.1f} GB/s),"
            f" {slower:.3f} s by which the {beside['steps_beside']:.0f} steps beside the writing were slower",
            f"first save of all: {first['inside']:.3f} s inside the call, {first['copy_seconds']:.3f} s for the copy",
            f"CPU time of the thread that writes: {beside['writer_seconds']:.3f} s a save",
            f"loaded again: {'the same, bit for bit' if report['same_after_loading'] else 'NOT THE SAME'}",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
