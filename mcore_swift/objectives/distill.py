"""Knowledge distillation: the student's next-token distribution is drawn to that of a frozen teacher.

The divergences, and how they are computed of a vocabulary that ranks share out, are in `divergence.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcore_swift.objectives.objective import Loss, Mean, Scores

if TYPE_CHECKING:
    from mcore_swift.recipe import ObjectiveSection


def distill(scores: Scores, options: ObjectiveSection) -> Loss:
    """w D(teacher, student) − (1 − w) log p(label), a mean over the labels that count, as in sft. w: distill_weight.

    D is not multiplied by the temperature's square: as in TRL's GKDTrainer, unlike Hinton et al. 2015.
    """
    found, mask, weight = scores.distances, scores.batch.loss_mask, options.distill_weight
    assert found is not None, "a batch without a teacher"
    losses = weight * found.divergence
    if weight < 1:
        losses = losses - (1 - weight) * scores.logps
    count = mask.count_nonzero()
    shown = {
        "divergence": found.divergence,
        "kl": found.kl,
        "nll": -scores.logps,
        "agreement": found.agreement,
    }
    metrics = {name: Mean((values.detach() * mask).sum(), count) for name, values in shown.items()}
    return Loss(total=(losses * mask).sum(), count=count.int(), metrics=metrics)
