"""Measures a mixture of experts on two GPUs (EP2): Qwen3-30B-A3B's shape, full training and LoRA, random weights.

    python -m perf.gpu_moe OUT [--only NAME …] [--steps 6] [--limit 120] [KEYS …]

Each run is the command line that users type. A run that takes longer than --limit seconds is ended. Exit code 1: a run
failed, or is slower than it should be. KEYS are recipe keys for all runs, after a run's own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perf.gpu_levers import NOTHING_SAVED
from perf.gpu_spine import failure, median, train

RECIPES = Path(__file__).parent.parent / "launch" / "recipes"
FULL, LORA = RECIPES / "bench_moe.yaml", RECIPES / "bench_moe_lora.yaml"
# Experts get other numbers of tokens in each step: without it, memory is lost between blocks that don't fit.
MEMORY = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def layers(count: int) -> list[str]:
    return ["--model.overrides", json.dumps({"num_hidden_layers": count})]


@dataclass(frozen=True)
class Case:
    """One run. `least`: what `measure` must reach; None: it is there to be compared with."""

    name: str
    recipe: Path
    keys: Sequence[str] = ()
    measure: str = "tflops_per_gpu"
    least: float | None = None


TOKENS = "tokens_per_second_per_gpu"
# Each token goes to the other GPU once, in place of once for each of its experts there: at EP2 that is less.
GATHERED = ["--moe.dispatcher", "allgather"]
HALF = ["--schedule.micro_batch_size", "2"]  # weights are there twice
CASES = (
    Case("full, BF16", FULL, least=250),
    Case("full, BF16, allgather", FULL, GATHERED),
    Case("full, BF16, 12 layers", FULL, [*layers(12), *HALF]),
    Case("full, BF16, fused router", FULL, ["--moe.router_fusion", "true"]),
    Case("full, FP8", FULL, [*HALF, "--precision.fp8", "blockwise"]),
    Case("full, FP8 tensorwise", FULL, [*HALF, "--precision.fp8", "tensorwise"]),
    Case("LoRA, BF16", LORA, measure=TOKENS, least=7300),
    Case("LoRA, BF16, allgather", LORA, GATHERED, measure=TOKENS),
    Case("LoRA of attention", LORA, ["--adapter.targets", "[attention]"], measure=TOKENS),
)
SHORT = ("full, BF16", "full, BF16, allgather", "full, FP8", "LoRA, BF16")  # what is run unless others are named


def report(case: Case, rows: Sequence[dict[str, Any]], log: Path) -> dict[str, Any]:
    """One run's line: its speed after the first two steps, peak GiB, and whether it is fast enough."""
    if not rows:
        return {"run": case.name, **failure(log)}
    found = {key: median(list(rows), key) for key in ("tflops_per_gpu", TOKENS)}
    speed = found[case.measure] or 0.0
    return {
        "run": case.name,
        **found,
        "peak_gib": max(row["memory_gib"] for row in rows),
        "least": case.least,
        "measure": case.measure,
        "reached": case.least is None or speed >= case.least,
        "losses": [row["loss"] for row in rows],
    }


def text(row: dict[str, Any]) -> str:
    """A run's line for a reader."""
    if row.get("failed"):
        return f"{row['run']}: failed: {row['reason']}"
    units = {"tflops_per_gpu": "TFLOP/s", TOKENS: "tokens/s"}
    bound = f" (at least {row['least']:,g} {units[row['measure']]})" if row["least"] is not None else ""
    slow = "" if row["reached"] else ": TOO SLOW"
    speeds = ", ".join(f"{row[key]:,.0f} {unit}" for key, unit in units.items() if row[key])
    return f"{row['run']}: {speeds} a GPU{bound}{slow}, {row['peak_gib']:.1f} GiB"


def measure(cases: Sequence[Case], work: Path, *, limit: float, common: Sequence[str]) -> Iterator[dict[str, Any]]:
    for case in cases:
        run = work / "".join(letter if letter.isalnum() else "_" for letter in case.name)
        keys = [*NOTHING_SAVED, *case.keys, *common]
        rows = train(case.recipe, run, *keys, limit=limit, variables=MEMORY)
        yield report(case, rows, run.with_suffix(".log"))


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], default=SHORT)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--limit", type=float, default=120.0)
    parser.add_argument("--work", type=Path, default=Path("runs/gpu_moe"))
    options, keys = parser.parse_known_args(words)
    for folder in (options.work, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    cases = [case for case in CASES if case.name in options.only]
    rows = []
    for row in measure(
        cases, options.work, limit=options.limit, common=["--schedule.steps", str(options.steps), *keys]
    ):
        rows.append(row)
        print(text(row), flush=True)
        content = {"cases": [asdict(case) | {"recipe": case.recipe.name} for case in cases], "rows": rows}
        (options.out / "gpu_moe.json").write_text(json.dumps(content, indent=1) + "\n")
    return 1 if any(row.get("failed") or not row["reached"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
