"""Measures what DPO costs on one GPU: beside SFT on the same tokens, and beside TRL's DPOTrainer on the same rows.

    python -m perf.gpu_dpo OUT [--only NAME …] [--steps 7] [--packs 4] [--limit 150] [--recipe FILE] [KEYS …]

Qwen3-8B's shape with LoRA, random weights and rows. Each run of ours is the command line that users type, in a process
of its own; a step takes all rows, in every run, so all compute the same tokens. Medians of the steps after the first
two; tokens are those of both answers with their prompts, padding not counted. Our DPO computes a prompt once for both
(data.share_prompts); --only twice: for each. --limit: seconds a run may take.
KEYS are recipe keys for all our runs; TRL's model is the one that they describe. Exit code 1: a run failed, or cost
more than it may. Writes gpu_dpo.json and gpu_dpo.md after each run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mcore_swift.data.packing import best_fit_decreasing
from mcore_swift.recipe_io import load_recipe
from mcore_swift.training.run import model_source
from perf.gpu_levers import NOTHING_SAVED
from perf.gpu_spine import execute, failure, train

RECIPE = Path(__file__).parent.parent / "launch" / "recipes" / "bench_qwen3_8b_dpo.yaml"
PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "trl", "peft", "liger-kernel")
WORDS = 20_000  # of the tokenizer, where the model has as many
PAIRS_A_PACK = 3
LEAST_FULL = 0.95
WARM_UP = 2  # steps
FP8 = ["--precision.fp8", "tensorwise", "--adapter.quantization", "fp8"]
WIDER = ["--tries", "12", "6", "4", "3", "2", "1"]


@dataclass(frozen=True)
class Case:
    """One run. `most_time`, `most_gib`: what it may cost, times SFT's step and beyond SFT's peak; None: it may.

    rows: the file that it learns from. least_speed: how many times TRL's tokens a second it must reach.
    """

    name: str
    title: str
    keys: Sequence[str] = ()
    rows: str = "pairs.jsonl"
    most_time: float | None = None
    most_gib: float | None = None
    least_speed: float | None = None
    always: bool = True


def reference(name: str, *, share: bool = True) -> list[str]:
    return ["--objective.reference", name, "--data.share_prompts", str(share).lower()]


CASES = (
    Case("sft", "SFT", ["--objective.name", "sft"], rows="answers.jsonl"),
    Case("dpo", "DPO, adapter_off", reference("adapter_off"), most_time=1.4, most_gib=3, least_speed=1.7),
    Case("precomputed", "DPO, precomputed", reference("precomputed"), most_time=1.05, most_gib=3, least_speed=1.7),
    Case("twice", "DPO, adapter_off, each prompt twice", reference("adapter_off", share=False), always=False),
    Case("fp8", "DPO, adapter_off, base in FP8", [*reference("adapter_off"), *FP8], always=False),
    Case("trl", "TRL"),
    Case("trl_checkpointing", "TRL, gradient checkpointing", ["--checkpointing", *WIDER], always=False),
)


# --- rows -------------------------------------------------------------------------------------------------------------


def draw(packs: int, length: int) -> np.ndarray:
    """int64 [pairs, 3]: tokens of a prompt and of both its answers, EOS counted, three pairs a pack.

    At 4,096 tokens prompts have 102 to 307 and answers 204 to 778. The first draw that fills `packs` packs to 95 % and
    more, packed by pairs as for DPO or by single answers as for SFT: the number of positions is then the same.
    """
    for seed in itertools.count():
        generator = np.random.default_rng(seed)
        prompts = generator.integers(length // 40, length * 3 // 40, (packs * PAIRS_A_PACK, 1))
        answers = generator.integers(length // 20, length * 19 // 100, (packs * PAIRS_A_PACK, 2))
        documents = prompts + answers
        if not LEAST_FULL * packs * length <= documents.sum() <= packs * length:
            continue
        wanted = (documents.sum(1), documents.reshape(-1))
        if all(len(best_fit_decreasing(lengths, length)[0]) == packs + 1 for lengths in wanted):
            return np.concatenate([prompts, answers], axis=1)
    raise AssertionError


def tokens_of(lengths: np.ndarray) -> int:
    """Tokens of a step: both answers, each with its prompt."""
    return int(lengths.sum() + lengths[:, 0].sum())


def write_rows(folder: Path, lengths: np.ndarray, *, words: int) -> None:
    """pairs.jsonl, and answers.jsonl: the same texts, one answer a row. A word is a token; EOS is added by those who
    read it."""
    generator = np.random.default_rng(0)

    def text(count: int) -> str:
        return " ".join(f"w{number}" for number in generator.integers(2, words, count))

    pairs = [
        {"prompt": text(prompt) + " ", "chosen": text(chosen - 1), "rejected": text(rejected - 1)}
        for prompt, chosen, rejected in lengths.tolist()
    ]
    answers = [{"prompt": row["prompt"], "response": row[side]} for row in pairs for side in ("chosen", "rejected")]
    for name, rows in (("pairs", pairs), ("answers", answers)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_tokenizer(folder: Path, *, words: int) -> None:
    """A tokenizer of the words <pad>, </s>, w2, w3, …, without a chat template: texts are taken as they are."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "</s>", *(f"w{number}" for number in range(2, words))]
    made = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token="w2"))
    made.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)


