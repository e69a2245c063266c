"""Where the assistant speaks in a rendered conversation, in characters.

Most templates have no {% generation %} marks, so the turns are found by rendering again: the prompt for a turn and the
conversation up to it are prefixes of the whole. That costs two renderings a turn, so a turn that can be located from
one rendering with marked contents, common to all turns, is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Message = dict[str, Any]
Span = tuple[int, int]
Render = Callable[[list[Message], bool], str]  # (messages, with the generation prompt) to text


class UnstableTemplate(ValueError):
    """The template renders a turn in a way that doesn't tell where it lies."""


def assistant_spans(messages: list[Message], render: Render, *, special: tuple[str, ...]) -> tuple[str, list[Span]]:
    """The rendered conversation and, for each assistant turn, the range from the generation prompt's end to the end
    of the turn. White space after an end token (ChatML's newline) is left out: inference stops at the token.

    `special`: texts of the special tokens. Raises UnstableTemplate.
    """
    full = render(messages, False)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    located = _from_marks(messages, turns, render, full)
    spans = [span or _from_prefixes(messages, i, render, full) for i, span in zip(turns, located, strict=True)]
    return full, [_trimmed(full, span, special) for span in spans]


def _trimmed(full: str, span: Span, special: tuple[str, ...]) -> Span:
    text = full[slice(*span)].rstrip()
    return (span[0], span[0] + len(text)) if text.endswith(special) else span


def _from_prefixes(messages: list[Message], i: int, render: Render, full: str) -> Span:
    """The definition: from the end of the prompt for turn i to the end of the conversation up to turn i.

    A turn may be rendered differently when it is the last one (Qwen3 adds an empty <think> there). Then its content is
    replaced by a mark: what follows the mark in the whole conversation is what follows the content.
    """
    before, upto = render(messages[:i], True), render(messages[: i + 1], False)
    if not full.startswith(before):
        raise UnstableTemplate(_reason(i, "the text before it depends on what follows"))
    if full.startswith(upto):
        return len(before), len(upto)
    marked = _with_marks(messages, [i])
    after = render(marked, False).partition(_mark(i))[2]
    close = render(marked[: i + 1], False).partition(_mark(i))[2]
    end = len(full) - len(after) + len(close)
    if not (after.startswith(close) and full.endswith(after) and len(before) <= end - len(close)):
        raise UnstableTemplate(_reason(i, "its end can't be found"))
    return len(before), end


def _from_marks(messages: list[Message], turns: list[int], render: Render, full: str) -> list[Span | None]:
    """The spans of the turns whose surroundings look as they do at the first turn; None for the others.

    With every assistant content replaced by a mark, the text between marks is what the template adds. The whole is
    then these pieces and the contents in turn, which the walk below checks character by character.
    """
    none: list[Span | None] = [None] * len(turns)
    if not turns:
        return none
    marked, first = _with_marks(messages, turns), turns[0]
    opening = render(messages[:first], True).removeprefix(render(messages[:first], False))
    closing = render(marked[: first + 1], False).partition(_mark(first))[2]
    pieces: list[str] = []
    rest = render(marked, False)
    for i in turns:
        piece, found, rest = rest.partition(_mark(i))
        if not found:
            return none
        pieces.append(piece)
    pieces.append(rest)
    spans, position = none, 0
    for number, (i, piece, following) in enumerate(zip(turns, pieces[:-1], pieces[1:], strict=True)):
        start = position + len(piece)
        content = messages[i]["content"]
        forms = (content, content.strip(), content.rstrip(), content.lstrip())
        text = next((form for form in forms if full.startswith(form + following, start)), None)
        if text is None or not full.startswith(piece, position):
            return [None] * len(turns)
        position = start + len(text)
        if opening and piece.endswith(opening) and following.startswith(closing):
            spans[number] = (start, position + len(closing))
    return spans if position + len(pieces[-1]) == len(full) else [None] * len(turns)


def _with_marks(messages: list[Message], turns: list[int]) -> list[Message]:
    return [message | {"content": _mark(i)} if i in turns else message for i, message in enumerate(messages)]


def _mark(i: int) -> str:
    return f"zq7mark{i}7qz"


def _reason(i: int, detail: str) -> str:
    return (
        f"the chat template has no {{% generation %}} marks and message {i + 1} can't be told apart: {detail} "
        "(data.chat_template takes a template with marks)"
    )
