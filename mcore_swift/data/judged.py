"""Rows whose answers are compared, or judged one by one: from the forms people have to conversations.

A pair is two conversations that part at an answer: the messages up to there are its prompt, and only what the
assistant says from there on counts in the loss. So a prompt needs no column of its own, and a pair whose prompts differ
is noticed.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from mcore_swift.data.chat import Rendered, RowError, read_messages
from mcore_swift.data.sources import Layout, Row

if TYPE_CHECKING:
    from mcore_swift.data.chat import Renderer
    from mcore_swift.data.spans import Message

HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
EQUAL = "chosen and rejected are the same answer (data.equal_pairs: drop leaves such pairs out)"


class Judgement(NamedTuple):
    """What a row says of its answers; NaN: nothing. label: 1 desirable, 0 undesirable."""

    margin: float
    weight: float
    label: float


@dataclass(frozen=True)
class Conversation:
    """Messages of which those from number `answer` (0-based) on are the answer."""

    messages: list[Message]
    answer: int


@dataclass(frozen=True)
class JudgedRow:
    """A row's answers (the preferred one first) in their conversations, or one labelled answer."""

    conversations: list[Conversation]
    judgement: Judgement
    tools: Any = None

    @property
    def equal(self) -> bool:
        return len(self.conversations) == 2 and self.conversations[0] == self.conversations[1]


class JudgedText(NamedTuple):
    """A judged row as text: one Rendered an answer, whose spans are those of the answer."""

    texts: list[Rendered]
    judgement: Judgement


def read_judged(row: Row, layout: Layout) -> JudgedRow:
    """The row's conversations, checked. Raises RowError with the reason when it can't be used."""
    judgement = Judgement(_number(row, "margin"), weight_of(row), math.nan)
    tools = row.get("tools") or None
    if "label" in layout.columns:
        label = row.get("label")
        if not isinstance(label, bool):
            found = "missing" if label is None else repr(label)
            raise RowError(f"label is {found}; it must be true (desirable) or false (undesirable)")
        whole = _with_system(row, _labelled(row, layout.columns))
        return JudgedRow([Conversation(whole, _last_answer(whole))], judgement._replace(label=float(label)), tools)
    chosen, rejected = (_with_system(row, side) for side in _sides(row, layout.columns))
    answer = _parting(chosen, rejected)
    return JudgedRow([Conversation(chosen, answer), Conversation(rejected, answer)], judgement, tools)


def render_judged(renderer: Renderer, row: Row, layout: Layout) -> JudgedText:
    """The texts of a row's answers with their prompts. Raises RowError.

    With a chat template the conversation is rendered by it, plain prompts and HH's texts too. Without one only plain
    texts can be used: as they are, with an EOS behind the answer.
    """
    judged = read_judged(row, layout)
    if renderer.tokenizer.chat_template is None:
        return JudgedText(
            [_plain(row, layout, number) for number in range(len(judged.conversations))], judged.judgement
        )
    return JudgedText([_render(renderer, c, judged.tools) for c in judged.conversations], judged.judgement)


def _render(renderer: Renderer, conversation: Conversation, tools: Any) -> Rendered:
    rendered = renderer.chat(conversation.messages, tools=tools)
    turns = [number for number, m in enumerate(conversation.messages) if m["role"] == "assistant"]
    if len(rendered.spans) != len(turns):  # only with {% generation %} marks, which a template may set as it likes
        raise RowError(
            f"the chat template marks {len(rendered.spans)} ranges for {len(turns)} assistant turns: which of them "
            "belong to the answer can't be told"
        )
    spans = [span for span, turn in zip(rendered.spans, turns, strict=True) if turn >= conversation.answer]
    return Rendered(rendered.text, spans)


def _plain(row: Row, layout: Layout, number: int) -> Rendered:
    """Answer `number` behind its prompt, without a template."""
    columns = [column for column in layout.columns if column not in ("prompt", "label")]
    prompt, answer = row.get("prompt") if "prompt" in layout.columns else "", row.get(columns[number])
    if not isinstance(prompt, str) or not isinstance(answer, str):
        raise RowError("the tokenizer has no chat template (data.chat_template takes a Jinja file)")
    if not prompt:
        cut = [found.end() for found in HH_TURN.finditer(answer)][-1]
        prompt, answer = answer[:cut], answer[cut:]
    return Rendered(prompt + answer, [(len(prompt), len(prompt) + len(answer))], raw=True)


# --- the forms ------------------------------------------------------------------------------------------------------


def _sides(row: Row, columns: tuple[str, ...]) -> tuple[list[Message], list[Message]]:
    """The chosen and the rejected conversation, prompt included."""
    match columns:
        case ("messages", "rejected_messages"):
            return _conversation(row, "messages"), _conversation(row, "rejected_messages")
        case ("messages", "rejected_response"):
            chosen = _conversation(row, "messages")
            return chosen, [*chosen[:-1], {"role": "assistant", "content": _answer(row, "rejected_response")}]
        case (prompt, chosen, rejected):
            return _side(row, prompt, chosen), _side(row, prompt, rejected)
        case _:
            return _whole(row, columns[0]), _whole(row, columns[1])


def _labelled(row: Row, columns: tuple[str, ...]) -> list[Message]:
    if columns[0] == "messages":
        return _conversation(row, "messages")
    return _side(row, columns[0], columns[1])


