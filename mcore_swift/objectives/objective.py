"""What an objective is: a pure function of per-token log-probabilities, or of their sums over whole answers.

Everything around it (vocabulary-parallel log-probabilities, packing, context parallelism, pipeline stages, reductions,
the reference's pass) is written once in `training/step.py` and `training/reference.py`, so an objective is a page of
arithmetic, and is the same at any layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from mcore_swift.data.wanted import Unit
from mcore_swift.recipe import ObjectiveSection

if TYPE_CHECKING:
    from torch import Tensor

    from mcore_swift.data.batch import MicroBatch, Sequences


@dataclass(frozen=True)
class Mean:
    """A mean that isn't divided yet: float32 scalars, both summed over the global batch first."""

    total: Tensor
    count: Tensor


@dataclass(frozen=True)
class Loss:
    """A micro-batch's loss, not yet divided.

    `total` (float32 scalar) is the sum to minimize, `count` (int32 scalar) what it is divided by, after both are summed
    over the global batch: so the number depends neither on the layout nor on the micro-batch size. `metrics` are means
    of other things, for display, each with a count of its own; `extremes` are float32 scalars whose names end with what
    they are over the global batch, `_min` or `_max`: infinite where a micro-batch has none. `tally` (float32 scalar):
    what a mean over several global batches weighs each with, if that isn't `count`.
    """

    total: Tensor
    count: Tensor
    metrics: dict[str, Mean]
    extremes: dict[str, Tensor] = field(default_factory=dict)
    tally: Tensor | None = None


@dataclass(frozen=True)
class Answers:
    """The answers of a micro-batch as the policy sees them: n of them, whole on every context parallel rank.

    logps: float32 [n], sums of log-probabilities over an answer's labels, each times its loss mask, which is 1 unless
    the objective weighs labels (of a model with a score: the answer's); plain: the same without the mask's weights;
    lengths: float32 [n], numbers of labels.
    """

    logps: Tensor
    plain: Tensor
    lengths: Tensor
    of: Sequences


@dataclass(frozen=True)
class Distances:
    """Of the student's next-token distributions from the teacher's, where labels count (elsewhere 0): float32 [b, s].

    divergence: the one that is minimized, the only one with a gradient; kl: KL(teacher ‖ student) of the whole
    distributions; agreement: 1 where both have the same most probable token.
    """

    divergence: Tensor
    kl: Tensor
    agreement: Tensor


@dataclass(frozen=True)
class Scores:
    """What an objective reads of a micro-batch.

    logps: float32 [b, s], the log-probability of each label; a context parallel rank's part of them.
    answers: None where the batch doesn't say which answers it holds.
    totals: float scalars, what the global batch holds (`sizes`, summed), and `kl`, for objectives that ask for it.
    distances: None where there is no teacher.
    """

    logps: Tensor
    batch: MicroBatch
    answers: Answers | None = None
    totals: Mapping[str, Tensor] = field(default_factory=dict)
    distances: Distances | None = None


@dataclass(frozen=True)
class Objective:
    """An objective by its function; `unit` is what its loss is a mean over.

    weigh: called on whole micro-batches, to weigh their labels by changing the loss mask.
    reference: whether it compares the policy with another one. divergence: whether it reads `totals["kl"]`.
    scored: the model gives answers scores instead of log-probabilities.
    matching: how it sorts the global batch's pairs: as pairs, as single answers, or not at all.
    """

    loss: Callable[[Scores, ObjectiveSection], Loss]
    unit: Unit
    reference: bool = False
    divergence: bool = False
    scored: bool = False
    matching: Literal["pairs", "answers"] | None = None
    weigh: Callable[[MicroBatch, ObjectiveSection], MicroBatch] | None = None
    options: ObjectiveSection = field(default_factory=ObjectiveSection)

    def __call__(self, scores: Scores) -> Loss:
        return self.loss(scores, self.options)


def sizes(batch: MicroBatch) -> dict[str, float]:
    """What a whole micro-batch holds: labels, and of the answers that aren't probes their number and labels, by kind.

    Without answers: labels, and the sum of their weights. Pairs: chosen_labels are those of the preferred answers.
    Otherwise desirable and undesirable are numbers of answers.
    """
    found = {"labels": float(batch.loss_mask.count_nonzero())}
    sequences = batch.sequences
    if sequences is None:
        return found | {"weight": float(batch.loss_mask.double().sum())}
    if sequences.desirable is None:
        chosen = (sequences.index >= 0) & (sequences.index % 2 == 0)
        return found | {"pairs": sequences.n / 2, "chosen_labels": float((batch.loss_mask * chosen).count_nonzero())}
    counted = ~sequences.probe if sequences.probe is not None else sequences.desirable.new_ones(sequences.n)
    good = float((sequences.desirable & counted).sum())
    answers = float(counted.sum())
    return found | {
        "answers": answers,
        "desirable": good,
        "undesirable": answers - good,
        "probes": sequences.n - answers,
    }
