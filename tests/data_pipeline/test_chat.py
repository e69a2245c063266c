"""Which tokens of a conversation count in the loss, for templates of every habit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mcore_swift.data import spans
from mcore_swift.data.chat import Renderer, RowError, read_messages
from mcore_swift.data.sources import Layout
from mcore_swift.data.tokenized import Encoder

MESSAGES = Layout("messages", ("messages",))
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "  Hello there "},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you"},
]
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}"
    "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen3's habit: an empty <think> before the last answer only, white space trimmed, thoughts of earlier turns removed.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'].split('</think>')[-1].strip() }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SPECIAL = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
COUNTING = "{{ messages | length }} messages\n" + NO_SPECIAL  # what comes before a turn changes, but not around it
LAST_DIFFERS = "{% for m in messages %}{{ 'B:' if not loop.last else 'A:' }}{{ m['content'] }}{% endfor %}A:"
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
)


def learned(tokenizer: Any, messages: list[dict[str, Any]], **extra: Any) -> list[str]:
    """The texts of the learned ranges, read back from the tokens."""
    encoder = Encoder(tokenizer)
    [(tokens, loss)] = encoder([encoder.render({"messages": messages, **extra}, MESSAGES)])
    pieces: list[list[int]] = []
    for token, before, counts in zip(tokens.tolist(), [0, *loss[:-1].tolist()], loss.tolist(), strict=True):
        if counts:
            pieces = [*pieces, [token]] if not before else [*pieces[:-1], [*pieces[-1], token]]
    return [tokenizer.decode(piece) for piece in pieces]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        pytest.param(None, ["  Hello there <|im_end|>", "See you<|im_end|>"], id="chatml-default-system"),
        pytest.param(MARKED, ["  Hello there <|im_end|>", "See you<|im_end|>"], id="generation-marks"),
        pytest.param(THINKING, ["Hello there<|im_end|>", "<think>\n\n</think>\n\nSee you<|im_end|>"], id="thinking"),
        pytest.param(NO_SPECIAL, ["  Hello there \n", " See you\n"], id="token-over-the-edge"),
        pytest.param(COUNTING, ["  Hello there \n", " See you\n"], id="counting"),
    ],
)
def test_assistant_turns_and_their_end_tokens_are_learned(tokenizer: Any, template: str | None, expected: list[str]):
    tokenizer.chat_template = template or tokenizer.chat_template
    assert learned(tokenizer, TALK) == expected


def test_tokens_are_those_of_the_whole_conversation(tokenizer: Any):
    encoder = Encoder(tokenizer)
    [(tokens, _)] = encoder([encoder.render({"messages": TALK}, MESSAGES)])
    assert tokens.tolist() == tokenizer.apply_chat_template(TALK, return_dict=True)["input_ids"]


def test_marked_template_agrees_with_transformers_own_mask(tokenizer: Any):
    tokenizer.chat_template = MARKED
    encoder = Encoder(tokenizer)
    [(_, loss)] = encoder([encoder.render({"messages": TALK}, MESSAGES)])
    reference = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    assert loss.tolist() == reference["assistant_masks"]


def test_thoughts_of_an_earlier_turn_are_not_learned_where_the_template_drops_them(tokenizer: Any):
    tokenizer.chat_template = THINKING
    talk = [TALK[0], {"role": "assistant", "content": "<think>hm</think>Hello"}, *TALK[2:]]
    assert learned(tokenizer, talk)[0] == "Hello<|im_end|>"


def test_content_that_repeats_the_template_is_not_mistaken_for_it(tokenizer: Any):
    talk = [TALK[0], {"role": "assistant", "content": "<|im_end|>\n<|im_start|>assistant\nx"}, *TALK[2:]]
    assert learned(tokenizer, talk) == ["<|im_end|>\n<|im_start|>assistant\nx<|im_end|>", "See you<|im_end|>"]


@pytest.mark.parametrize("template", [None, THINKING, NO_SPECIAL])
def test_marks_find_the_same_spans_as_prefixes(
    tokenizer: Any, fixtures: Path, monkeypatch: pytest.MonkeyPatch, template: str | None
):
    tokenizer.chat_template = template or tokenizer.chat_template
    rows = [json.loads(line) for line in (fixtures / "chat.jsonl").open()]
    render = Renderer(tokenizer)
    fast = [render(row, MESSAGES) for row in rows]
    monkeypatch.setattr(spans, "_from_marks", lambda messages, turns, render, full: [None] * len(turns))
    assert [render(row, MESSAGES) for row in rows] == fast


def test_system_tool_and_tools_column_are_rendered_but_not_learned(tokenizer: Any):
    tokenizer.chat_template = "{{ tools | tojson if tools }}" + tokenizer.chat_template
    talk = [
        {"role": "system", "content": "Sys"},
        TALK[0],
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "content": "42"},
        TALK[3],
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    rendered = Renderer(tokenizer)({"messages": talk, "tools": tools}, MESSAGES)
    assert rendered.text.startswith('[{"type": "function"') and "42<|im_end|>" in rendered.text
    assert learned(tokenizer, talk, tools=tools) == ["<|im_end|>", "See you<|im_end|>"]


def test_unstable_template_is_refused_with_the_way_out(tokenizer: Any):
    tokenizer.chat_template = LAST_DIFFERS
    with pytest.raises(RowError, match=r"no \{% generation %\} marks and message 2 can't be told apart"):
        learned(tokenizer, TALK)


def test_consecutive_roles_are_bad_only_where_the_template_says_so(tokenizer: Any):
    talk = [TALK[0], TALK[0], TALK[1]]
    assert learned(tokenizer, talk) == ["  Hello there <|im_end|>"]
    tokenizer.chat_template = STRICT
    with pytest.raises(RowError, match="the chat template refuses the conversation: roles must alternate"):
        learned(tokenizer, talk)


def test_sharegpt_and_alpaca_rows(tokenizer: Any):
    render = Renderer(tokenizer)
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    a = render({"conversations": talk}, Layout("messages", ("conversations",)))
    b = render({"prompt": "Hi", "response": "Hello"}, Layout("prompt_response", ("prompt", "response")))
    assert a == b and a.text[slice(*a.spans[0])] == "Hello<|im_end|>"
    c = render(
        {"instruction": "Add", "input": "1 2", "output": "3"}, Layout("prompt_response", ("instruction", "output"))
    )
    assert "<|im_start|>user\nAdd\n1 2<|im_end|>" in c.text


def test_pairs_and_texts_without_a_template_end_with_eos(tokenizer: Any):
    tokenizer.chat_template = None
    encoder = Encoder(tokenizer)
    pair = encoder.render({"prompt": "1+1=", "response": "2"}, Layout("prompt_response", ("prompt", "response")))
    text = encoder.render({"text": "abc"}, Layout("text", ("text",)))
    (tokens, loss), (all_tokens, all_loss) = encoder([pair, text])
    assert tokenizer.decode(tokens[loss == 1]) == "2<|endoftext|>"
    assert tokenizer.decode(all_tokens) == "abc<|endoftext|>" and all_loss.all()


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "messages is empty"),
        (None, "messages is empty"),
        ("hi", "messages is a str, not a list"),
        ([{"role": "bot", "content": "x"}], "message 1 has the unknown role 'bot'"),
        ([TALK[1], TALK[0]], "the conversation starts with the assistant"),
        ([{"role": "system", "content": "s"}, TALK[1]], "the conversation starts with the assistant"),
        ([TALK[0]], "no assistant turn"),
        ([TALK[0], {"role": "assistant", "content": " "}], "no assistant tokens"),
        ([{"role": "user", "content": 5}, TALK[1]], "message 1: content is a int, not a string"),
        ([{"role": "user"}, TALK[1]], "message 1: content is missing, not a string"),
        ([TALK[0], ["x"]], "message 2 is a list, not an object"),
    ],
)
def test_bad_conversations_name_their_fault(messages: Any, reason: str):
    with pytest.raises(RowError) as caught:
        read_messages(messages)
    assert reason in str(caught.value)