def _conversation(row: Row, column: str, before: list[Any] | None = None) -> list[Message]:
    """The column's messages behind those of `before`; the last one is the assistant's."""
    value = row.get(column)
    if value is None or value == []:
        raise RowError(f"{column} is missing")
    if isinstance(value, dict):  # a single message
        value = [value]
    if not isinstance(value, list):
        raise RowError(f"{column} is a {type(value).__name__}, not a list of messages")
    try:
        messages = read_messages([*(before or []), *value])
    except RowError as error:
        raise RowError(f"{column}: {error}") from error
    last = messages[-1]
    if last["role"] != "assistant":
        raise RowError(f"{column} ends with the {last['role']}, not with the assistant's answer")
    if not last["content"].strip() and not last.get("tool_calls"):
        raise RowError(f"{column}: the answer is empty")
    return messages


def _side(row: Row, prompt_column: str, column: str) -> list[Message]:
    """An answer behind a prompt that has a column of its own; both are texts or messages."""
    prompt, side = row.get(prompt_column), row.get(column)
    if isinstance(prompt, str) and isinstance(side, list) and side and _speaks_first(side[0]) != "assistant":
        whole = _conversation(row, column)  # the prompt is repeated beside the whole conversation
        if all(message["content"] != prompt for message in whole):
            raise RowError(f"different prompts: {prompt_column} is no message of {column}")
        return whole
    if isinstance(prompt, str) and HH_TURN.search(prompt) and isinstance(side, str):
        return _read_hh(prompt + _answer(row, column), column)
    if isinstance(prompt, str) and prompt.strip():
        before: list[Any] = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, list) and prompt:
        before = prompt
    else:
        raise RowError(f"{prompt_column} is missing")
    if isinstance(side, str):
        answer = {"role": "assistant", "content": _answer(row, column)}
        return _conversation({column: [answer]}, column, before)
    return _conversation(row, column, before)


def _whole(row: Row, column: str) -> list[Message]:
    """A conversation that holds its prompt: messages, or one of HH's texts."""
    value = row.get(column)
    if not isinstance(value, str):
        return _conversation(row, column)
    if not HH_TURN.search(value):
        raise RowError(f"{column} is a text without its prompt: a column prompt is needed, or \\n\\nHuman: in the text")
    return _read_hh(value, column)


def _read_hh(text: str, column: str) -> list[Message]:
    r"""The turns of a text like "\n\nHuman: …\n\nAssistant: …"."""
    before, *turns = HH_TURN.split(text)
    if before.strip():
        raise RowError(f"{column}: text before the first \\n\\nHuman:")
    messages = [
        {"role": HH_ROLES[who], "content": said.strip()} for who, said in zip(turns[::2], turns[1::2], strict=True)
    ]
    return _conversation({column: messages}, column)


def _speaks_first(message: Any) -> str | None:
    role = message.get("role", message.get("from")) if isinstance(message, dict) else None
    return "assistant" if role == "gpt" else role


def _answer(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None:
        raise RowError(f"{column} is missing")
    if not isinstance(value, str):
        raise RowError(f"{column} is a {type(value).__name__}, not a string")
    if not value.strip():
        raise RowError(f"{column} is empty")
    return value


def _with_system(row: Row, messages: list[Message]) -> list[Message]:
    """A column `system` stands for a system message, where the conversation has none."""
    system = row.get("system")
    if not system or messages[0]["role"] == "system":
        return messages
    if not isinstance(system, str):
        raise RowError(f"system is a {type(system).__name__}, not a string")
    return [{"role": "system", "content": system}, *messages]


def weight_of(row: Row) -> float:
    """The row's weight in the loss; NaN where it has none. Raises RowError for one that can't be."""
    return _number(row, "weight", least=0.0)


def _number(row: Row, column: str, least: float = -math.inf) -> float:
    """A number of the row; NaN where there is no such column. A null counts as the neutral number."""
    if column not in row:
        return math.nan
    value = row[column]
    if value is None:
        return 1.0 if column == "weight" else 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
        wanted = "a finite number" + (f" of at least {least:g}" if math.isfinite(least) else "")
        raise RowError(f"{column} is {value!r}; it must be {wanted}")
    return float(value)


# --- where the answer begins ----------------------------------------------------------------------------------------


def _parting(chosen: list[Message], rejected: list[Message]) -> int:
    """The first message in which the two differ; for equal conversations the last one. Raises RowError when it isn't
    an answer of the assistant, or when somebody but the assistant and its tools speaks after it."""
    shorter = min(len(chosen), len(rejected))
    same = next((number for number in range(shorter) if chosen[number] != rejected[number]), shorter)
    first = min(same, shorter - 1)
    for column, messages in (("chosen", chosen), ("rejected", rejected)):
        speakers = [message["role"] for message in messages[first:]]
        if speakers[0] != "assistant" or not {*speakers} <= {"assistant", "tool"}:
            raise RowError(
                f"different prompts: chosen and rejected part at message {first + 1}, which isn't the last answer "
                f"({column} goes on with {', '.join(speakers)}); only the last answer may differ"
            )
    return first


def _last_answer(messages: list[Message]) -> int:
    """The message after the last one that is neither the assistant's nor its tools'."""
    asked = [number for number, message in enumerate(messages) if message["role"] not in ("assistant", "tool")]
    return asked[-1] + 1
