"""The form of a rule: what is refused, why, and what to do instead.

A rule is a row, so that one list serves two readers: a run that is refused, and `mcore-swift plan --explain`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from mcore_swift.errors import InputError


@dataclass(frozen=True)
class Row[Subject]:
    """One impossible or unsafe setting. `reason` and `instead` may hold fields of the subject `r`: `{r.parallel.tp}`.

    The subject is a Recipe for what the recipe alone decides; other tables say what theirs is.
    """

    keys: str  # the recipe's keys, with blanks between; the first is the one to change
    value: str  # for a reader: the values that are refused
    when: Callable[[Subject], object]  # the same for the machine: true when refused
    reason: str  # follows "KEY: "
    instead: str  # what to do

    def message(self, subject: object) -> str:
        """The error for `subject`, or a description for a subject made of `Names`."""
        text = f"{self.reason}; {self.instead}".format(r=subject)
        return f"{', '.join(self.keys.split())}: {text}"


class Names:
    """Stands for a subject where there is none: each field formats as its own name."""

    def __init__(self, name: str = "") -> None:
        self._name = name

    def __getattr__(self, name: str) -> Names:
        return Names(name)

    def __format__(self, _: str) -> str:
        return f"<{self._name}>"


def refuse[Subject](rows: Iterable[Row[Subject]], subject: Subject) -> None:
    """Raises InputError with the message of the first row that `subject` falls under."""
    for row in rows:
        if row.when(subject):
            raise InputError(row.message(subject))


def explained(rows: Iterable[Row[Any]]) -> list[dict[str, str]]:
    """The rows for a reader: keys, value, reason, instead."""
    return [
        {
            "keys": row.keys.replace(" ", ", "),
            "value": row.value,
            "reason": row.reason.format(r=Names()),
            "instead": row.instead.format(r=Names()),
        }
        for row in rows
    ]
