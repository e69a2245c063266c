"""Reruns the layouts that need two GPUs: are their losses one GPU's?

    python -m perf.gpu_parallel OUT --tokenizer FOLDER [--only GROUP …] [--steps 20] [--at-once 4] [KEYS …]

Context parallelism in each mode, packed and in rows; tensor parallelism with its communication overlapped; experts over
two GPUs as grouped matrix products; each in BF16 and FP8. All runs of a group start from the same weights, which a run
of one GPU wrote. How far the same mathematics, rounded elsewhere, goes apart shows a run of one GPU with other
micro-batches: a layout may go ALLOWED times as far. Each run is the command line that users type; `--at-once` of them
share the GPUs, so no speed is measured. KEYS are recipe keys for all runs. Exit code 1: a run failed, or went further.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perf.gpu_levers import NOTHING_SAVED
from perf.gpu_spine import ONE_GPU, PARITY, compare, failure, losses, start_weights, train

MODELS = PARITY.parent / "models"
DENSE = ["--model.path", str(MODELS / "qwen3-0.6b"), "--model.overrides", '{"num_hidden_layers": 8}']
EXPERTS = ["--model.path", str(MODELS / "qwen3-30b-a3b")]
EXPERTS += ["--model.overrides", '{"num_hidden_layers": 3, "num_experts": 16}']
TWO = ["--runtime.ranks", "2"]
FP8 = ["--precision.fp8", "tensorwise"]
ROWS = ["--data.packing", "false"]
CP2 = {mode: ["--parallel.cp", "2", "--parallel.cp_comm_type", mode] for mode in ("p2p", "all_gather", "a2a")}
TP2 = ["--parallel.tp", "2"]
OVERLAPPED = [*TP2, "--runtime.tp_overlap", "true"]
EP2 = ["--parallel.dp", "2", "--parallel.ep", "2", "--moe.grouped", "true"]
TWO_PACKS = ["--schedule.micro_batch_size", "2"]
ONE_BY_ONE = ["--moe.grouped", "false"]
ALLOWED = 20.0
GPUS = 2
# User buffers over CUDA's IPC, which any two GPUs of a machine can do; NVLink multicast would be faster where it is.
VARIABLES = {"UB_SKIPMC": "1", "HF_HUB_OFFLINE": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


@dataclass(frozen=True)
class Group:
    """Layouts of two GPUs that are compared with one GPU's run: name → keys.

    common: keys of all runs; elsewhere: keys of one GPU's that round the same mathematics otherwise.
    """

    name: str
    model: Sequence[str]
    layouts: Mapping[str, Sequence[str]]
    common: Sequence[str] = ()
    elsewhere: Sequence[str] = tuple(TWO_PACKS)


GROUPS = (
    Group("BF16, packed", DENSE, {**CP2, "TP2, overlapped": OVERLAPPED, "TP2": TP2}),
    Group("BF16, rows", DENSE, CP2, ROWS),
    Group("FP8, packed", DENSE, {**CP2, "TP2, overlapped": OVERLAPPED, "TP2": TP2}, FP8),
    Group("experts, BF16", EXPERTS, {"EP2": EP2}, elsewhere=ONE_BY_ONE),
    # An expert's tokens have one scale, from whichever GPU they come: as those of two packs in one micro-batch have.
    Group("experts, FP8", EXPERTS, {"EP2": EP2}, FP8),
)


def runs(group: Group) -> dict[str, list[str]]:
    """Name → keys of all runs of a group: one GPU, the same rounded elsewhere, and the layouts."""
    found = {"one GPU": ONE_GPU, "one GPU, other rounding": [*ONE_GPU, *group.elsewhere]}
    found |= {name: [*TWO, *keys] for name, keys in group.layouts.items()}
    return {name: [*group.common, *keys] for name, keys in found.items()}


def on(gpu: int) -> dict[str, str]:
    """The variables of a run that sees one GPU."""
    return {"CUDA_VISIBLE_DEVICES": str(gpu)}


def report(group: Group, found: dict[str, tuple[list[float], Path]]) -> list[dict[str, Any]]:
    """Each run's losses beside one GPU's; `same`: not further from them than ALLOWED times the other rounding's."""
    reference, _ = found["one GPU"]
    rows = []
    for name, (values, log) in found.items():
        if name == "one GPU":
            continue
        row = compare(f"{group.name}: {name}", values, reference)
        rows.append(row | failure(log) if row.get("failed") else row)
    noise = rows[0].get("largest_relative_difference", 0.0)
    for row in rows:
        if not row.get("failed"):
            row["same"] = row["largest_relative_difference"] <= ALLOWED * noise or row is rows[0]
    return rows


