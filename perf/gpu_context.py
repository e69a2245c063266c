"""Trains on one sequence of 128K tokens, shared out over two GPUs: each way to exchange keys and values.

    python -m perf.gpu_context OUT [--length 131072] [--layers 8] [--only MODE …] [--limit 200] [KEYS …]

Qwen3-8B's shape, full training, random weights and tokens, one document; memory and speed of the steps after the first
two. Whether the losses are one GPU's is what perf/gpu_parallel.py asks. KEYS are recipe keys for all runs; with
`--runtime.device cpu`, `--model.overrides` of a small model and a small `--length` it runs on a laptop. Exit code 1: a
run failed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from perf.gpu_levers import NOTHING_SAVED
from perf.gpu_moe import MEMORY
from perf.gpu_parallel import CP2, TWO
from perf.gpu_spine import SPEED, failure, median, train

MEASURED = ("tokens_per_second_per_gpu", "tflops_per_gpu", "memory_gib")


def measure(
    modes: Sequence[str], work: Path, *, length: int, layers: int, limit: float, common: Sequence[str]
) -> Iterator[dict[str, Any]]:
    keys = ["--data.sequence_length", str(length), "--data.packing", "true", "--runtime.recompute", "full"]
    keys += ["--runtime.loss_chunk", "8192"]
    keys += ["--model.overrides.num_hidden_layers", str(layers)]
    keys += ["--schedule.steps", "6", "--schedule.global_batch_size", "1", "--schedule.micro_batch_size", "1"]
    for mode in modes:
        run = work / mode
        name = f"{mode}, {length:,} tokens, {layers} layers"
        rows = train(SPEED, run, *NOTHING_SAVED, *TWO, *CP2[mode], *keys, *common, limit=limit, variables=MEMORY)
        found = {key: median(rows, key) for key in MEASURED} if rows else failure(run.with_suffix(".log"))
        yield {"run": name, **found, "losses": [row["loss"] for row in rows]}


def text(row: dict[str, Any]) -> str:
    """A run's line for a reader."""
    if row.get("failed"):
        return f"{row['run']}: failed: {row['reason']}"
    tokens, flops, memory = (row[key] or 0.0 for key in MEASURED)
    return f"{row['run']}: {tokens:,.0f} tokens/s, {flops:,.0f} TFLOP/s a GPU, {memory:.1f} GiB"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--length", type=int, default=131_072)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--only", nargs="+", choices=list(CP2), default=list(CP2))
    parser.add_argument("--limit", type=float, default=200.0, help="seconds a run may take")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu_context"))
    options, keys = parser.parse_known_args(words)
    for folder in (options.work, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, Any] = {"length": options.length, "layers": options.layers, "limit": options.limit}
    rows = []
    for row in measure(options.only, options.work, **sizes, common=keys):
        rows.append(row)
        print(text(row), flush=True)
        (options.out / "gpu_context.json").write_text(json.dumps({"keys": keys, "rows": rows}, indent=1) + "\n")
    return 1 if any(row.get("failed") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
