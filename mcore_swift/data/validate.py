"""Checks data files row by row and reports every row that training would refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from mcore_swift.data.chat import RowError, read_messages
from mcore_swift.data.judged import EQUAL, read_judged
from mcore_swift.data.sources import (
    JUDGED_COLUMNS,
    Layout,
    Problem,
    Row,
    UnreadableFile,
    find_files,
    find_layout,
    iter_lines,
    iter_rows,
    judged_format,
)
from mcore_swift.data.tokenized import BATCH_ROWS, Encoder, Reading, batched, learns_nothing
from mcore_swift.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOOK_AHEAD = 1000  # rows whose columns tell the format

__all__ = ["Problem", "validate"]


def validate(
    files: list[Path],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    format: str = "auto",
    sequence_length: int | None = None,
) -> list[Problem]:
    """Every bad row of the files (a folder stands for its data files), in order.

    Without a tokenizer the rows' shape is checked; with one also that its chat template takes them and that some
    token counts in the loss; with a sequence length also that they (of pairs: both texts) are no longer than it. Raises
    InputError for a file that isn't there or is of an unknown kind. `auto` finds pairs and labelled answers, too.
    """
    encoder = Encoder(tokenizer) if tokenizer is not None else None
    return [
        problem
        for file in find_files(files)
        for problem in _check_file(file, encoder=encoder, format=format, sequence_length=sequence_length)
    ]


def _check_file(file: Path, *, encoder: Encoder | None, format: str, sequence_length: int | None) -> Iterator[Problem]:
    rows = _numbered_rows(file)
    head = list(islice(rows, LOOK_AHEAD))
    if not head:
        yield Problem(file, 0, "no rows")
        return
    objects = [row for _, row in head if isinstance(row, dict)]
    columns = dict.fromkeys(key for row in objects for key in row)
    if format == "auto":
        format = next(filter(None, map(judged_format, objects)), "auto")
    try:
        layout = find_layout(columns, format=format, file=file) if columns else None
    except InputError as error:
        yield Problem(file, 0, str(error).removeprefix(f"{file}: "))
        layout = None
    for batch in batched(chain(head, rows), BATCH_ROWS):
        found = [Problem(file, number, row) for number, row in batch if isinstance(row, str)]
        if layout is not None:
            good = [(number, row) for number, row in batch if isinstance(row, dict)]
            found += _check_rows(file, good, layout=layout, encoder=encoder, sequence_length=sequence_length)
        yield from sorted(found, key=lambda problem: problem.row)


def _check_rows(
    file: Path,
    rows: list[tuple[int, Row]],
    *,
    layout: Layout,
    encoder: Encoder | None,
    sequence_length: int | None,
) -> Iterator[Problem]:
    readings: list[tuple[int, Reading]] = []
    for number, row in rows:
        try:
            if encoder is None or layout.format in JUDGED_COLUMNS:
                _check_shape(row, layout)
            if encoder is not None:
                readings.append((number, encoder.read(row, layout)))
        except RowError as error:
            yield Problem(file, number, str(error))
    encoded = encoder.encode([reading for _, reading in readings]) if encoder else []
    for (number, _), texts in zip(readings, encoded, strict=True):
        longest = max(len(tokens) for tokens, _ in texts)
        if learns_nothing(texts):
            yield Problem(file, number, "no assistant tokens: nothing in the row counts in the loss")
        elif sequence_length is not None and longest > sequence_length:
            yield Problem(file, number, f"{longest} tokens, more than the sequence length {sequence_length}")


def _check_shape(row: Row, layout: Layout) -> None:
    if layout.format in JUDGED_COLUMNS:
        if read_judged(row, layout).equal and layout.format == "preference":
            raise RowError(EQUAL)
        return
    if layout.format == "messages":
        read_messages(row.get(layout.columns[0]))
        return
    for column in layout.columns:
        value = row.get(column)
        if not isinstance(value, str) or not value.strip():
            raise RowError(f"{column} is {'empty' if isinstance(value, str) else 'no string'}")


def _numbered_rows(file: Path) -> Iterator[tuple[int, Row | str]]:
    """(number, row or the reason why it is none): JSONL by our own reading, since other readers stop at a bad line."""
    if file.suffix == ".jsonl":
        yield from iter_lines(file)
        return
    if file.suffix == ".json":
        yield from _json_rows(file)
        return
    try:
        yield from enumerate(iter_rows(file), start=1)
    except UnreadableFile as error:
        yield 0, f"could not be read: {error}"


def _json_rows(file: Path) -> Iterator[tuple[int, Row | str]]:
    if not file.stat().st_size:
        return
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        if "Extra data" in str(error):  # one object a line in a file called .json
            yield from iter_lines(file)
        else:
            yield 0, f"not valid JSON: {error}"
        return
    if not isinstance(content, list):
        content = [content]
    for number, row in enumerate(content, start=1):
        yield number, row if isinstance(row, dict) else f"a JSON object is needed, found {type(row).__name__}"
