"""The forms in which people have pairs and labelled answers, and which of their tokens count."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mcore_swift.data.chat import RowError
from mcore_swift.data.judged import read_judged
from mcore_swift.data.sources import find_layout
from mcore_swift.data.tokenized import Encoder, encode_rows
from mcore_swift.data.validate import validate
from mcore_swift.errors import InputError


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASK, GOOD, BAD = says("user", "Two and two?"), says("assistant", "Four."), says("assistant", "Five.")
TALK = [says("user", "Hi"), says("assistant", "Hello"), ASK]
HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Two and two?\n\nAssistant:"
PAIRS = {
    "ms-swift": {"messages": [*TALK, GOOD], "rejected_messages": [*TALK, BAD]},
    "ms-swift-response": {"messages": [*TALK, GOOD], "rejected_response": "Five."},
    "trl-chat": {"prompt": TALK, "chosen": [GOOD], "rejected": [BAD]},
    "trl-chat-implicit": {"chosen": [*TALK, GOOD], "rejected": [*TALK, BAD]},
    "trl-prompt-beside-whole": {"prompt": "Two and two?", "chosen": [*TALK, GOOD], "rejected": [*TALK, BAD]},
    "prompt-chat-text": {"prompt": TALK, "chosen": "Four.", "rejected": "Five."},
    "hh": {"chosen": HH + " Four.", "rejected": HH + " Five."},
    "hh-prompt": {"prompt": HH, "chosen": " Four.", "rejected": " Five."},
    "sharegpt": {
        "conversations": [
            {"from": "gpt" if m["role"] == "assistant" else "human", "value": m["content"]} for m in TALK
        ],
        "chosen": {"from": "gpt", "value": "Four."},
        "rejected": {"from": "gpt", "value": "Five."},
    },
}
PLAIN = {"prompt": "Two and two?", "chosen": "Four.", "rejected": "Five."}


def encoded(tokenizer: Any, row: dict[str, Any], format: str = "preference") -> tuple[list[tuple[str, str]], Any]:
    """(text, learned text) of each of the row's answers, read back from the tokens; and what the row says of them."""
    problems: list[str] = []
    layout = find_layout(row, format=format, file=Path("rows.jsonl"))
    rows = list(encode_rows([row], layout, Encoder(tokenizer), report=lambda _, reason: problems.append(reason)))
    assert not problems, problems
    [(tokens, loss, judged, _)] = rows
    assert judged is not None
    parts = [slice(0, int(judged[0])), slice(int(judged[0]), None)]
    texts = [(tokenizer.decode(tokens[p]), tokenizer.decode(tokens[p][loss[p] == 1])) for p in parts if len(tokens[p])]
    return texts, judged[1:].tolist()


@pytest.mark.parametrize("form", PAIRS)
def test_every_form_of_a_pair_gives_the_same_tokens(tokenizer: Any, form: str):
    answers, said = encoded(tokenizer, PAIRS[form])
    expected = [tokenizer.apply_chat_template([*TALK, answer], tokenize=False) for answer in (GOOD, BAD)]
    assert [text for text, _ in answers] == expected
    assert [learned for _, learned in answers] == ["Four.<|im_end|>", "Five.<|im_end|>"]  # "Hello" doesn't count
    assert all(math.isnan(value) for value in said)


@pytest.mark.slow
def test_tokens_are_those_of_trl(tokenizer: Any):
    """TRL 1.16 DPOTrainer: prompt_ids is the common beginning of the tokenized prompt and conversation. It counts white
    space after the end token, too, at which inference has stopped."""
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    row = PAIRS["trl-chat"]
    args = DPOConfig(max_length=None, use_cpu=True, bf16=False)
    from datasets import Dataset

    class Bare(DPOTrainer):
        def __init__(self) -> None:
            self._tokenizer = tokenizer

    theirs: Any = next(iter(Bare()._prepare_dataset(Dataset.from_list([row]), tokenizer, args, "train")))
    layout = find_layout(row, format="preference", file=Path("rows.jsonl"))
    [ours] = encode_rows([row], layout, Encoder(tokenizer), report=lambda *_: None)
    assert ours.judged is not None
    middle = int(ours.judged[0])
    newline = tokenizer("\n")["input_ids"]
    for part, name in ((slice(0, middle), "chosen_ids"), (slice(middle, None), "rejected_ids")):
        tokens, loss = ours.tokens[part].tolist(), ours.loss[part]
        assert tokens == theirs["prompt_ids"] + theirs[name]
        counted = [token for token, counts in zip(tokens, loss, strict=True) if counts]
        assert counted + newline == theirs[name]


