"""Tokenized rows, and the cache that holds them between runs as memory-mapped files.

A cache entry is a folder named by a hash of all that decides its content: the files' bytes, the tokenizer, its chat
template and the format. Sequence length, packing and splits are not part of it: they are cheap and come later.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mcore_swift.data.cache import locked, new_folder
from mcore_swift.data.chat import Rendered, Renderer, RowError
from mcore_swift.data.judged import Judgement, render_judged, weight_of
from mcore_swift.data.sources import (
    JUDGED_COLUMNS,
    Layout,
    Problem,
    Row,
    UnreadableFile,
    WrongColumns,
    content_key,
    find_layout,
    iter_rows,
    judged_format,
    raise_problems,
    row_number,
)
from mcore_swift.data.tokenizer import eos_id_of, fingerprint
from mcore_swift.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 2  # of the cache's content: raise it when the same rows would become other tokens
BATCH_ROWS = 1000
log = logging.getLogger(__name__)
Encoded = tuple[np.ndarray, np.ndarray]  # tokens int32 [n], loss uint8 [n]: 1 where the token is to be learned


class EncodedRow(NamedTuple):
    """A row for the cache. Of a judged row: its answers, each behind its prompt, one after the other.

    tokens int32 [n], loss uint8 [n]; judged: float64 [4], where the first answer ends, margin, weight, label (NaN for
    what the row doesn't say); None for plain rows. weight: a plain row's.
    """

    tokens: np.ndarray
    loss: np.ndarray
    judged: np.ndarray | None = None
    weight: float = 1.0


class Reading(NamedTuple):
    """A row as texts: one, or one an answer."""

    texts: list[Rendered]
    judgement: Judgement | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class SourceFile:
    path: Path
    num_rows: int
    format: str


@dataclass(frozen=True)
class TokenizedRows:
    """Rows one after the other: row i is tokens[offsets[i]:offsets[i + 1]]; its loss is 1 where the token counts.

    tokens int32 [n], loss uint8 [n], offsets int64 [rows + 1]. `seconds` is 0 when the cache was reused. `judged`:
    float64 [rows, 4] for rows whose answers are compared or judged (see EncodedRow), else None.
    """

    tokens: np.ndarray
    loss: np.ndarray
    offsets: np.ndarray
    files: list[SourceFile]
    key: str
    seconds: float = 0.0
    adapter: np.ndarray | None = None  # int64 [rows], the number of each row's adapter
    first_row: int = 0  # the number of row 0 in its file, where the rows are a part of one file
    judged: np.ndarray | None = None
    weights: np.ndarray | None = None  # float32 [rows], of plain rows; None: all are 1

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def all_weights(self) -> np.ndarray | None:
        """The rows' weights, plain or judged, NaN where nothing is known; None: no row has one."""
        return self.weights if self.judged is None else self.judged[:, 2]

    def problem(self, row: int, reason: str) -> Problem:
        """A problem with row (0-based, over all files)."""
        for file in self.files:
            if row < file.num_rows:
                return Problem(file.path, row_number(file.path, self.first_row + row), reason)
            row -= file.num_rows
        raise IndexError(row)

    def is_text(self) -> np.ndarray:
        """bool [rows]: the row is plain text, which may be cut anywhere."""
        return np.repeat([file.format == "text" for file in self.files], [file.num_rows for file in self.files])


class Encoder:
    """Rows to tokens and loss flags, a batch at a time on the tokenizer's own threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.render = Renderer(tokenizer)

    def read(self, row: Row, layout: Layout) -> Reading:
        """The row's texts. Raises RowError with the reason when the row can't be used."""
        if layout.format not in JUDGED_COLUMNS:
            return Reading([self.render(row, layout)], weight=_known(weight_of(row)))
        texts, judgement = render_judged(self.render, row, layout)
        if layout.format != "chosen":
            return Reading(texts, judgement)
        return Reading(texts[:1], weight=_known(judgement.weight))

    def encode(self, readings: list[Reading]) -> list[list[Encoded]]:
        """The tokens of each reading's texts."""
        texts = iter(self([text for reading in readings for text in reading.texts]))
        return [list(islice(texts, len(reading.texts))) for reading in readings]

    def __call__(self, batch: list[Rendered]) -> list[Encoded]:
        """Raises InputError when plain text needs an end-of-text token that the tokenizer doesn't have."""
        if not batch:
            return []
        raw = batch[0].raw  # a file's rows are of one format
        encodings = self.tokenizer(
            [rendered.text for rendered in batch],
            add_special_tokens=raw,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        pairs = zip(encodings["input_ids"], encodings["offset_mapping"], batch, strict=True)
        return [self._learned(ids, offsets, rendered) for ids, offsets, rendered in pairs]

    def _learned(self, ids: list[int], offsets: list[tuple[int, int]], rendered: Rendered) -> Encoded:
        tokens = np.array(ids, dtype=np.int32)
        starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
        spans = np.array(rendered.spans, dtype=np.int64).reshape(-1, 2)
        # A token that shares a character with a span counts: more spans begin before its end than end before its start.
        begun = np.searchsorted(spans[:, 0], ends, side="left")
        done = np.searchsorted(spans[:, 1], starts, side="right")
        loss = ((begun > done) & (ends > starts)).astype(np.uint8)
        if rendered.raw:
            eos = eos_id_of(self.tokenizer)
            if not len(tokens) or tokens[-1] != eos:
                tokens, loss = np.append(tokens, np.int32(eos)), np.append(loss, np.uint8(1))
            loss[-1] = 1
        return tokens, loss


def _known(weight: float) -> float:
    return 1.0 if math.isnan(weight) else weight


def batched(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch


def learns_nothing(texts: list[Encoded]) -> bool:
    """Whether one of a row's texts has no token that counts."""
    return not all(loss[1:].any() for _, loss in texts)


def encode_rows(
    rows: Iterable[Row], layout: Layout, encoder: Encoder, *, report: Callable[[int, str], None]
) -> Iterator[EncodedRow]:
    """Tokens and loss of each good row; `report(index, reason)` is told of each bad one."""
    for batch in batched(enumerate(rows), BATCH_ROWS):
        good: list[tuple[int, Reading]] = []
        for index, row in batch:
            try:
                good.append((index, encoder.read(row, layout)))
            except RowError as error:
                report(index, str(error))
        encoded = encoder.encode([reading for _, reading in good])
        for (index, reading), texts in zip(good, encoded, strict=True):
            if learns_nothing(texts):
                report(index, "no assistant tokens: nothing in the row counts in the loss")
            else:
                yield _joined(texts, reading)


def _joined(texts: list[Encoded], reading: Reading) -> EncodedRow:
    if reading.judgement is None:
        return EncodedRow(*texts[0], weight=reading.weight)
    tokens, loss = (np.concatenate(parts) for parts in zip(*texts, strict=True))
    return EncodedRow(tokens, loss, np.array([len(texts[0][0]), *reading.judgement], dtype=np.float64))


@dataclass
class _Writer:
    """Appends rows to a folder's arrays without holding them in memory."""

    folder: Path
    lengths: list[int] = field(default_factory=list)
    judged: list[np.ndarray] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def write(self, rows: Iterable[EncodedRow]) -> int:
        before = len(self.lengths)
        with (self.folder / "tokens.i32").open("ab") as tokens_file, (self.folder / "loss.u8").open("ab") as loss_file:
            for tokens, loss, judged, weight in rows:
                tokens_file.write(tokens.tobytes())
                loss_file.write(loss.tobytes())
                self.lengths.append(len(tokens))
                self.weights.append(weight)
                if judged is not None:
                    self.judged.append(judged)
        return len(self.lengths) - before


def tokenize_files(
    files: list[Path], *, tokenizer: PreTrainedTokenizerBase, format: str, cache_dir: Path
) -> TokenizedRows:
    """The tokenized rows of the files, from the cache when nothing changed.

    Any number of processes may ask at once: the first to hold the lock does the work, the others map its files.
    Raises InputError: unreadable or empty data, bad rows (the first five and their number), unwritable cache.
    """
    key = cache_key(files, tokenizer=tokenizer, format=format)
    folder = cache_dir / "tokenized" / key
    seconds = 0.0
    with locked(folder):
        if not folder.is_dir():
            start = time.perf_counter()
            with new_folder(folder) as scratch:
                rows = _build(files, scratch, encoder=Encoder(tokenizer), format=format)
            seconds = time.perf_counter() - start
            log.info("tokenized %d rows in %.1f s (%.0f rows/s)", rows, seconds, rows / seconds)
        else:
            log.info("tokenized data reused: %s", folder)
    return _open(folder, files, seconds)


def cache_key(files: list[Path], *, tokenizer: PreTrainedTokenizerBase, format: str) -> str:
    parts = [VERSION, [content_key(file) for file in files], fingerprint(tokenizer), format]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _build(files: list[Path], folder: Path, *, encoder: Encoder, format: str) -> int:
    writer, meta, problems = _Writer(folder), [], []
    for file in files:
        encoded, layout = encode_file(file, encoder, format=format, problems=problems)
        meta.append({"rows": writer.write(encoded), "format": layout.format})
    raise_problems(problems)
    if not writer.lengths:
        raise InputError(f"{', '.join(map(str, files))}: no rows")
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(writer.lengths, dtype=np.int64)]))
    if writer.judged:
        np.save(folder / "judged.npy", np.stack(writer.judged))
    if any(weight != 1.0 for weight in writer.weights):
        np.save(folder / "weights.npy", np.array(writer.weights, dtype=np.float32))
    (folder / "meta.json").write_text(json.dumps(meta))
    return len(writer.lengths)