def prepare(work: Path, recipe: Path, keys: Sequence[str], *, packs: int) -> np.ndarray:
    """Writes the rows, the tokenizer and the model's config into `work`; returns `draw`."""
    made = load_recipe(recipe, keys)
    config = model_source(made).config
    words = min(WORDS, config.vocab_size)
    lengths = draw(packs, made.data.sequence_length)
    write_rows(work, lengths, words=words)
    write_tokenizer(work / "tokenizer", words=words)
    config.save_pretrained(work / "config")
    return lengths


# --- runs -------------------------------------------------------------------------------------------------------------


def ours(case: Case, work: Path, *, recipe: Path, common: Sequence[str], limit: float) -> dict[str, Any]:
    """One of our runs: seconds of its steps, peak memory, losses, and what the reference took beforehand."""
    run = work / case.name
    data = ["--data.train", str(work / case.rows), "--data.cache_dir", str(work / "cache" / case.name)]
    tokenizer = ["--model.tokenizer", str(work / "tokenizer")]
    words = [*NOTHING_SAVED, *data, *tokenizer, *case.keys, *common]
    rows = train(recipe, run, *words, limit=limit)
    if not rows:
        return failure(run.with_suffix(".log"))
    found = re.search(r"\| reference_seconds \| ([\d.]+) \|", (run / "summary.md").read_text())
    return {
        "step_seconds": [row["seconds"] for row in rows],
        "losses": [row["loss"] for row in rows],
        "memory_gib": max(row["memory_gib"] for row in rows),
        "labels": sorted({row["loss_tokens"] for row in rows}),
        "positions": sorted({row["tokens"] for row in rows}),
        "reference_seconds": float(found[1]) if found else None,
    }


def trls(case: Case, work: Path, *, steps: int, limit: float) -> dict[str, Any]:
    """TRL's run, under the same names."""
    log = work / f"{case.name}.log"
    script = [sys.executable, "-W", "ignore", "-m", "perf.trl_dpo"]
    places = [work / "config", work / "tokenizer", work / case.rows]
    code = execute([*script, *map(str, places), "--steps", str(steps), *case.keys], log, limit=limit)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("TRL ")]
    if code or not lines:
        return failure(log)
    found = json.loads(lines[-1].removeprefix("TRL "))
    return {"step_seconds": found.pop("seconds"), **found}


def measure(
    cases: Sequence[Case], work: Path, *, recipe: Path, common: Sequence[str], steps: int, tokens: int, limit: float
) -> Iterator[dict[str, Any]]:
    """Each case's row, as soon as it is there."""
    for case in cases:
        if case.name.startswith("trl"):
            row = trls(case, work, steps=steps, limit=limit)
        else:
            row = ours(case, work, recipe=recipe, common=common, limit=limit)
        if not row.get("failed"):
            row["seconds"] = median(row["step_seconds"][WARM_UP:])
            row["tokens_per_second"] = tokens / row["seconds"]
        yield {"run": case.name, "title": case.title, **row}