def test_a_plain_pair_uses_the_template_and_without_one_the_texts(tokenizer: Any):
    answers, _ = encoded(tokenizer, PLAIN)
    assert answers[0][0] == tokenizer.apply_chat_template([ASK, GOOD], tokenize=False)
    tokenizer.chat_template = None
    answers, _ = encoded(tokenizer, PLAIN)
    assert answers == [(f"Two and two?{n}.<|endoftext|>", f"{n}.<|endoftext|>") for n in ("Four", "Five")]
    answers, _ = encoded(tokenizer, PAIRS["hh"])
    assert answers[1] == (HH + " Five.<|endoftext|>", " Five.<|endoftext|>")
    labelled = {"prompt": "Two and two?", "completion": "Four.", "label": True}
    assert encoded(tokenizer, labelled, "labelled")[0] == [("Two and two?Four.<|endoftext|>", "Four.<|endoftext|>")]


def test_margin_weight_and_system(tokenizer: Any):
    row = PLAIN | {"margin": 2, "weight": 0.5, "system": "Count."}
    answers, said = encoded(tokenizer, row)
    assert said[:2] == [2.0, 0.5] and math.isnan(said[2])
    assert answers[0][0] == tokenizer.apply_chat_template([says("system", "Count."), ASK, GOOD], tokenize=False)
    assert encoded(tokenizer, PLAIN | {"margin": None, "weight": None})[1][:2] == [0.0, 1.0]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [*TALK, GOOD], "label": False},
        {"prompt": TALK, "completion": [GOOD], "label": False},
        {"prompt": TALK, "completion": "Four.", "label": False},
    ],
    ids=["messages", "trl-chat", "prompt-chat-text"],
)
def test_labelled_answers(tokenizer: Any, row: dict[str, Any]):
    answers, said = encoded(tokenizer, row, "labelled")
    assert answers == [(tokenizer.apply_chat_template([*TALK, GOOD], tokenize=False), "Four.<|im_end|>")]
    assert said[2] == 0.0 and encoded(tokenizer, row | {"label": True}, "labelled")[1][2] == 1.0


def test_an_answer_may_use_tools(tokenizer: Any):
    """What the tool says is part of the sequence, but not learned."""
    calls = [
        [says("assistant", f"add {n}"), says("tool", f"result {n}"), answer] for n, answer in ((2, GOOD), (3, BAD))
    ]
    answers, _ = encoded(tokenizer, {"prompt": TALK, "chosen": calls[0], "rejected": calls[1]})
    assert [learned for _, learned in answers] == ["add 2<|im_end|>Four.<|im_end|>", "add 3<|im_end|>Five.<|im_end|>"]


