"""Supervised fine-tuning and pretraining: the mean negative log-likelihood of the labels that count."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcore_swift.objectives.objective import Loss, Scores

if TYPE_CHECKING:
    from mcore_swift.recipe import ObjectiveSection


def sft(scores: Scores, options: ObjectiveSection) -> Loss:
    """−Σ w log p over labels whose mask w isn't 0, to be divided by Σ w over the global batch.

    w is 1, unless rows have weights. Megatron divides gradients by whole numbers, here by the number of labels, so the
    sum is multiplied by that over Σ w. DFT (Wu et al. 2025, arXiv:2508.05629, equation 9) weighs each label by its
    own probability, too, as a constant.
    """
    logps, mask = scores.logps, scores.batch.loss_mask
    weighted = logps * logps.detach().exp() if options.dft else logps
    total, count = -(weighted * mask).sum(), mask.count_nonzero().int()
    if not scores.batch.weighted:
        return Loss(total=total, count=count, metrics={})
    whole = scores.totals["weight"].clamp(min=1e-30)  # 0 where no label counts at all
    return Loss(total * (scores.totals["labels"] / whole).float(), count, metrics={}, tally=mask.sum())