# --- report -----------------------------------------------------------------------------------------------------------


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with what they cost beside SFT's step and TRL's faster run, and `misses`: the bounds that they break."""
    done = {row["run"]: row for row in rows if not row.get("failed")}
    sft = done.get("sft")
    trl = max((row["tokens_per_second"] for name, row in done.items() if name.startswith("trl")), default=None)
    found = []
    for row in rows:
        case = next(case for case in CASES if case.name == row["run"])
        more: dict[str, Any] = {}
        if row["run"] in done and not row["run"].startswith("trl"):
            if sft is not None and row is not sft:
                more["time_of_sft"] = row["seconds"] / sft["seconds"]
                more["gib_over_sft"] = row["memory_gib"] - sft["memory_gib"]
            if trl is not None:
                more["speed_of_trl"] = row["tokens_per_second"] / trl
        bounds = (
            ("time_of_sft", case.most_time, 1),
            ("gib_over_sft", case.most_gib, 1),
            ("speed_of_trl", case.least_speed, -1),
        )
        misses = [key for key, most, sign in bounds if most and key in more and sign * more[key] > sign * most]
        found.append({**row, **more, "misses": misses})
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table for a reader."""
    lines = [
        "| run | s a step | tokens/s | × SFT's step | peak GiB (over SFT's) | × TRL's tokens/s | |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        if row.get("failed"):
            lines.append(f"| {row['title']} | | | | | | failed: {row['reason'].replace('|', '/')} |")
            continue
        times, speed, over = (row.get(key) for key in ("time_of_sft", "speed_of_trl", "gib_over_sft"))
        memory = "" if row["memory_gib"] is None else f"{row['memory_gib']:.2f}"
        cells = (
            row["title"],
            f"{row['seconds']:.3f}",
            f"{row['tokens_per_second']:,.0f}",
            "" if times is None else f"{times:.3f}",
            memory + ("" if over is None else f" ({over:+.2f})"),
            "" if speed is None else f"{speed:.2f}",
            note(row),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def note(row: dict[str, Any]) -> str:
    """What else a reader should know of a run."""
    found = [f"MISSED: {', '.join(row['misses'])}"] if row["misses"] else []
    if row.get("reference_seconds") is not None:
        found.append(f"reference beforehand: {row['reference_seconds']:.1f} s, compilation included")
    if "padding" in row:
        liger = "Liger" if row["liger"] else "no Liger"
        found.append(f"{row['pairs_in_a_pass']} pairs a pass, {100 * row['padding']:.0f} % padding, {liger}")
    return "; ".join(found)


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def gpu() -> str:
    """The GPU and its driver, asked without taking memory on it."""
    if shutil.which("nvidia-smi") is None:
        return "none"
    words = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES])
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--packs", type=int, default=4, help="packs of a step")
    parser.add_argument("--limit", type=float, default=150, help="seconds a run may take")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--work", type=Path, default=Path("runs/gpu_dpo"))
    options, keys = parser.parse_known_args(words)
    if options.steps <= WARM_UP:
        parser.error(f"--steps: {options.steps}; the first {WARM_UP} don't count")
    for folder in (options.work, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    common = ["--schedule.steps", str(options.steps), "--schedule.global_batch_size", str(options.packs), *keys]
    lengths = prepare(options.work, options.recipe, common, packs=options.packs)
    tokens = tokens_of(lengths)
    answers = int(lengths[:, 1:].sum())
    print(f"{len(lengths)} pairs, {tokens} tokens a step, {answers} of them in answers", flush=True)
    cases = [case for case in CASES if (case.name in options.only if options.only else case.always)]
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["perf.gpu_dpo", *(sys.argv[1:] if words is None else words)]),
        "gpu": gpu(),
        "versions": {name: installed(name) for name in PACKAGES},
        "pairs": len(lengths),
        "tokens": tokens,
        "labels": answers,
        "longest": int((lengths[:, :1] + lengths[:, 1:]).max()),
        "cases": [asdict(case) for case in cases],
    }
    rows: list[dict[str, Any]] = []
    sizes = {"steps": options.steps, "tokens": tokens, "limit": options.limit}
    for row in measure(cases, options.work, recipe=options.recipe, common=common, **sizes):
        rows.append(row)
        found = compared(rows)
        (options.out / "gpu_dpo.json").write_text(json.dumps({**facts, "rows": found}, indent=1) + "\n")
        (options.out / "gpu_dpo.md").write_text(table(found) + "\n")
        print(table(found[-1:]).splitlines()[-1], flush=True)
    print(table(compared(rows)), flush=True)
    return 1 if any(row.get("failed") or row["misses"] for row in compared(rows)) else 0


if __name__ == "__main__":
    sys.exit(main())
