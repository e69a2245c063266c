"""How long does a save hold up training? One command, on the CPU and on GPUs:

    python -m perf.bench_save_stall [RECIPE] [--saves 4] [--apart 6] [--out FILE] [--section.key VALUE …]

Trains on random tokens and saves every `--apart` steps into a folder that is removed at the end. A step's time here is
from its beginning to the beginning of the next one, so whatever a save costs is in it: the copy that training waits
for, and the writing that goes on beside the following steps. The stall of a save is what the steps from its beginning
to its commit took longer than the median of the steps that no save touched; "waited" is the part inside the call. Both
are given as a share of that median step, for the slowest rank, first save left out (it plans how ranks share the work).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mcore_swift.errors import EXIT_INPUT, InputError
from mcore_swift.recipe import Recipe
from mcore_swift.recipe_checks import check_recipe
from mcore_swift.recipe_io import load_recipe

RECIPE = Path(__file__).parent.parent / "launch" / "recipes" / "bench_qwen3_8b_8layers.yaml"
# Without a GPU: a shape whose step takes a second or two on a few cores.
ON_CPU = {
    "model.overrides": {"num_hidden_layers": 2, "hidden_size": 512, "intermediate_size": 1536, "vocab_size": 8192},
    "data.sequence_length": 512,
    "schedule.global_batch_size": 2,
    "schedule.micro_batch_size": 1,
}
WARMUP_STEPS = 3


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.bench_save_stall", allow_abbrev=False)
    parser.add_argument("recipe", metavar="RECIPE", type=Path, nargs="?", help=f"default: {RECIPE.name}")
    parser.add_argument("--saves", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--apart", type=int, default=6, help="steps between saves; default: %(default)s")
    parser.add_argument("--out", metavar="FILE", type=Path, help="JSON with every step's time")
    arguments, overrides = parser.parse_known_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="save-stall-", dir="."))
    try:
        recipe = bench_recipe(arguments.recipe, overrides, folder=folder, saves=arguments.saves, apart=arguments.apart)
        code = run(recipe, folder / "times")
        if code:
            return code
        report = summarize([json.loads(path.read_text()) for path in sorted((folder / "times").iterdir())])
    except InputError as error:
        print(f"bench_save_stall: error: {error}", file=sys.stderr)
        return EXIT_INPUT
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1))
    print(page(report))
    return 0


def bench_recipe(path: Path | None, overrides: list[str], *, folder: Path, saves: int, apart: int) -> Recipe:
    """The recipe with `saves` saves, the first one apart, and nothing else that would take time."""
    import torch

    words = []
    if path is None and not torch.cuda.is_available():
        words = [word for key, value in ON_CPU.items() for word in (f"--{key}", json.dumps(value))]
    recipe = load_recipe(path or RECIPE, [*words, *overrides])
    recipe = replace(
        recipe,
        schedule=replace(recipe.schedule, steps=WARMUP_STEPS + apart * (saves + 1), epochs=None),
        checkpoint=replace(recipe.checkpoint, dir=str(folder), interval=apart, keep=1, final=False, export=False),
    )
    check_recipe(recipe)
    return recipe


def run(recipe: Recipe, times: Path) -> int:
    """Trains with a trainer that notes the times of each rank in `times`; returns the exit code."""
    from mcore_swift.platform import select
    from mcore_swift.ranks import launch
    from mcore_swift.training import run as training

    platform = select(recipe.runtime.device)
    plan = training.plan_ranks(recipe, platform)
    source = training.model_source(recipe)
    training.check_micro_batches(recipe, plan)
    times.mkdir()

    def rank() -> None:
        import torch.distributed as dist

        from mcore_swift import parallel

        trainer = _timed_trainer()(recipe, source, plan, platform)
        trainer.run()
        found = {"begins": trainer.begins, "touched": trainer.touched, "waited": trainer.waited}
        (times / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))
        parallel.shutdown()

    threads = training.threads(recipe, platform, plan)
    return launch(rank, ranks=plan.world_size, preload=lambda: training.preload(platform), threads=threads)


def _timed_trainer() -> Any:
    from mcore_swift.training.trainer import Trainer

    class TimedTrainer(Trainer):
        """Notes when each step begins, which steps a save touches, and how long saving was waited for."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.begins: list[float] = []
            self.touched: list[bool] = []
            self.waited: list[float] = []

        def _step(self) -> None:
            assert self.checkpoints is not None
            self.platform.synchronize()
            self.begins.append(time.perf_counter())
            self.touched.append(self.checkpoints.pending)
            super()._step()

        def _save(self) -> None:
            self.touched[-1] = True
            begin = time.perf_counter()
            super()._save()
            self.platform.synchronize()
            self.waited.append(time.perf_counter() - begin)

    return TimedTrainer


def summarize(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds and shares of a step: {step, stall, waited, stall_share, waited_share, …}."""
    reports = [_of_rank(rank) for rank in ranks]
    worst = max(reports, key=lambda report: report["stall_share"])
    return {**worst, "ranks": len(reports), "times": ranks}


def _of_rank(rank: dict[str, Any]) -> dict[str, float]:
    begins, touched, waited = rank["begins"], rank["touched"], rank["waited"][1:]
    steps = [
        (later - earlier, hit)
        for earlier, later, hit in list(zip(begins, begins[1:], touched, strict=False))[WARMUP_STEPS:]
    ]
    first_saved = next(index for index, (_, hit) in enumerate(steps) if hit)
    after = next(index for index, (_, hit) in enumerate(steps) if index > first_saved and not hit)
    steps = steps[after:]  # without the first save
    free = [seconds for seconds, hit in steps if not hit]
    if not free or not waited:
        raise InputError("--apart: no step is left that no save touches; use more")
    step = statistics.median(free)
    stall = sum(seconds - step for seconds, hit in steps if hit) / len(waited)
    middle = statistics.median(waited)
    return {
        "step": step,
        "stall": stall,
        "stall_share": stall / step,
        "waited": middle,
        "waited_share": middle / step,
        "spread": statistics.pstdev(free) / step,
    }


def page(report: dict[str, Any]) -> str:
    """The report for a person."""
    return (
        f"step without a save: {report['step']:.3f} s (± {100 * report['spread']:.1f} %)\n"
        f"a save stalls training for {report['stall']:.3f} s, {100 * report['stall_share']:.1f} % of a step;"
        f" inside the call: {report['waited']:.3f} s, {100 * report['waited_share']:.1f} %"
    )


if __name__ == "__main__":
    sys.exit(main())
