"""Reruns the GPU checks of the training path in one command, and writes what it measured as JSON and Markdown.

    python -m perf.gpu_spine OUT [--speed] [--layouts] [--fp8] [--tokenizer FOLDER]

--speed: Qwen3-8B's shape with 8 layers on one GPU, BF16 and FP8, beside plain GPTModel + Transformer Engine.
--layouts: one set of weights, 20 steps at one GPU, TP2, PP2 and DP2 (two GPUs).
--fp8: each FP8 recipe against BF16 over 50 steps.
Every run of ours is the command line that users type; the numbers are those of its metrics.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parent.parent / "launch" / "recipes"
SPEED = RECIPES / "bench_qwen3_8b_8layers.yaml"
PARITY = RECIPES / "gpu_parity.yaml"
LAYOUTS = {"TP2": ["--parallel.tp", "2"], "PP2": ["--parallel.pp", "2"], "DP2": ["--parallel.dp", "2"]}
ONE_GPU = ["--runtime.ranks", "1"]


def train(
    recipe: Path, run: Path, *overrides: str, limit: float | None = None, variables: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Runs `mcore-swift train`; returns its steps' metrics, [] when it failed (its output is then in RUN.log)."""
    words = [sys.executable, "-m", "mcore_swift.cli", "train", str(recipe), "--checkpoint.dir", str(run), *overrides]
    code = execute(words, run.with_suffix(".log"), limit=limit, variables=variables)
    metrics = run / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() and not code else []
    return [row for row in rows if "loss" in row]


def execute(
    words: Sequence[str], log: Path, *, limit: float | None = None, variables: Mapping[str, str] | None = None
) -> int:
    """Runs a program, its output into `log`, of which the end is shown; returns its exit code, 124 after `limit` s.

    `variables`: of its environment, beside ours.
    """
    begin = time.time()
    with log.open("w") as output:  # a group of its own: the program and all that it starts end together
        program = subprocess.Popen(
            words, stdout=output, stderr=subprocess.STDOUT, process_group=0, env={**os.environ, **(variables or {})}
        )
        try:
            code = program.wait(limit)
        except subprocess.TimeoutExpired:
            code = 124
        finally:
            if program.poll() is None:
                os.killpg(program.pid, signal.SIGKILL)
                program.wait()
        if code == 124:
            output.write(f"\nstopped after {limit:g} s\n")
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-25 if code else -1 :])
    print(f"[{time.time() - begin:5.0f} s] {log.stem}: exit code {code}\n{tail}", flush=True)
    return code


