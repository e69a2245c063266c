"""From judged rows to samples: units of answers that an objective needs together, cut, then packed or taken one by one.

A unit is a pair, or a labelled answer with its probe: the same prompt followed by another row's answer, from which KTO
estimates how far the policy is from the reference. TRL takes the answer of the row before in a device's batch, so there
the estimate depends on the layout, and on neighbours in the file, which are often answers to the same prompt. Here the
partner of each row is fixed once for the data set: the next one in a shuffled circle that has another prompt. So units
are known before they are packed and shuffled, their reference can be computed beforehand, and no layout changes them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mcore_swift.data.judged import EQUAL
from mcore_swift.data.packing import best_fit_decreasing
from mcore_swift.data.samples import Counts, split_rows
from mcore_swift.data.sources import raise_problems
from mcore_swift.data.tokenized import TokenizedRows
from mcore_swift.data.wanted import Wanted

if TYPE_CHECKING:
    from mcore_swift.recipe import DataSection

CIRCLE_SEED = 0x9A2B7  # not the run's: the reference's log-probabilities are kept from run to run


@dataclass(frozen=True)
class JudgedCounts(Counts):
    """What became of the rows: `documents` are their answers, probes included."""

    equal: int = 0  # pairs dropped because both answers are the same, with equal_pairs: drop
    prompts_cut: int = 0  # of those truncated: rows whose prompts lost their start
    answers_cut: int = 0  # … and rows that lost the end of an answer
    without_partner: int = 0  # rows dropped because no other row has another prompt, to make their probe


class Answer(NamedTuple):
    """One document of a micro-batch with what is known of it. margin, weight, label, ref_logps: NaN if nothing is."""

    tokens: np.ndarray  # int32 [n]
    loss: np.ndarray  # uint8 [n]
    row: int
    margin: float
    weight: float
    label: float
    probe: bool
    ref_logps: float


@dataclass(frozen=True)
class Pieces:
    """Documents made of a prompt and an answer that lie anywhere in the rows' tokens: all int64 [units, answers]."""

    prompt_starts: np.ndarray
    prompts: np.ndarray  # lengths
    answer_starts: np.ndarray
    answers: np.ndarray  # lengths, up to the last token that counts, or to the end of what is scored

    @property
    def lengths(self) -> np.ndarray:
        return self.prompts + self.answers

    def __getitem__(self, chosen: np.ndarray) -> Pieces:
        return Pieces(*(values[chosen] for values in vars(self).values()))


@dataclass(frozen=True)
class JudgedSet:
    """Samples of one data set. Sample i holds units items[offsets[i]:offsets[i + 1]], each `answers` documents.

    numbers: int64 [units], the units' rows. ref_logps: float32 [units, answers], or None.
    """

    rows: TokenizedRows
    pieces: Pieces
    numbers: np.ndarray
    offsets: np.ndarray
    items: np.ndarray
    probes: bool
    counts: JudgedCounts = field(default_factory=JudgedCounts)
    ref_logps: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def answers(self) -> int:
        """Documents of a unit."""
        return self.pieces.prompts.shape[1]

    def units(self, sample: int) -> np.ndarray:
        return self.items[self.offsets[sample] : self.offsets[sample + 1]]

    def documents(self, sample: int) -> list[Answer]:
        """The sample's answers: those of a unit lie side by side."""
        return [answer for unit in self.units(sample).tolist() for answer in self._unit(unit)]

    def _unit(self, unit: int) -> Iterator[Answer]:
        rows, pieces, row = self.rows, self.pieces, int(self.numbers[unit])
        assert rows.judged is not None
        _, margin, weight, label = rows.judged[row].tolist()
        for number in range(self.answers):
            spans = [
                slice(start, start + length)
                for start, length in (
                    (pieces.prompt_starts[unit, number], pieces.prompts[unit, number]),
                    (pieces.answer_starts[unit, number], pieces.answers[unit, number]),
                )
            ]
            yield Answer(
                tokens=np.concatenate([rows.tokens[span] for span in spans]),
                loss=np.concatenate([rows.loss[span] for span in spans]),
                row=rows.first_row + row,
                margin=margin,
                weight=weight,
                label=label,
                probe=self.probes and number == 1,
                ref_logps=math.nan if self.ref_logps is None else float(self.ref_logps[unit, number]),
            )

    def content_key(self) -> str:
        """A hash of all tokens of all units, in the order of the units."""
        parts = [self.rows.key.encode(), *(values.tobytes() for values in vars(self.pieces).values())]
        return hashlib.sha256(b"|".join(parts)).hexdigest()


def judged_settings(data: DataSection, wanted: Wanted) -> list[Any]:
    """What decides, beside what decides it for plain rows, what a sample of answers is; [] for plain rows."""
    plain = [wanted.unit, wanted.probes, data.truncate, data.equal_pairs] if wanted.judged else []
    return [*plain, "scored"] if wanted.scored else plain


