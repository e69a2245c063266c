"""From a row to the text that the model sees and the spans of it that it learns.

A span is found in characters of the rendered text, never by tokenizing pieces, so the tokens are exactly those that
inference produces from the same conversation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from mcore_swift.data.sources import Layout, Row
from mcore_swift.data.spans import Message, UnstableTemplate, assistant_spans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"} | {role: role for role in ROLES}


class RowError(ValueError):
    """A row can't be used; the message says why."""


@dataclass(frozen=True)
class Rendered:
    """Text with the character ranges [start, end) whose tokens count in the loss.

    `raw`: not from a chat template, so the tokenizer adds its own special tokens and a final EOS.
    """

    text: str
    spans: list[tuple[int, int]]
    raw: bool = False


class Renderer:
    """Renders rows with a tokenizer's chat template (or without, where rows or tokenizer have none)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.constants = dict(tokenizer.special_tokens_map)
        self.special = tuple(token.content for token in tokenizer.added_tokens_decoder.values())

    def __call__(self, row: Row, layout: Layout) -> Rendered:
        """Raises RowError with the reason when the row can't be used."""
        match layout.format:
            case "text":
                text = _string(row, layout.columns[0])
                return Rendered(text, [(0, len(text))], raw=True)
            case "prompt_response":
                return self.pair(row, *layout.columns)
            case _:
                messages = read_messages(row.get(layout.columns[0]))
                return self.chat(messages, tools=row.get("tools") or None)

    def pair(self, row: Row, prompt_column: str, response_column: str) -> Rendered:
        """One question, one answer; Alpaca's optional `input` column follows the instruction on its own line."""
        prompt, response = _string(row, prompt_column), _string(row, response_column)
        if prompt_column == "instruction" and row.get("input"):
            prompt += "\n" + _string(row, "input")
        if self.tokenizer.chat_template is None:
            return Rendered(prompt + response, [(len(prompt), len(prompt) + len(response))], raw=True)
        return self.chat([{"role": "user", "content": prompt}, {"role": "assistant", "content": response}])

    def chat(self, messages: list[Message], *, tools: Any = None) -> Rendered:
        """A conversation in the tokenizer's template; every assistant turn is a span, its end token included."""
        if self.tokenizer.chat_template is None:
            raise RowError("the tokenizer has no chat template (data.chat_template takes a Jinja file)")
        template = self.tokenizer.get_chat_template(tools=tools)
        if re.search(r"\{%-?\s*generation\s*-?%\}", template):
            full, spans = self._render(messages, tools, template, marked=True)
        else:
            try:
                full, spans = assistant_spans(
                    messages,
                    lambda part, prompt: self._render(part, tools, template, prompt=prompt)[0],
                    special=self.special,
                )
            except UnstableTemplate as error:
                raise RowError(str(error)) from error
        return Rendered(full, spans)

    def _render(
        self, messages: list[Message], tools: Any, template: str, *, prompt: bool = False, marked: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = cast(
                tuple[list[str], list[list[tuple[int, int]]]],
                render_jinja_template(
                    [messages],
                    tools=tools,
                    chat_template=template,
                    add_generation_prompt=prompt,
                    return_assistant_tokens_mask=marked,
                    **cast(Any, self.constants),
                ),
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise RowError(f"the chat template refuses the conversation: {error}") from error
        return texts[0], spans[0] if marked else []


def read_messages(value: Any) -> list[Message]:
    """The messages of a row in OpenAI's or ShareGPT's form, checked, without the nulls that columns leave.

    Raises RowError: none, unknown role, content that is no string, an assistant that starts or never speaks.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise RowError("messages is empty" if not value else f"messages is a {type(value).__name__}, not a list")
    messages = [_read_message(message, number) for number, message in enumerate(value, start=1)]
    spoken = [message for message in messages if message["role"] != "system"]
    if spoken and spoken[0]["role"] == "assistant":
        raise RowError("the conversation starts with the assistant")
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise RowError("no assistant turn: nothing to learn")
    if not any(answer["content"].strip() or answer.get("tool_calls") for answer in answers):
        raise RowError("no assistant tokens: every assistant turn is empty")
    return messages


def _read_message(value: Any, number: int) -> Message:
    if not isinstance(value, dict):
        raise RowError(f"message {number} is a {type(value).__name__}, not an object")
    message = {key: item for key, item in value.items() if item is not None}
    if "from" in message and "role" not in message:
        role = message.pop("from")
        message = {"role": SHAREGPT_ROLES.get(role, role), "content": message.pop("value", None), **message}
    if message.get("role") not in ROLES:
        raise RowError(f"message {number} has the unknown role {message.get('role')!r} (known: {', '.join(ROLES)})")
    if message.get("content") is None and message.get("tool_calls"):
        message["content"] = ""
    if not isinstance(message.get("content"), str):
        raise RowError(f"message {number}: content is {_kind(message.get('content'))}, not a string")
    return message


def _string(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise RowError(f"{column} is {_kind(value)}, not a string")
    if not value.strip():
        raise RowError(f"{column} is empty")
    return value


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