def test_templates_with_marks(tokenizer: Any):
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>"
        "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    answers, _ = encoded(tokenizer, PAIRS["ms-swift"])
    assert [learned for _, learned in answers] == ["Four.<|im_end|>", "Five.<|im_end|>"]
    tokenizer.chat_template = tokenizer.chat_template.replace("== 'assistant'", "== 'assistant' and loop.last")
    with pytest.raises(AssertionError, match="marks 1 ranges for 2 assistant turns"):
        encoded(tokenizer, PAIRS["ms-swift"])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        pytest.param({"messages": [*TALK, GOOD], "rejected_messages": None}, "rejected_messages is missing", id="side"),
        pytest.param({**PLAIN, "rejected": None}, "rejected is missing", id="text-side"),
        pytest.param({**PLAIN, "chosen": "  "}, "chosen is empty", id="empty-side"),
        pytest.param({**PLAIN, "prompt": ""}, "prompt is missing", id="prompt"),
        pytest.param({**PLAIN, "rejected": 5}, "rejected is a int, not a list of messages", id="number"),
        pytest.param(
            {"messages": [*TALK, GOOD], "rejected_messages": [says("user", "Hey"), *TALK[1:], BAD]},
            "different prompts: chosen and rejected part at message 1, which isn't the last answer",
            id="prompts",
        ),
        pytest.param(
            {"chosen": [TALK[0], GOOD, ASK, GOOD], "rejected": [TALK[0], BAD, ASK, GOOD]},
            "part at message 2, which isn't the last answer (chosen goes on with assistant, user, assistant)",
            id="earlier-answer",
        ),
        pytest.param(
            {"prompt": "Three?", "chosen": [*TALK, GOOD], "rejected": [*TALK, BAD]},
            "different prompts: prompt is no message of chosen",
            id="prompt-beside",
        ),
        pytest.param(
            {"messages": [*TALK, GOOD], "rejected_messages": TALK},
            "rejected_messages ends with the user, not with the assistant's answer",
            id="no-answer",
        ),
        pytest.param({"chosen": "Four.", "rejected": "Five."}, "chosen is a text without its prompt", id="no-prompt"),
        pytest.param(PLAIN | {"margin": "big"}, "margin is 'big'; it must be a finite number", id="margin"),
        pytest.param(PLAIN | {"weight": -1}, "weight is -1; it must be a finite number of at least 0", id="weight"),
        pytest.param({"messages": [ASK, GOOD], "label": 1}, "label is 1; it must be true (desirable)", id="label"),
        pytest.param({"messages": [ASK, GOOD], "label": "yes"}, "label is 'yes'; it must be true", id="label-text"),
        pytest.param({"messages": [ASK, GOOD], "label": None}, "label is missing", id="no-label"),
    ],
)
def test_bad_rows(tokenizer: Any, jsonl: Callable[..., Path], row: dict[str, Any], reason: str):
    format = "labelled" if "label" in row else "preference"
    good = {key: value for key, value in row.items() if key not in ("rejected_messages", "label")}
    with pytest.raises(RowError) as caught:
        read_judged(row, find_layout(row, format=format, file=Path("rows.jsonl")))
    assert reason in str(caught.value)
    first = {"label": True, "messages": [ASK, GOOD]} if format == "labelled" else dict.fromkeys(good) | row
    for settings in ({}, {"tokenizer": tokenizer}):
        problems = validate([jsonl(first, "", row)], format=format, **settings)
        assert problems[-1].row == 3 and reason in problems[-1].reason


def test_validate_finds_these_formats_and_every_bad_row(jsonl: Callable[..., Path], tokenizer: Any, fixtures: Path):
    row = PAIRS["ms-swift"]
    equal = row | {"rejected_messages": row["messages"]}
    for settings in ({}, {"tokenizer": tokenizer}):
        problems = validate([jsonl(row, equal, "{", {"messages": row["messages"]}, row)], **settings)
        assert [problem.row for problem in problems] == [2, 3, 4]
        assert "chosen and rejected are the same answer" in problems[0].reason
        assert problems[2].reason == "rejected_messages is missing"
        labelled = [{"messages": [ASK, GOOD], "label": label} for label in (True, "no", False, 0)]
        assert [problem.row for problem in validate([jsonl(*labelled)], **settings)] == [2, 4]
        assert validate([fixtures / "gsm8k_preference.jsonl", fixtures / "gsm8k_labelled.jsonl"], **settings) == []
    problems = validate([jsonl(row)], tokenizer=tokenizer, sequence_length=20)
    assert len(problems) == 1 and "more than the sequence length 20" in problems[0].reason


def test_columns_that_are_missing(jsonl: Callable[..., Path]):
    with pytest.raises(InputError, match="found prompt, chosen; needed messages \\+ rejected_messages or messages"):
        find_layout(["prompt", "chosen"], format="preference", file=Path("rows.jsonl"))


@pytest.mark.parametrize("format", ["chosen", "messages"])
def test_plain_rows_have_weights(tokenizer: Any, format: str):
    row = PAIRS["trl-chat"] if format == "chosen" else {"messages": [*TALK, GOOD]}
    layout = find_layout(row, format=format, file=Path("rows.jsonl"))
    encoder = Encoder(tokenizer)
    assert [encoder.read(row | {"weight": w}, layout).weight for w in (2.5, 0, None)] == [2.5, 0.0, 1.0]
    assert encoder.read(row, layout).weight == 1.0
    with pytest.raises(RowError, match="weight is -1; it must be a finite number of at least 0"):
        encoder.read(row | {"weight": -1}, layout)


def test_only_chosen_answers(tokenizer: Any):
    """data.format: chosen gives plain rows, for sft."""
    row = PAIRS["trl-chat"]
    layout = find_layout(row, format="chosen", file=Path("rows.jsonl"))
    [(tokens, loss, judged, _)] = encode_rows([row], layout, Encoder(tokenizer), report=lambda *_: None)
    assert judged is None and tokenizer.decode(tokens) == tokenizer.apply_chat_template([*TALK, GOOD], tokenize=False)
    assert tokenizer.decode(np.array(tokens)[loss == 1]) == "Four.<|im_end|>"