def encode_file(
    file: Path, encoder: Encoder, *, format: str, problems: list[Problem], skip: int = 0
) -> tuple[Iterator[EncodedRow], Layout]:
    """An iterator over a file's encoded rows from row `skip` on, and its layout. Bad rows go to `problems`."""
    rows = readable_rows(file, skip=skip, format=format)
    first = next(rows, None)
    if first is None:
        return iter(()), Layout("messages" if format == "auto" else format, ())
    judged = judged_format(first) if format == "auto" else None
    if judged is not None:
        raise WrongColumns(f"{file}: its columns ({', '.join(first)}) are those of data.format {judged!r}")
    layout = find_layout(first, format=format, file=file)

    def all_rows() -> Iterator[Row]:
        yield first
        yield from rows

    def report(index: int, reason: str) -> None:
        # Finding a line number reads the file: only for the problems that will be shown.
        number = row_number(file, skip + index) if len(problems) < 5 else skip + index + 1
        problems.append(Problem(file, number, reason))

    return encode_rows(all_rows(), layout, encoder, report=report), layout


def readable_rows(file: Path, *, skip: int = 0, format: str = "auto") -> Iterator[Row]:
    """`iter_rows`, but a file that can't be read is an InputError that names the lines at fault where there are any."""
    try:
        yield from iter_rows(file, skip=skip)
    except UnreadableFile as error:
        from mcore_swift.data.validate import validate

        raise_problems(validate([file], format=format))
        raise InputError(f"{file}: could not be read: {error}") from error


def _open(folder: Path, files: list[Path], seconds: float) -> TokenizedRows:
    meta = json.loads((folder / "meta.json").read_text())
    return TokenizedRows(
        tokens=np.memmap(folder / "tokens.i32", dtype=np.int32, mode="r"),
        loss=np.memmap(folder / "loss.u8", dtype=np.uint8, mode="r"),
        offsets=np.load(folder / "offsets.npy", mmap_mode="r"),
        files=[SourceFile(file, item["rows"], item["format"]) for file, item in zip(files, meta, strict=True)],
        key=folder.name,
        seconds=seconds,
        judged=np.load(folder / "judged.npy", mmap_mode="r") if (folder / "judged.npy").exists() else None,
        weights=np.load(folder / "weights.npy", mmap_mode="r") if (folder / "weights.npy").exists() else None,
    )
