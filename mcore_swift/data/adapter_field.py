"""Which of several adapters a row belongs to: a field of the row says its name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mcore_swift.data.sources import Problem, Row, raise_problems, row_number
from mcore_swift.data.tokenized import readable_rows
from mcore_swift.errors import nearest


def read_adapters(files: Sequence[Path], *, field: str, names: Sequence[str]) -> np.ndarray:
    """The number in `names` of each row's adapter: int64 [rows], over all files.

    Read from the files each time, not from the tokenized cache: tokens don't depend on it. Raises InputError naming
    the rows (the first five and how many there are) whose field is missing or names no adapter.
    """
    numbers = {name: number for number, name in enumerate(names)}
    found: list[int] = []
    problems: list[Problem] = []
    bad = 0
    for file in files:
        for index, row in enumerate(readable_rows(file)):
            reason = _problem(row, field, names)
            if reason is None:
                found.append(numbers[row[field]])
                continue
            bad += 1
            if len(problems) < 5:  # finding a line number reads the file
                problems.append(Problem(file, row_number(file, index), reason))
    raise_problems(problems, bad)
    return np.array(found, dtype=np.int64)


def _problem(row: Row, field: str, names: Sequence[str]) -> str | None:
    value = row.get(field)
    if isinstance(value, str) and value in names:
        return None
    allowed = f"allowed: {', '.join(names)}"
    if value is None:
        return f"{field} (data.adapter_field) is missing; {allowed}"
    near = nearest(value, list(names)) if isinstance(value, str) else ""
    return f"{field} is {value!r}, which is none of adapter.several.{near} {allowed[0].upper()}{allowed[1:]}"
