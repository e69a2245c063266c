"""Data files: which ones a recipe names, what their rows hold, and how their rows are read (through `datasets`)."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mcore_swift.errors import InputError

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # extension: builder of `datasets`
COLUMNS = {  # format: the sets of columns that make it, in order of preference
    "messages": [("messages",), ("conversations",)],
    "prompt_response": [("prompt", "response"), ("prompt", "completion"), ("instruction", "output")],
    "text": [("text",)],
}
PAIR_COLUMNS = [
    ("messages", "rejected_messages"),
    ("messages", "rejected_response"),
    ("prompt", "chosen", "rejected"),
    ("conversations", "chosen", "rejected"),
    ("chosen", "rejected"),
]
JUDGED_COLUMNS = {  # rows whose answers are compared or judged: `auto` takes them only for objectives that do that
    "preference": PAIR_COLUMNS,
    "labelled": [("messages", "label"), ("prompt", "completion", "label"), ("prompt", "response", "label")],
    "chosen": PAIR_COLUMNS,
}
HASHED_BYTES = 1 << 30  # files up to this size are known by their content, larger ones by size and date
Row = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """What a file's rows hold: the format and the columns that carry it."""

    format: str
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Problem:
    """A row that can't be used. `row` counts from 1; in JSONL it is the line number; 0 is the file as a whole."""

    file: Path
    row: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.row}: {self.reason}" if self.row else f"{self.file}: {self.reason}"


class WrongColumns(InputError):
    """The file's columns are not those of the format."""


class UnreadableFile(Exception):
    """`datasets` could not read a file; `problems_in_lines` may know the lines."""


def find_files(paths: Iterable[str | Path]) -> list[Path]:
    """The data files behind the paths, in order; a folder stands for its own data files, by name."""
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(f for f in path.iterdir() if f.suffix in READERS and not f.name.startswith("."))
            if not inside:
                raise InputError(f"{path}: no data file in this folder ({', '.join(READERS)})")
            files += inside
        elif not path.is_file():
            raise InputError(f"{path}: no such data file or folder")
        elif path.suffix not in READERS:
            raise InputError(f"{path}: unknown extension {path.suffix!r} (known: {', '.join(READERS)})")
        else:
            files.append(path)
    return files


def find_layout(columns: Iterable[str], *, format: str, file: Path) -> Layout:
    """The layout that the columns have, or must have when the recipe names a format.

    Raises WrongColumns naming the file and its columns.
    """
    found = list(columns)
    known = COLUMNS if format == "auto" else {format: (COLUMNS | JUDGED_COLUMNS)[format]}
    for name, sets in known.items():
        for needed in sets:
            if set(needed) <= set(found):
                return Layout(name, needed)
    wanted = [" + ".join(columns) for sets in known.values() for columns in sets]
    raise WrongColumns(
        f"{file}: no columns for data.format {format!r}: found {', '.join(found) or 'none'}; "
        f"needed {' or '.join(wanted)}"
    )


def judged_format(row: Row) -> str | None:
    """The format of a row whose answers are compared or judged, as far as its columns tell; None for others."""
    if any({*needed} <= {*row} for needed in PAIR_COLUMNS):
        return "preference"
    labelled = any({*needed} <= {*row} for needed in JUDGED_COLUMNS["labelled"])
    return "labelled" if labelled and isinstance(row["label"], bool) else None


def iter_rows(file: Path, *, skip: int = 0) -> Iterator[Row]:
    """The rows of a file from number `skip` (0-based) on, in order. Blank lines of a JSONL file are no rows."""
    if not file.stat().st_size:
        return
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong with a file is ours to say, once
    try:
        # Streaming reads the file where it is: no second copy of the data as Arrow files.
        rows = datasets.load_dataset(
            READERS[file.suffix], data_files=glob.escape(str(file)), split="train", streaming=True
        )
        yield from rows.skip(skip) if skip else rows
    except GeneratorExit:
        raise
    except Exception as error:  # the JSON and Parquet readers raise many kinds
        raise UnreadableFile(f"{type(error).__name__}: {error}") from error


def iter_lines(file: Path) -> Iterator[tuple[int, Row | str]]:
    """(1-based line, row or the reason why the line is none) of a JSONL file; blank lines are passed over."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _parse_line(line)


def _parse_line(line: bytes) -> Row | str:
    try:
        row = json.loads(line)
    except ValueError as error:
        return f"not valid JSON: {error}"
    return row if isinstance(row, dict) else f"a JSON object is needed, found {type(row).__name__}"


def row_number(file: Path, index: int) -> int:
    """The 1-based number a person finds row `index` (0-based) under: in JSONL the line, blank ones counted."""
    if file.suffix != ".jsonl":
        return index + 1
    return next((number for number, _ in islice(_rows_of(file), index, None)), index + 1)


def _rows_of(file: Path) -> Iterator[tuple[int, bytes]]:
    with file.open("rb") as lines:
        yield from ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def raise_problems(problems: list[Problem], total: int | None = None) -> None:
    """Raises one InputError for all the problems, if there are any: the first five and how many there are."""
    if problems:
        count = total or len(problems)
        more = f"\n… {count} bad rows in all" if count > 5 else ""
        raise InputError("\n".join(map(str, problems[:5])) + more + "\n(`mcore-swift data validate` lists every one)")


def content_key(file: Path) -> str:
    """A string that changes when the file's content does."""
    stat = file.stat()
    if stat.st_size > HASHED_BYTES:
        return f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    with file.open("rb") as content:
        return file.suffix + ":" + hashlib.file_digest(content, "sha256").hexdigest()
