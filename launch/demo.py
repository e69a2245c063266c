"""`make demo`: adapters for a real model are trained by Megatron-Core; it answers a question before and after.

Fails (exit code 1) unless the loss went down, transformers opens the merged model and PEFT the adapter, and the two are
the same model; wrong surroundings exit with 2.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mcore_swift.errors import EXIT_FAILED, EXIT_INPUT, InputError

RECIPE = Path(__file__).parent / "recipes" / "demo.yaml"
RUN = Path("runs/demo")  # the recipe's checkpoint.dir
COMPARED_STEPS = 5
# The merged model's weights are bf16, as the base's: each is rounded once more than base and adapter apart.
LARGEST_DIFFERENCE = 0.02  # of the log-probabilities of the true answer, nats a token in the mean

# From GSM8K's training part, but not among the rows of the demo.
QUESTION = (
    "In mid-May, the depth of a river in Moreland is measured. By mid-June, the river is 10 feet deeper than mid-May. "
    "By mid-July, the river is three times deeper than mid-June. If the river is 45 feet deep in mid-July, how many "
    "feet deep was the river in mid-May?"
)
ANSWER = "In mid-June, the river is 45/3=15 feet deep.\nIn mid-May, the river was 15-10=5 feet deep.\n#### 5"


def main() -> int:
    started = time.monotonic()
    try:
        from ckpt_tools.smollm2 import smollm2_folder

        _heading("The model: SmolLM2-135M-Instruct")
        folder = smollm2_folder()
        print(folder)
    except InputError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return EXIT_INPUT
    before = answer(folder, QUESTION)

    _heading("Training")
    code = train(folder)
    if code:
        print(f"demo: training ended with exit code {code}", file=sys.stderr)
        return code
    first, last = mean_losses(RUN / "metrics.jsonl")
    after = answer(RUN / "hf", QUESTION)
    merged, adapted = answer_loss(RUN / "hf"), answer_loss(folder, RUN / "adapter")

    for title, text in (("The question", QUESTION), ("Before", before), ("After", after), ("GSM8K's answer", ANSWER)):
        _heading(title)
        print(text)
    _heading("Result")
    print('A model this small learns the form of the answers in 16 steps ("#### 5" at the end), not the arithmetic.')
    print(f"mean loss of the first {COMPARED_STEPS} steps {first:.4f}, of the last {COMPARED_STEPS} {last:.4f}")
    print(f"GSM8K's answer: {answer_loss(folder):.4f} nats a token before, {merged:.4f} after")
    print(f"the merged model, opened by transformers above: {RUN / 'hf'}")
    print(f"the adapter, {adapted:.4f} nats a token through peft on the base model: {RUN / 'adapter'}")
    print(f"took {time.monotonic() - started:.0f} s")
    for wrong, what in (
        (not last < first, "the loss did not go down"),
        (not abs(merged - adapted) < LARGEST_DIFFERENCE, "the adapter and the merged model are not the same"),
    ):
        if wrong:
            print(f"demo: failed: {what}", file=sys.stderr)
            return EXIT_FAILED
    return 0


def train(folder: Path) -> int:
    """Runs the recipe as a user would, anew each time; returns the exit code."""
    command = [sys.executable, "-m", "mcore_swift.cli", "train", str(RECIPE), "--model.path", str(folder)]
    command += ["--checkpoint.resume", "never", "--checkpoint.overwrite", "true"]
    return subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode


def mean_losses(metrics: Path) -> tuple[float, float]:
    """The mean loss (nats a token) of the first and of the last five steps of a run's metrics.jsonl."""
    from mcore_swift.training.metrics import read_metrics

    losses = [row["loss"] for row in read_metrics(metrics) if "loss" in row]
    assert len(losses) >= 2 * COMPARED_STEPS, f"{metrics}: {len(losses)} steps are too few to compare"
    return sum(losses[:COMPARED_STEPS]) / COMPARED_STEPS, sum(losses[-COMPARED_STEPS:]) / COMPARED_STEPS


def opened(folder: Path, adapter: Path | None = None) -> tuple[Any, Any]:
    """(tokenizer, model) of a Hugging Face folder through transformers, in float32; with PEFT's adapter, if one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    return AutoTokenizer.from_pretrained(folder), model


def answer_loss(folder: Path, adapter: Path | None = None) -> float:
    """Nats a token of GSM8K's answer to the question."""
    import torch

    tokenizer, model = opened(folder, adapter)
    chat = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    asked, whole = (
        tokenizer.apply_chat_template(part, add_generation_prompt=prompt, return_tensors="pt", return_dict=True)
        for part, prompt in ((chat[:1], True), (chat, False))
    )
    labels = whole["input_ids"].clone()
    labels[:, : asked["input_ids"].shape[1]] = -100
    with torch.no_grad():
        return float(model(**whole, labels=labels).loss)


def answer(folder: Path, question: str, *, max_new_tokens: int = 120) -> str:
    """The greedy answer of a Hugging Face folder."""
    tokenizer, model = opened(folder)
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def _heading(title: str) -> None:
    print(f"\n== {title} ==", flush=True)


if __name__ == "__main__":
    sys.exit(main())