def failure(log: Path) -> dict[str, Any]:
    """What is said of a run that failed: the last line of its log."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return {"failed": True, "reason": lines[-1] if lines else "no output"}


def median(rows: list[dict[str, Any]], key: str) -> float | None:
    """The median over the steps after the first two."""
    return statistics.median(row[key] for row in rows[2:]) if rows else None


def speed(work: Path) -> list[dict[str, Any]]:
    """Ours and plain Megatron-Core, in turn."""
    rows = []
    variants: list[tuple[str | None, Sequence[str]]] = [
        (None, []),
        (None, ["--data.packing", "true"]),
        ("tensorwise", []),
        ("delayed", []),
        ("blockwise", []),
    ]
    for fp8, more in variants:
        name = f"ours_{fp8 or 'bf16'}{'_packed' if more else ''}"
        extra = ["--precision.fp8", fp8] if fp8 else []
        never = ["--checkpoint.export", "false", "--checkpoint.resume", "never", "--checkpoint.optimizer", "false"]
        steps = train(SPEED, work / name, *ONE_GPU, *extra, *more, *never, "--checkpoint.final", "false")
        keys = ("tflops_per_gpu", "tokens_per_second_per_gpu", "memory_gib", "mfu")
        rows.append({"run": name, **{key: median(steps, key) for key in keys}})
        if not more:
            rows.append({"run": f"plain_{fp8 or 'bf16'}", **plain(fp8)})
    return rows


def plain(fp8: str | None) -> dict[str, Any]:
    script = str(Path(__file__).parent / "plain_mcore.py")
    words = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node=1", script]
    done = subprocess.run(words + (["--fp8", fp8] if fp8 else []), capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("PLAIN ")]
    if not lines:
        print(done.stdout[-1500:], done.stderr[-3000:], flush=True)
        return {}
    return json.loads(lines[-1].removeprefix("PLAIN "))


def layouts(work: Path, tokenizer: str) -> list[dict[str, Any]]:
    """Losses at each layout, compared with one GPU's.

    One GPU with two packs a micro-batch shows what bf16 noise is: the same mathematics, rounded elsewhere.
    """
    words = ["--model.tokenizer", tokenizer]
    common = [*words, "--model.path", start_weights(work / "start", *words)]
    reference = losses(train(PARITY, work / "one", *common, *ONE_GPU))
    noise = losses(train(PARITY, work / "noise", *common, *ONE_GPU, "--schedule.micro_batch_size", "2"))
    rows = [compare("one GPU, micro-batch size 2 (the noise)", noise, reference)]
    for name, overrides in LAYOUTS.items():
        found = losses(train(PARITY, work / name, *common, "--runtime.ranks", "2", *overrides))
        rows.append(compare(name, found, reference))
    return rows


def fp8(work: Path, tokenizer: str) -> list[dict[str, Any]]:
    """Losses of each FP8 recipe over 50 steps, compared with BF16's: Qwen3-8B's shape with 8 layers, one GPU."""
    shape = ["--model.path", str(RECIPES / "models" / "qwen3-8b"), "--model.overrides.num_hidden_layers", "8"]
    common = [*shape, "--model.init", "random", "--model.tokenizer", tokenizer, *ONE_GPU]  # one seed, the same weights
    common += ["--schedule.steps", "50", "--schedule.learning_rate", "1e-4"]
    bf16 = losses(train(PARITY, work / "bf16", *common))
    rows = []
    for name in ("tensorwise", "delayed", "blockwise"):
        rows.append(compare(f"FP8 {name}", losses(train(PARITY, work / name, *common, "--precision.fp8", name)), bf16))
    return rows


def start_weights(run: Path, *keys: str, variables: Mapping[str, str] | None = None) -> str:
    """A Hugging Face folder of random weights, written by a run on one GPU that hardly moves them."""
    if not (run / "hf").exists():
        still = ["--model.init", "random", "--schedule.steps", "3", "--schedule.learning_rate", "1e-9"]
        train(PARITY, run, *ONE_GPU, *keys, *still, "--checkpoint.export", "true", variables=variables)
    return str(run / "hf")


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows]


def compare(name: str, found: list[float], reference: list[float]) -> dict[str, Any]:
    if not found or not reference:
        return {"run": name, "failed": True}
    relative = [abs(a - b) / b for a, b in zip(found, reference, strict=True)]
    return {
        "run": name,
        "first_loss": found[0],
        "last_loss": found[-1],
        "reference_last_loss": reference[-1],
        "largest_relative_difference": max(relative),
        "last_relative_difference": relative[-1],
        "last_10_mean_relative_difference": abs(sum(found[-10:]) / sum(reference[-10:]) - 1),
        "losses": found,
    }


def versions() -> dict[str, str]:
    import importlib.metadata

    import torch

    names = ("torch", "megatron-core", "transformer-engine", "transformers")
    found = {name: importlib.metadata.version(name) for name in names}
    return found | {"gpu": torch.cuda.get_device_name(), "gpus": str(torch.cuda.device_count())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--layouts", action="store_true")
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--tokenizer", help="a folder with a tokenizer, for --layouts and --fp8")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu_spine"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    report: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "versions": versions(), "command": " ".join(sys.argv)}
    checks = {
        "speed": lambda: speed(options.work),
        "layouts": lambda: layouts(options.work, options.tokenizer),
        "fp8": lambda: fp8(options.work, options.tokenizer),
    }
    for name, check in checks.items():
        if getattr(options, name):
            report[name] = check()
            (options.out / "gpu_spine.json").write_text(json.dumps(report, indent=1) + "\n")
            print(json.dumps([{k: v for k, v in row.items() if k != "losses"} for row in report[name]], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