def text(row: dict[str, Any]) -> str:
    """A run's line for a reader."""
    if row.get("failed"):
        return f"{row['run']}: failed: {row['reason']}"
    same = "" if row["same"] else ": ANOTHER LOSS"
    apart = f"{row['largest_relative_difference']:.1e}, last ten {row['last_10_mean_relative_difference']:.1e}"
    return f"{row['run']}: {row['last_loss']:.4f} of {row['reference_last_loss']:.4f}, apart {apart}{same}"


def measure(
    groups: Sequence[Group], work: Path, *, at_once: int, limit: float, common: Sequence[str]
) -> list[dict[str, Any]]:
    """`report` of all groups. First the weights are written, then one GPU's runs, on each in turn; then all others."""
    work.mkdir(parents=True, exist_ok=True)
    models = list(dict.fromkeys(tuple(group.model) for group in groups))
    jobs = [(group, name, keys) for group in groups for name, keys in runs(group).items()]
    single = [job for job in jobs if job[1].startswith("one GPU")]
    with ThreadPoolExecutor(at_once) as pool:
        made = pool.map(
            lambda number: start_weights(
                work / f"start_{number}", *models[number], *common, variables=on(number % GPUS)
            ),
            range(len(models)),
        )
        weights = dict(zip(models, made, strict=True))

        def run(job: tuple[Group, str, list[str]]) -> tuple[list[float], Path]:
            group, name, keys = job
            where = work / "".join(letter if letter.isalnum() else "_" for letter in f"{group.name} {name}")
            start = ["--model.path", weights[tuple(group.model)]]
            gpu = on(single.index(job) % GPUS) if job in single else None
            rows = train(PARITY, where, *start, *keys, *NOTHING_SAVED, *common, limit=limit, variables=gpu)
            with (work / "losses.jsonl").open("a") as kept:  # so that a cut-off measurement leaves something
                kept.write(json.dumps({"group": group.name, "run": name, "losses": losses(rows)}) + "\n")
            return losses(rows), where.with_suffix(".log")

        others = [job for job in jobs if job not in single]
        found = {}
        for part in (single, others):
            for (group, name, _), row in zip(part, pool.map(run, part), strict=True):
                found[group.name, name] = row
    return [
        row
        for group in groups
        for row in report(group, {name: row for (of, name), row in found.items() if of == group.name})
    ]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", required=True, help="a folder with a tokenizer")
    parser.add_argument("--only", nargs="+", choices=[group.name for group in GROUPS])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--limit", type=float, default=240.0, help="seconds a run may take")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu_parallel"))
    options, keys = parser.parse_known_args(words)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    groups = [group for group in GROUPS if not options.only or group.name in options.only]
    common = ["--model.tokenizer", options.tokenizer, "--schedule.steps", str(options.steps), *keys]
    rows = measure(groups, options.work, at_once=options.at_once, limit=options.limit, common=common)
    for row in rows:
        print(text(row), flush=True)
    content = {"command": " ".join(sys.argv), "groups": [asdict(group) for group in groups], "rows": rows}
    (options.out / "gpu_parallel.json").write_text(json.dumps(content, indent=1) + "\n")
    return 1 if any(row.get("failed") or not row["same"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
