"""Reruns every memory and overlap lever for some steps beside the plain run: does the loss stay, what does it save?

    python -m perf.gpu_levers OUT [--only NAME …] [--gpus N] [--steps 10] [--recipe FILE] [KEYS …]

Each run is the command line that users type, and each lever is compared with the plain run at its own layout: largest
relative difference of the losses, peak memory and speed of the first rank. Levers that want more GPUs than `--gpus` are
left out and named. KEYS are recipe keys for all runs (`--model.path FOLDER`). A run that is refused is reported with
its reason: on a machine without GPUs (`--gpus 0 --runtime.device cpu`) that is what happens to most.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perf.gpu_spine import compare, failure, losses, median, train

RECIPES = Path(__file__).parent.parent / "launch" / "recipes"
DENSE = RECIPES / "bench_qwen3_8b_8layers.yaml"
# Eight experts and two layers of a model that has 128 and 94: one GPU holds it with Adam's states.
MOE_SHAPE = {"num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2}
MOE = ["--model.path", os.path.relpath(RECIPES / "models" / "qwen3-235b-a22b")]
MOE += ["--model.overrides", json.dumps(MOE_SHAPE)]
NOTHING_SAVED = ["--checkpoint.export", "false", "--checkpoint.final", "false", "--checkpoint.optimizer", "false"]
NOTHING_SAVED += ["--checkpoint.resume", "never", "--checkpoint.overwrite", "true"]
FP8 = ["--precision.fp8", "tensorwise"]
TP2 = ["--parallel.tp", "2"]
DP2 = ["--parallel.dp", "2"]
EP2 = [*DP2, "--parallel.ep", "2"]


@dataclass(frozen=True)
class Lever:
    """One lever: the keys that turn it on, and those that it shares with the plain run it is compared with.

    `tolerance`: largest relative difference of a loss that is rounding (bf16 sums in another order), not a fault. None:
    the mathematics differ (another optimizer, moments in bf16), so the losses are only reported.
    """

    name: str
    keys: Sequence[str]
    shared: Sequence[str] = ()
    gpus: int = 1
    moe: bool = False
    tolerance: float | None = 2e-3


def selective(*modules: str) -> list[str]:
    return ["--runtime.recompute", "selective", "--runtime.recompute_modules", json.dumps(modules)]


LEVERS = (
    Lever("recompute core_attn", selective("core_attn")),
    Lever("recompute mlp", selective("mlp")),
    Lever("recompute full", ["--runtime.recompute", "full"]),
    Lever("recompute block", ["--runtime.recompute", "full", "--runtime.recompute_method", "block"]),
    Lever("recompute layernorm, moe_act", selective("layernorm", "moe_act"), moe=True),
    Lever("recompute moe", selective("moe"), moe=True),
    Lever("offload layers", ["--runtime.offload_layers", "2"]),
    Lever("offload modules", ["--runtime.offload_modules", "[core_attn, attn_proj]"]),
    Lever("states on the CPU", ["--optimizer.offload_fraction", "0.5"]),
    Lever("remainders", ["--optimizer.main_params", "remainder"]),
    Lever(
        "bf16 moments", ["--optimizer.exp_avg_dtype", "bf16", "--optimizer.exp_avg_sq_dtype", "bf16"], tolerance=None
    ),
    Lever("muon", ["--optimizer.name", "muon", "--optimizer.distributed", "false"], tolerance=None),
    Lever("fp8 parameters", ["--precision.fp8_param_gather", "true"], shared=[*FP8, *DP2], gpus=2, tolerance=None),
    Lever("tp overlap", ["--runtime.tp_overlap", "true"], shared=[*TP2, "--data.packing", "true"], gpus=2),
    Lever("ep overlap", ["--runtime.ep_overlap", "true"], shared=EP2, gpus=2, moe=True),
    Lever(
        "ep overlap, delayed weight gradients",
        ["--runtime.ep_overlap", "true", "--runtime.delay_wgrad", "true"],
        shared=EP2,
        gpus=2,
        moe=True,
    ),
    Lever("no overlap", ["--runtime.overlap", "false"], shared=DP2, gpus=2),
    Lever("Megatron-FSDP", ["--optimizer.fsdp", "megatron"], shared=DP2, gpus=2),
    Lever("torch FSDP2", ["--optimizer.fsdp", "torch", "--optimizer.distributed", "false"], shared=DP2, gpus=2),
)


def report(lever: Lever, rows: list[dict[str, Any]], plain: list[dict[str, Any]], log: Path) -> dict[str, Any]:
    """One lever's line: the loss beside the plain run's, memory and speed of both."""
    found = compare(lever.name, losses(rows), losses(plain))
    if found.get("failed"):
        return found | failure(log)
    for key in ("memory_gib", "tokens_per_second_per_gpu"):
        found |= {key: median(rows, key), f"plain_{key}": median(plain, key)}
    if lever.tolerance is not None:
        found["loss_is_the_same"] = found["largest_relative_difference"] <= lever.tolerance
    return found


def measure(levers: Sequence[Lever], work: Path, *, recipe: Path, moe: Sequence[str], common: Sequence[str]) -> Any:
    """Runs each lever, and each plain run once."""
    plain: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for number, lever in enumerate(levers):
        ranks = ["--runtime.ranks", str(lever.gpus)]
        words = [*(moe if lever.moe else ()), *common, *NOTHING_SAVED, *ranks, *lever.shared]
        key = tuple(words)
        if key not in plain:
            plain[key] = train(recipe, work / f"plain_{len(plain)}", *words)
        run = work / f"lever_{number}"
        yield report(lever, train(recipe, run, *words, *lever.keys), plain[key], run.with_suffix(".log"))


def text(row: dict[str, Any]) -> str:
    """A lever's line for a reader."""
    if row.get("failed"):
        return f"{row['run']}: failed: {row['reason']}"
    memory = f"{row['memory_gib']:.2f} GiB (plain {row['plain_memory_gib']:.2f})" if row["memory_gib"] else ""
    same = {True: "the same loss", False: "ANOTHER LOSS", None: "losses not compared"}[row.get("loss_is_the_same")]
    return f"{row['run']}: {same}, difference {row['largest_relative_difference']:.1e}; {memory}"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=[lever.name for lever in LEVERS])
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--recipe", type=Path, default=DENSE)
    parser.add_argument("--work", type=Path, default=Path("runs/gpu_levers"))
    options, keys = parser.parse_known_args(words)
    for folder in (options.work, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    chosen = [lever for lever in LEVERS if not options.only or lever.name in options.only]
    levers = [lever for lever in chosen if lever.gpus <= max(options.gpus, 1)]
    left_out = [lever.name for lever in chosen if lever not in levers]
    common = ["--schedule.steps", str(options.steps), *keys]
    rows = []
    for row in measure(levers, options.work, recipe=options.recipe, moe=MOE, common=common):
        rows.append(row)
        print(text(row), flush=True)
        content = {"levers": [asdict(lever) for lever in levers], "left_out": left_out, "rows": rows}
        (options.out / "gpu_levers.json").write_text(json.dumps(content, indent=1) + "\n")
    if left_out:
        print(f"left out, for want of GPUs: {', '.join(left_out)}")
    return 1 if any(row.get("loss_is_the_same") is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
