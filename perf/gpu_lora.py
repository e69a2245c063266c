"""Measures LoRA on one GPU beside transformers + PEFT + Liger: Qwen3-8B's shape, rank 16 on all linear layers.

    python -m perf.gpu_lora OUT [--only NAME …] [--steps 10] [--recipe FILE] [KEYS …]

One document of 4,096 random tokens a micro-batch, random weights. Our runs are the command line that users type; the
others are perf/peft_liger.py, in turn on the same machine. A bound is what the project promises; exit code 1: a run
failed, or broke one. KEYS are recipe keys for all of ours. Also measured: how far the loss that training uses (BF16
logits, Transformer Engine's cross entropy) is from float64's on the same logits.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mcore_swift.recipe_io import load_recipe
from perf.gpu_levers import NOTHING_SAVED
from perf.gpu_spine import execute, failure, median, train

RECIPES = Path(__file__).parent.parent / "launch" / "recipes"
RECIPE = RECIPES / "bench_qwen3_8b_lora.yaml"
MODEL = RECIPES / "models" / "qwen3-8b"
FP8 = ["--precision.fp8", "tensorwise"]
LOSS = "loss"


@dataclass(frozen=True)
class Case:
    """One run: ours with `keys`, or PEFT's with `words`. None: no bound."""

    name: str
    keys: Sequence[str] = ()
    words: Sequence[str] | None = None
    least_tokens_per_second: float | None = None
    most_gib: float | None = None


CASES = (
    Case("BF16", least_tokens_per_second=14_500, most_gib=36),
    Case("FP8", [*FP8, "--adapter.quantization", "fp8"], least_tokens_per_second=17_000, most_gib=36),
    Case("FP8, weights in BF16 too", FP8),
    Case("PEFT + Liger", words=()),
    Case("PEFT + Liger, checkpointing", words=["--checkpointing"]),
)


def ours(case: Case, run: Path, recipe: Path, common: Sequence[str]) -> dict[str, Any]:
    rows = train(recipe, run, *NOTHING_SAVED, *case.keys, *common)
    if not rows:
        return {"run": case.name, **failure(run.with_suffix(".log"))}
    speed, peak = median(rows, "tokens_per_second_per_gpu"), max(row["memory_gib"] for row in rows)
    losses = [row["loss"] for row in rows]
    return {"run": case.name, "tokens_per_second": speed, "peak_gib": peak, "losses": losses}


def peft(case: Case, log: Path, model: Path, steps: int, sequences: int) -> dict[str, Any]:
    """`sequences`: of a step, one after the other."""
    words = [sys.executable, "-W", "ignore", "-m", "perf.peft_liger", str(model), "--steps", str(steps)]
    words += ["--micro-batches", str(sequences)]
    execute([*words, *(case.words or ())], log)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("PEFT ")]
    if not lines:
        return {"run": case.name, **failure(log)}
    return {"run": case.name, **json.loads(lines[-1].removeprefix("PEFT "))}


def judged(case: Case, row: dict[str, Any]) -> dict[str, Any]:
    """The row with its bounds, and whether it keeps to them."""
    if row.get("failed"):
        return row
    least, most = case.least_tokens_per_second, case.most_gib
    fast = least is None or row["tokens_per_second"] >= least
    small = most is None or row["peak_gib"] <= most
    return {**row, "least_tokens_per_second": least, "most_gib": most, "fast": fast, "small": small}


def text(row: dict[str, Any]) -> str:
    """A run's line for a reader."""
    if row.get("failed"):
        return f"{row['run']}: failed: {row['reason']}"
    if "largest_error" in row:
        return f"loss: {row['largest_error']:.1e} of float64's at most, the mean {row['mean_error']:.1e}"
    bounds = [
        "" if row["fast"] else f"TOO SLOW, at least {row['least_tokens_per_second']:,.0f}",
        "" if row["small"] else f"TOO LARGE, at most {row['most_gib']:g} GiB",
    ]
    wrong = "; ".join(word for word in bounds if word)
    memory = f"{row['peak_gib']:.1f} GiB" if row["peak_gib"] is not None else "memory not measured"
    return f"{row['run']}: {row['tokens_per_second']:,.0f} tokens/s, {memory}{': ' + wrong if wrong else ''}"


def loss_error() -> dict[str, Any]:
    """Relative differences of the tokens' loss, and of its mean, from float64's on the same BF16 logits."""
    import torch
    import torch.distributed as dist
    from megatron.core.extensions.transformer_engine import te_parallel_cross_entropy

    dist.init_process_group("nccl", init_method="tcp://127.0.0.1:29517", rank=0, world_size=1)
    torch.manual_seed(0)
    logits = (torch.randn(1024, 1, 151_936, device="cuda") * 3).bfloat16()
    labels = torch.randint(0, logits.size(-1), (1024, 1), device="cuda")
    exact = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), labels.flatten(), reduction="none")
    group: Any = dist.group.WORLD
    found = te_parallel_cross_entropy(logits, labels, group).double().flatten()
    dist.destroy_process_group()
    largest = ((found - exact).abs() / exact).max().item()
    return {"run": LOSS, "largest_error": largest, "mean_error": abs(found.mean() / exact.mean() - 1).item()}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=[*(case.name for case in CASES), LOSS])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--work", type=Path, default=Path("runs/gpu_lora"))
    options, keys = parser.parse_known_args(words)
    for folder in (options.work, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    chosen = [case for case in CASES if not options.only or case.name in options.only]
    common = ["--schedule.steps", str(options.steps), *keys]
    made = load_recipe(options.recipe, common)
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        print(text(row), flush=True)
        content = {"cases": [asdict(case) for case in chosen], "rows": rows}
        (options.out / "gpu_lora.json").write_text(json.dumps(content, indent=1) + "\n")

    for number, case in enumerate(chosen):
        if case.words is None:
            keep(judged(case, ours(case, options.work / f"run_{number}", options.recipe, common)))
        else:
            log, sequences = options.work / f"run_{number}.log", made.schedule.global_batch_size
            keep(judged(case, peft(case, log, MODEL, min(options.steps, 7), sequences)))
    if not options.only or LOSS in options.only:
        keep(loss_error())
    return 1 if any(row.get("failed") or not (row.get("fast", True) and row.get("small", True)) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