def judged_samples(
    rows: TokenizedRows, data: DataSection, wanted: Wanted, *, subset: np.ndarray | None = None
) -> JudgedSet:
    """`make_judged_samples` as a recipe says."""
    return make_judged_samples(
        rows,
        sequence_length=data.sequence_length,
        too_long=data.too_long,
        truncate=data.truncate,
        packing=data.packing,
        equal_pairs=data.equal_pairs,
        probes=wanted.probes,
        scored=wanted.scored,
        subset=subset,
    )


def make_judged_samples(
    rows: TokenizedRows,
    *,
    sequence_length: int,
    too_long: str,
    truncate: str,
    packing: bool,
    equal_pairs: str,
    probes: bool,
    scored: bool = False,
    subset: np.ndarray | None = None,
) -> JudgedSet:
    """The samples of the rows (or of a subset of row numbers, ascending). `scored`: of whole documents.

    Packed: packs of whole units, up to `sequence_length` tokens; unpacked: one unit each, in order, every document up
    to `sequence_length`. Units beyond that follow `too_long`; how they are cut, see `cut`. Raises InputError for too
    long units and equal pairs, where the settings say so.
    """
    numbers = np.arange(len(rows)) if subset is None else subset
    pieces = _pieces(rows, numbers, whole=scored)
    found: dict[str, int] = {"rows": len(numbers)}
    if pieces.prompts.shape[1] == 2:
        equal = _equal(rows, pieces)
        if equal_pairs == "error":
            bad = np.flatnonzero(equal)
            raise_problems([rows.problem(int(numbers[i]), EQUAL) for i in bad[:6]], len(bad))
        found["equal"] = int(equal.sum())
        numbers, pieces = numbers[~equal], pieces[~equal]
    elif probes:
        pieces, paired = _with_probes(rows, pieces)
        found["without_partner"] = int((~paired).sum())
        numbers, pieces = numbers[paired], pieces[paired]
    long = _too_long(pieces, sequence_length, shared=packing)
    if too_long == "error":
        _refuse_long(rows, numbers[long], pieces[long], sequence_length, packing=packing, probes=probes)
    if too_long == "drop":
        found["dropped"] = int(long.sum())
        numbers, pieces = numbers[~long], pieces[~long]
    else:
        whole, pieces = pieces, cut(pieces, sequence_length, shared=packing, truncate=truncate)
        found["truncated"] = int(long.sum())
        found["prompts_cut"] = int((pieces.prompts < whole.prompts).any(1).sum())
        found["answers_cut"] = int((pieces.answers < whole.answers).any(1).sum())
        keep = _learned(rows, pieces)
        if not probes:
            keep &= ~(long & _equal(rows, pieces))
        found["without_loss"] = int((~keep).sum())
        numbers, pieces = numbers[keep], pieces[keep]
    offsets, items = (
        best_fit_decreasing(pieces.lengths.sum(1), sequence_length)
        if packing
        else (np.arange(len(numbers) + 1), np.arange(len(numbers)))
    )
    found |= {"documents": pieces.prompts.size, "tokens": int(pieces.lengths.sum()), "samples": len(offsets) - 1}
    return JudgedSet(rows, pieces, numbers, offsets, items, probes, JudgedCounts(**found))


def _refuse_long(
    rows: TokenizedRows, numbers: np.ndarray, pieces: Pieces, sequence_length: int, *, packing: bool, probes: bool
) -> None:
    """Raises InputError that names the rows of units that don't fit, if there are any."""
    unit = "answer and its probe" if probes else "pair" if pieces.prompts.shape[1] == 2 else "answer"
    hint = " (with data.packing, what belongs together shares a sequence)" if packing else ""
    tokens = pieces.lengths.sum(1) if packing else pieces.lengths.max(1)
    reasons = [f"{unit} of {count} tokens, more than data.sequence_length {sequence_length}{hint}" for count in tokens]
    problems = [rows.problem(int(row), reason) for row, reason in zip(numbers[:6], reasons, strict=False)]
    raise_problems(problems, len(numbers))


def _pieces(rows: TokenizedRows, numbers: np.ndarray, *, whole: bool = False) -> Pieces:
    """Prompt and answer of each document: the prompt ends where the first token counts, the answer with the last one,
    or with the document if it is to be `whole`."""
    assert rows.judged is not None
    starts, ends = np.asarray(rows.offsets[:-1])[numbers], np.asarray(rows.offsets[1:])[numbers]
    middles = starts + rows.judged[numbers, 0].astype(np.int64)
    single = (middles == ends).all()
    begins = np.stack([starts] if single else [starts, middles], axis=1)
    stops = np.stack([ends] if single else [middles, ends], axis=1)
    counted = np.flatnonzero(rows.loss)
    first = counted[np.searchsorted(counted, begins)]
    last = stops - 1 if whole else counted[np.searchsorted(counted, stops) - 1]
    return Pieces(begins, first - begins, first, last + 1 - first)


def _equal(rows: TokenizedRows, pieces: Pieces) -> np.ndarray:
    """bool [units]: both documents hold the same tokens."""
    if pieces.prompts.shape[1] == 1:
        return np.zeros(len(pieces.prompts), dtype=bool)
    equal = pieces.lengths[:, 0] == pieces.lengths[:, 1]
    for unit in np.flatnonzero(equal).tolist():
        equal[unit] = np.array_equal(_tokens(rows, pieces, unit, 0), _tokens(rows, pieces, unit, 1))
    return equal


