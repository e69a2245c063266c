"""Supervised fine-tuning and pretraining: the mean negative log-likelihood of the labels that count."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcore_swift.objectives.objective import Loss, Scores

if TYPE_CHECKING:
    from mcore_swift.recipe import ObjectiveSection


def sft(scores: Scores, options: ObjectiveSection) -> Loss:
    """−Σ log p over labels whose mask is 1, to be divided by their number over the global batch.

    DFT (Wu et al. 2025, arXiv:2508.05629, equation 9) weighs each label by its own probability, as a constant.
    """
    logps, mask = scores.logps, scores.batch.loss_mask
    weighted = logps * logps.detach().exp() if options.dft else logps
    return Loss(total=-(weighted * mask).sum(), count=mask.count_nonzero().int(), metrics={})
