"""Rewards of held-out answers by transformers and PEFT alone: what a run says of itself, computed once more.

    python -m perf.rewards FILE --base FOLDER --adapter RUN/adapter [--beta 0.1]    after dpo, kto and their relatives
    python -m perf.rewards FILE --reward-model RUN/hf                               after rm: a score of each answer

FILE holds pairs (`prompt`, `chosen`, `rejected`) or labelled answers (`prompt`, `completion`, `label`), in plain texts,
which the tokenizer's chat template puts together. Nothing of the training path takes part. Standard errors are those of
independent rows, and say how far another draw of as many rows would lie off.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mcore_swift.errors import EXIT_INPUT, InputError

Row = dict[str, Any]
Reward = Callable[[str, str], float]  # of (prompt, answer)
Figure = tuple[float, float | None]  # with its standard error, where it has one


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.rewards", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path, help="JSON lines")
    parser.add_argument("--base", type=Path, help="the Hugging Face folder that the run started from")
    parser.add_argument("--adapter", type=Path, help="the run's PEFT folder")
    parser.add_argument("--beta", type=float, default=0.1, help="the run's objective.beta; default: %(default)s")
    parser.add_argument("--reward-model", type=Path, help="a folder of AutoModelForSequenceClassification")
    given: Any = parser.parse_args(argv)
    if given.reward_model is None and given.base is not None and given.adapter is not None:
        load = partial(implicit_reward, given.base, given.adapter, beta=given.beta)
    elif given.reward_model is not None and given.base is None and given.adapter is None:
        load = partial(score, given.reward_model)
    else:
        parser.error("give --base and --adapter, or --reward-model")
    try:
        rows = read_rows(given.file)
    except InputError as error:
        print(f"rewards: error: {error}", file=sys.stderr)
        return EXIT_INPUT
    for name, (value, error) in (of_labelled if "label" in rows[0] else of_pairs)(rows, load()).items():
        print(f"{name}: {value:.4f} ± {error:.4f}" if error is not None else f"{name}: {value:.4g}")
    return 0


def read_rows(path: Path) -> list[Row]:
    """The rows, all of one kind. Raises InputError."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None
    kinds = ({"prompt", "chosen", "rejected"}, {"prompt", "completion", "label"})
    if not any(rows and all(kind <= row.keys() for row in rows) for kind in kinds):
        wanted = " or ".join(", ".join(sorted(kind)) for kind in kinds)
        raise InputError(f"{path}: every row needs {wanted}, as texts (the label true or false)")
    return rows


def implicit_reward(base: Path, adapter: Path, *, beta: float) -> Reward:
    """β (log π(answer | prompt) − log π_ref(answer | prompt)); the reference is the model without its adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    loaded: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(loaded, str(adapter)).eval()

    def reward(prompt: str, answer: str) -> float:
        ids, labels = tokens(tokenizer, prompt, answer)
        with torch.no_grad():
            trained = log_probability(model, ids, labels)
            with model.disable_adapter():
                return beta * (trained - log_probability(model, ids, labels))

    return reward


def score(folder: Path) -> Reward:
    """What a reward model gives a chat as the template writes it, with what stands behind the end token, too."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()

    def reward(prompt: str, answer: str) -> float:
        ids, _ = tokens(tokenizer, prompt, answer)
        with torch.no_grad():
            return float(model(input_ids=ids).logits[0, 0])

    return reward


def tokens(tokenizer: Any, prompt: str, answer: str) -> tuple[torch.Tensor, range]:
    """(ids [1, length], the places of the answer's tokens up to its end token) of a chat of two messages."""
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    asked = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    assert whole.startswith(asked), "the chat template renders a question differently once it is answered"
    end = len(whole.rstrip())  # ChatML's newline behind the end token is never generated
    found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, return_tensors="pt")
    inside = [place for place, (a, b) in enumerate(found["offset_mapping"][0].tolist()) if a >= len(asked) and b <= end]
    return found["input_ids"], range(inside[0], inside[-1] + 1)


def log_probability(model: Any, ids: torch.Tensor, labels: range) -> float:
    """Σ log p of the tokens at `labels`, each given all before it."""
    logits = model(input_ids=ids[:, : labels.stop], logits_to_keep=len(labels) + 1).logits[0, :-1]
    wanted = ids[0, labels.start : labels.stop, None]
    return float(logits.double().log_softmax(-1).gather(-1, wanted).sum())


def of_pairs(rows: Sequence[Row], reward: Reward) -> dict[str, Figure]:
    """Accuracy: the share of pairs whose chosen answer has the higher reward. Beside it, what two rules that know
    nothing of the question get."""
    margins = [reward(row["prompt"], row["chosen"]) - reward(row["prompt"], row["rejected"]) for row in rows]
    share = statistics.fmean(margin > 0 for margin in margins)
    return {
        "pairs": (len(rows), None),
        "accuracy": (share, math.sqrt(share * (1 - share) / len(rows))),
        "margin": (statistics.fmean(margins), _standard_error(margins)),
        "accuracy of the longer answer": (_rule(rows, len), None),
        "accuracy of the answer with more lines": (_rule(rows, lambda text: text.count("\n")), None),
    }


def of_labelled(rows: Sequence[Row], reward: Reward) -> dict[str, Figure]:
    """Margin: by how much the mean reward of true answers is above that of false ones.

    Where questions have both kinds of answers, also the mean over these questions: what is said of all answers to a
    question alike is not in its error.
    """
    rewards = [(bool(row["label"]), row["prompt"], reward(row["prompt"], row["completion"])) for row in rows]
    good, bad = ([value for label, _, value in rewards if label is wanted] for wanted in (True, False))
    both = [values for values in _by_question(rewards) if all(values)]
    return {
        "true answers": (len(good), None),
        "false answers": (len(bad), None),
        "reward of true answers": (statistics.fmean(good), _standard_error(good)),
        "reward of false answers": (statistics.fmean(bad), _standard_error(bad)),
        "margin": (
            statistics.fmean(good) - statistics.fmean(bad),
            math.hypot(_standard_error(good), _standard_error(bad)),
        ),
        "a true answer above a false one": (statistics.fmean((a > b) + (a == b) / 2 for a in good for b in bad), None),
        **(_within(both) if len(both) > 1 else {}),
    }


def _within(questions: Sequence[tuple[list[float], list[float]]]) -> dict[str, Figure]:
    margins = [statistics.fmean(true) - statistics.fmean(false) for true, false in questions]
    return {
        "questions with both": (len(questions), None),
        "margin within a question": (statistics.fmean(margins), _standard_error(margins)),
        "true above false within a question": (statistics.fmean(margin > 0 for margin in margins), None),
    }


def _by_question(rewards: Sequence[tuple[bool, str, float]]) -> list[tuple[list[float], list[float]]]:
    """The rewards of each question's true answers, and of its false ones."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for label, question, value in rewards:
        found.setdefault(question, ([], []))[0 if label else 1].append(value)
    return list(found.values())


def _rule(rows: Sequence[Row], value: Callable[[str], float]) -> float:
    """The accuracy of preferring the answer with the larger value; a tie counts a half."""
    both = [(value(row["chosen"]), value(row["rejected"])) for row in rows]
    return statistics.fmean((chosen > rejected) + (chosen == rejected) / 2 for chosen, rejected in both)


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


if __name__ == "__main__":
    raise SystemExit(main())
