"""From tokenized rows to samples: rows cut to the sequence length, then packed or taken one by one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import numpy as np

from mcore_swift.data.packing import best_fit_decreasing
from mcore_swift.data.sources import raise_problems
from mcore_swift.data.tokenized import TokenizedRows

Document = tuple[np.ndarray, np.ndarray]  # tokens int32 [n], loss uint8 [n], or float32 of rows with weights


@dataclass(frozen=True)
class Counts:
    """What became of the rows; shown in a run's summary."""

    rows: int = 0
    documents: int = 0
    tokens: int = 0
    truncated: int = 0  # rows cut to the sequence length
    dropped: int = 0  # rows longer than the sequence, with too_long: drop
    without_loss: int = 0  # rows dropped because nothing to learn is left after truncation
    split: int = 0  # long texts divided over several documents
    samples: int = 0

    def plus(self, other: Counts) -> Self:
        return type(self)(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def report(self, *, sequence_length: int | None) -> dict[str, int | float]:
        """The counts, and with a pack's length the share of positions that hold a token."""
        if sequence_length is None:
            return dict(vars(self))
        return vars(self) | {"packing_efficiency": self.tokens / max(1, self.samples * sequence_length)}


@dataclass(frozen=True)
class SampleSet:
    """Samples of one data set. Sample i holds documents items[offsets[i]:offsets[i + 1]] of (starts, lengths)."""

    rows: TokenizedRows
    starts: np.ndarray
    lengths: np.ndarray
    offsets: np.ndarray
    items: np.ndarray
    counts: Counts = field(default_factory=Counts)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def documents(self, sample: int) -> list[Document]:
        return [self._document(item) for item in self.items[self.offsets[sample] : self.offsets[sample + 1]]]

    def adapters(self, sample: int) -> list[int]:
        """The number of the adapter of each of a sample's documents, where rows have one."""
        assert self.rows.adapter is not None
        starts = self.starts[self.items[self.offsets[sample] : self.offsets[sample + 1]]]
        rows = np.searchsorted(self.rows.offsets, starts, side="right") - 1
        return self.rows.adapter[rows].tolist()

    def _document(self, item: int) -> Document:
        start = int(self.starts[item])
        end = start + int(self.lengths[item])
        tokens, loss = self.rows.tokens[start:end], self.rows.loss[start:end]
        if self.rows.weights is None:
            return tokens, loss
        row = np.searchsorted(self.rows.offsets, start, side="right") - 1
        return tokens, loss * self.rows.weights[row]


def make_samples(
    rows: TokenizedRows, *, sequence_length: int, too_long: str, packing: bool, subset: np.ndarray | None = None
) -> SampleSet:
    """The samples of the rows (or of a subset of row numbers, ascending).

    Packed: packs of up to `sequence_length` tokens; unpacked: one row each, in order. Rows longer than that follow
    `too_long`; only with packing and too_long "truncate", plain text is split over documents instead: consecutive
    pieces share one token, so that each token of the text is still predicted once. A document of fewer than two
    tokens has nothing to predict and is left out. Raises InputError for too_long "error".
    """
    chosen = np.arange(len(rows)) if subset is None else subset
    starts = np.asarray(rows.offsets[:-1])[chosen]
    lengths = np.asarray(rows.offsets[1:])[chosen] - starts
    long = lengths > sequence_length
    counts = {"rows": len(chosen)}
    if too_long == "error":
        reason = "row of {} tokens is longer than data.sequence_length " + str(sequence_length)
        indices = np.flatnonzero(long)
        raise_problems([rows.problem(int(chosen[i]), reason.format(lengths[i])) for i in indices[:6]], len(indices))
    if too_long == "drop":
        counts["dropped"] = int(long.sum())
        starts, lengths = starts[~long], lengths[~long]
    else:
        splittable = long & rows.is_text()[chosen] if packing else np.zeros_like(long)
        counts["split"], counts["truncated"] = int(splittable.sum()), int((long & ~splittable).sum())
        starts, lengths = _split(starts, lengths, splittable, sequence_length)
        cut = lengths > sequence_length
        lengths = np.minimum(lengths, sequence_length)
        learned = [rows.loss[s + 1 : s + n].any() for s, n in zip(starts[cut], lengths[cut], strict=True)]
        keep = np.ones(len(starts), dtype=bool)
        keep[cut] = np.array(learned, dtype=bool)
        counts["without_loss"] = int((~keep).sum())
        starts, lengths = starts[keep], lengths[keep]
    offsets, items = (
        best_fit_decreasing(lengths, sequence_length)
        if packing
        else (np.arange(len(lengths) + 1), np.arange(len(lengths)))
    )
    total = Counts(**counts, documents=len(lengths), tokens=int(lengths.sum()), samples=len(offsets) - 1)
    return SampleSet(rows, starts, lengths, offsets, items, total)


def _split(starts: np.ndarray, lengths: np.ndarray, chosen: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Divides the chosen documents into pieces of up to `size` tokens that overlap by one, in place and order."""
    pieces = np.where(chosen, -(-(lengths - 1) // (size - 1)), 1)
    first = np.repeat(np.cumsum(pieces) - pieces, pieces)
    shift = (np.arange(len(first)) - first) * (size - 1)
    left = np.repeat(lengths, pieces) - shift
    return np.repeat(starts, pieces) + shift, np.where(np.repeat(chosen, pieces), np.minimum(left, size), left)


def split_rows(num_rows: int, *, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, validation rows), disjoint and ascending; at least one validation row. Fixed by the seed."""
    order = np.random.default_rng([seed, 0x5B117]).permutation(num_rows)
    count = max(1, round(fraction * num_rows))
    return np.sort(order[count:]), np.sort(order[:count])