def _tokens(rows: TokenizedRows, pieces: Pieces, unit: int, number: int) -> np.ndarray:
    prompt, answer = pieces.prompt_starts[unit, number], pieces.answer_starts[unit, number]
    return np.concatenate(
        [
            rows.tokens[prompt : prompt + pieces.prompts[unit, number]],
            rows.tokens[answer : answer + pieces.answers[unit, number]],
        ]
    )


def prompt_groups(rows: TokenizedRows) -> np.ndarray:
    """int64 [rows]: equal for rows with the same prompt, numbered from 0."""
    prompts = _prompts(rows, _pieces(rows, np.arange(len(rows))))
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    return np.array([numbers[prompt] for prompt in prompts], dtype=np.int64)


def split_prompts(rows: TokenizedRows, *, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, validation rows) like `split_rows`, of the prompts: no prompt is on both sides."""
    groups = prompt_groups(rows)
    _, held_out = split_rows(int(groups.max()) + 1, fraction=fraction, seed=seed)
    validation = np.isin(groups, held_out)
    return np.flatnonzero(~validation), np.flatnonzero(validation)


def _with_probes(rows: TokenizedRows, pieces: Pieces) -> tuple[Pieces, np.ndarray]:
    """The pieces with each row's probe beside it, and bool [units]: there is one."""
    count = len(pieces.prompts)
    partners = _partners(_prompts(rows, pieces))
    paired = partners >= 0
    other = np.where(paired, partners, np.arange(count))

    def beside(own: np.ndarray, others: np.ndarray) -> np.ndarray:
        return np.concatenate([own, others], axis=1)

    with_probes = Pieces(
        beside(pieces.prompt_starts, pieces.prompt_starts),
        beside(pieces.prompts, pieces.prompts),
        beside(pieces.answer_starts, pieces.answer_starts[other]),
        beside(pieces.answers, pieces.answers[other]),
    )
    return with_probes, paired


def _prompts(rows: TokenizedRows, pieces: Pieces) -> list[bytes]:
    return [
        rows.tokens[start : start + length].tobytes()
        for start, length in zip(pieces.prompt_starts[:, 0], pieces.prompts[:, 0], strict=True)
    ]


def _partners(prompts: list[bytes]) -> np.ndarray:
    """int64 [n]: for each row the next one in a shuffled circle with another prompt; −1 where all are the same."""
    count = len(prompts)
    circle = np.random.default_rng(CIRCLE_SEED).permutation(count).tolist()
    partners = np.full(count, -1, dtype=np.int64)
    following = None
    for place in range(2 * count - 1, -1, -1):  # twice round, backwards: the second time every row has followers
        row, after = circle[place % count], circle[(place + 1) % count]
        if prompts[after] != prompts[row]:
            following = after  # otherwise: the one that the row after this one has
        partners[row] = -1 if following is None else following
    return partners


def _too_long(pieces: Pieces, capacity: int, *, shared: bool) -> np.ndarray:
    lengths = pieces.lengths
    return (lengths.sum(1) if shared else lengths.max(1)) > capacity


def cut(pieces: Pieces, capacity: int, *, shared: bool, truncate: str) -> Pieces:
    """The pieces of units that fit: a unit's documents in `capacity` together (`shared`) or each by itself.

    answer_end: the ends of the longest documents go, down to a length that is the same for all of a unit.
    prompt_start: the starts of the prompts go, as much of each, so that they stay equal; one token is kept, and what is
    still too long then loses its end.
    """
    prompts, starts, answers = pieces.prompts, pieces.prompt_starts, pieces.answers
    if truncate == "prompt_start":
        per_document = prompts.shape[1] if shared else 1
        total = pieces.lengths.sum(1) if shared else pieces.lengths.max(1)
        excess = np.maximum(0, -(-(total - capacity) // per_document))
        taken = np.minimum(excess, np.maximum(0, prompts.min(1) - 1))[:, None]
        prompts, starts = prompts - taken, starts + taken
    limit = _limits(prompts + answers, capacity) if shared else np.full((len(prompts), 1), capacity)
    answers = np.clip(limit - prompts, 0, answers)
    return Pieces(starts, np.minimum(prompts, limit), pieces.answer_starts, answers)


def _limits(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """int64 [units, 1]: the longest length to which a unit's one or two documents can be cut so that they fit."""
    if lengths.shape[1] == 1:
        return np.full((len(lengths), 1), capacity)
    return np.maximum(capacity - lengths.min(1), capacity // 2)[:, None]


def _learned(rows: TokenizedRows, pieces: Pieces) -> np.ndarray:
    """bool [units]: each document still has a label that counts (its first token has none)."""
    counted = np.flatnonzero(rows.loss)
    begins = pieces.answer_starts + (pieces.prompts == 0)
    ends = pieces.answer_starts + pieces.answers
    return (np.searchsorted(counted, ends) > np.searchsorted(counted, begins)).all(1)
