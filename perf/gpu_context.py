"""Context parallelism on GPUs: each mode's losses beside one GPU's, and one sequence of 128K tokens on two.

    python -m perf.gpu_context OUT [--steps 20] [--gpus 2] [--length 131072] [--layers 8] [KEYS …]

Needs `--gpus` GPUs: four of them add a2a+p2p. Each run is the command line that users type, on Qwen3-8B's shape with
random weights and tokens. `one GPU, micro-batch size 1` is the same mathematics rounded elsewhere: what a mode differs
by more than that wants a look. KEYS are recipe keys for all runs; with `--runtime.device cpu`, `--model.overrides` of a
small model and a small `--length` all of it runs on a laptop.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from perf.gpu_spine import SPEED, compare, losses, median, train

NOTHING_SAVED = ["--checkpoint.export", "false", "--checkpoint.final", "false", "--checkpoint.optimizer", "false"]
NOTHING_SAVED += ["--checkpoint.resume", "never", "--checkpoint.overwrite", "true"]
FORMS = {"packed": ["--data.packing", "true"], "rows": ["--data.packing", "false"]}


def modes(gpus: int) -> dict[str, list[str]]:
    """Name → recipe keys of each way to exchange keys and values."""
    found = {name: ["--parallel.cp", "2", "--parallel.cp_comm_type", name] for name in ("p2p", "all_gather", "a2a")}
    if gpus >= 4:
        levels = ["--parallel.cp_comm_type", "a2a+p2p", "--parallel.hierarchical_cp", "[2,2]"]
        found["a2a+p2p"] = ["--parallel.cp", "4", *levels]
    return found


def ranks(keys: list[str]) -> list[str]:
    return ["--runtime.ranks", keys[1] if keys[:1] == ["--parallel.cp"] else "1"]


def same_losses(work: Path, steps: int, gpus: int, more: list[str]) -> list[dict[str, Any]]:
    """Each mode, packed and not, compared with one GPU."""
    rows = []
    for form, packing in FORMS.items():
        common = [*NOTHING_SAVED, "--schedule.steps", str(steps), "--schedule.global_batch_size", "4", *packing, *more]
        reference = losses(train(SPEED, work / f"one-{form}", *ranks([]), *common))
        runs = {"one GPU, micro-batch size 1": ["--schedule.micro_batch_size", "1"], **modes(gpus)}
        for name, keys in runs.items():
            found = train(SPEED, work / f"{name}-{form}".replace(" ", "-"), *ranks(keys), *keys, *common)
            speed = {key: median(found, key) for key in ("tokens_per_second_per_gpu", "tflops_per_gpu", "memory_gib")}
            rows.append({**compare(f"{name}, {form}", losses(found), reference), **speed})
    return rows


def one_long_sequence(work: Path, length: int, layers: int, more: list[str]) -> list[dict[str, Any]]:
    """A single document of `length` tokens on two GPUs, in each mode of two."""
    sizes = ["--data.sequence_length", str(length), "--data.packing", "true", "--model.overrides.num_hidden_layers"]
    batch = ["--schedule.steps", "6", "--schedule.global_batch_size", "1", "--schedule.micro_batch_size", "1"]
    common = [*NOTHING_SAVED, *more, *sizes, str(layers), *batch, "--runtime.recompute", "full"]
    rows = []
    for name, keys in modes(2).items():
        found = train(SPEED, work / f"long-{name}", *ranks(keys), *keys, *common)
        shown = ("tokens_per_second_per_gpu", "tflops_per_gpu", "memory_gib")
        rows.append({"run": f"{name}, {length} tokens, {layers} layers", "losses": losses(found)})
        rows[-1] |= {key: median(found, key) for key in shown}
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--layers", type=int, default=8)
    options, more = parser.parse_known_args()
    if options.steps < 3:
        parser.error("--steps: at least 3, the first two are not measured")
    work = options.out / "runs"
    work.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"command": " ".join(sys.argv)}
    for name, check in (
        ("same_losses", lambda: same_losses(work, options.steps, options.gpus, more)),
        ("one_long_sequence", lambda: one_long_sequence(work, options.length, options.layers, more)),
    ):
        report[name] = check()
        (options.out / "gpu_context.json").write_text(json.dumps(report, indent=1) + "\n")
        print(json.dumps([{k: v for k, v in row.items() if k != "losses"} for row in report[name]], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
