"""What an objective is: a pure function of per-token log-probabilities.

Everything around it (vocabulary-parallel log-probabilities, packing, pipeline stages, reductions) is written once in
`training/step.py`, so an objective is a page of arithmetic, and is the same at any layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from mcore_swift.data.batch import MicroBatch


@dataclass(frozen=True)
class Loss:
    """A micro-batch's loss, not yet divided.

    `total` (float32 scalar) is the sum to minimize, `count` (int32 scalar) what it is divided by, after both are summed
    over the global batch: so the number depends neither on the layout nor on the micro-batch size. `metrics` are
    further sums that are divided by `count` for display.
    """

    total: Tensor
    count: Tensor
    metrics: dict[str, Tensor]


class Objective(Protocol):
    def __call__(self, logps: Tensor, ref_logps: Tensor | None, batch: MicroBatch) -> Loss:
        """logps, ref_logps: float32 [b, s], log-probability of each label under the policy and the reference."""
        ...
