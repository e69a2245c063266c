"""Measures QLoRA on one GPU: peak memory and speed at Qwen3-8B's and Qwen2.5-72B's shapes, random weights and tokens.

    python -m perf.gpu_qlora OUT [--only NAME …] [--steps 10] [--recipe FILE] [KEYS …]

Each run is the command line that users type. The peak is the most memory that was ever allocated, building and loading
included. Exit code 1: a run failed, or took more than it may. KEYS are recipe keys for all runs, after a run's own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perf.gpu_levers import NOTHING_SAVED
from perf.gpu_spine import failure, median, train

RECIPES = Path(__file__).parent.parent / "launch" / "recipes"
RECIPE = RECIPES / "bench_qlora.yaml"
KEPT = ["--runtime.recompute", "none"]


def shape(name: str) -> list[str]:
    return ["--model.path", os.path.relpath(RECIPES / "models" / name)]  # it is recorded


@dataclass(frozen=True)
class Case:
    """One run. `most_gib`: what its peak must stay below; None: it is there to be compared with."""

    name: str
    keys: Sequence[str]
    most_gib: float | None = None


CASES = (
    Case("Qwen3-8B, NF4", shape("qwen3-8b"), most_gib=12),
    Case("Qwen3-8B, NF4, plain scales", [*shape("qwen3-8b"), "--adapter.double_quantization", "false"]),
    Case("Qwen3-8B, NF4, activations kept", [*shape("qwen3-8b"), *KEPT]),
    Case("Qwen3-8B, BF16", [*shape("qwen3-8b"), "--adapter.quantization", "none"]),
    Case("Qwen3-8B, BF16, activations kept", [*shape("qwen3-8b"), *KEPT, "--adapter.quantization", "none"]),
    Case("Qwen2.5-72B, NF4", shape("qwen2.5-72b"), most_gib=78),
)


def report(case: Case, rows: Sequence[dict[str, Any]], log: Path) -> dict[str, Any]:
    """One run's line: peak GiB, tokens a second after the first two steps, and whether it keeps to its bound."""
    if not rows:
        return {"run": case.name, **failure(log)}
    peak = max(row["memory_gib"] for row in rows)
    return {
        "run": case.name,
        "peak_gib": peak,
        "tokens_per_second": median(list(rows), "tokens_per_second_per_gpu"),
        "most_gib": case.most_gib,
        "fits": case.most_gib is None or peak <= case.most_gib,
        "losses": [row["loss"] for row in rows],
    }


def text(row: dict[str, Any]) -> str:
    """A run's line for a reader."""
    if row.get("failed"):
        return f"{row['run']}: failed: {row['reason']}"
    bound = f" (at most {row['most_gib']:g})" if row["most_gib"] is not None else ""
    wrong = "" if row["fits"] else ": TOO MUCH"
    return f"{row['run']}: {row['peak_gib']:.2f} GiB{bound}{wrong}, {row['tokens_per_second']:,.0f} tokens/s"


def measure(cases: Sequence[Case], work: Path, *, recipe: Path, common: Sequence[str]) -> Iterator[dict[str, Any]]:
    for case in cases:
        run = work / "".join(letter if letter.isalnum() else "_" for letter in case.name)
        rows = train(recipe, run, *NOTHING_SAVED, *case.keys, *common)
        yield report(case, rows, run.with_suffix(".log"))


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--work", type=Path, default=Path("runs/gpu_qlora"))
    options, keys = parser.parse_known_args(words)
    for folder in (options.work, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    cases = [case for case in CASES if not options.only or case.name in options.only]
    rows = []
    for row in measure(
        cases, options.work, recipe=options.recipe, common=["--schedule.steps", str(options.steps), *keys]
    ):
        rows.append(row)
        print(text(row), flush=True)
        content = {"cases": [asdict(case) for case in cases], "rows": rows}
        (options.out / "gpu_qlora.json").write_text(json.dumps(content, indent=1) + "\n")
    return 1 if any(row.get("failed") or not row["fits"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
