"""Supervised fine-tuning and pretraining: the mean negative log-likelihood of the labels that count."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcore_swift.objectives.objective import Loss

if TYPE_CHECKING:
    from torch import Tensor

    from mcore_swift.data.batch import MicroBatch


def sft(logps: Tensor, ref_logps: Tensor | None, batch: MicroBatch) -> Loss:
    """−Σ log p over labels whose mask is 1, to be divided by their number over the global batch."""
    return Loss(total=-(logps * batch.loss_mask).sum(), count=batch.loss_mask.sum().int(), metrics={})
