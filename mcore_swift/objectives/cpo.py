"""Preference objectives without a reference: CPO (Xu et al. 2024, arXiv:2401.08417) and SimPO (Meng et al. 2024,
arXiv:2405.14734), which compares means over labels and asks for a margin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.functional import logsigmoid

from mcore_swift.objectives.objective import Loss, Scores
from mcore_swift.objectives.pairs import Sides, answers_of, loss_of_pairs, means, sides

if TYPE_CHECKING:
    from torch import Tensor

    from mcore_swift.recipe import ObjectiveSection


def cpo(scores: Scores, options: ObjectiveSection) -> Loss:
    """log σ(β (log π(y_w) − log π(y_l))), and the likelihood of y_w (its equation 3); hinge and ipo as DPO's.

    ipo compares means over labels, as DPO's does.
    """
    answers = answers_of(scores)
    rewards = _rewards(means(answers) if options.loss == "ipo" else sides(answers.logps), options)
    assert options.beta is not None
    if options.loss == "ipo":
        losses = (rewards.difference - 1 / (2 * options.beta)).square()
    elif options.loss == "hinge":
        losses = (1 - options.beta * rewards.difference).relu()
    else:
        losses = _smoothed(options.beta * rewards.difference, options.label_smoothing)
    return _finished(scores, losses, rewards, options)


def simpo(scores: Scores, options: ObjectiveSection) -> Loss:
    """−log σ(β (mean log π(y_w) − mean log π(y_l)) − γ) (its equation 6); with a likelihood term it is CPO-SimPO."""
    assert options.beta is not None and options.gamma is not None
    rewards = _rewards(means(answers_of(scores)), options)
    losses = _smoothed(options.beta * rewards.difference - options.gamma, options.label_smoothing)
    return _finished(scores, losses, rewards, options)


def _smoothed(z: Tensor, e: float) -> Tensor:
    return -(1 - e) * logsigmoid(z) - e * logsigmoid(-z)


def _rewards(logps: Sides, options: ObjectiveSection) -> Sides:
    """AlphaPO (Gupta et al. 2025, arXiv:2501.03884, equation 7): (1 − p^−α) / α in place of log p, its limit at 0."""
    alpha = options.alphapo
    if not alpha:
        return logps
    return Sides((1 - (-alpha * logps.chosen).exp()) / alpha, (1 - (-alpha * logps.rejected).exp()) / alpha)


def _finished(scores: Scores, losses: Tensor, rewards: Sides, options: ObjectiveSection) -> Loss:
    assert options.beta is not None and options.sft_weight is not None
    scaled = Sides(options.beta * rewards.chosen, options.beta * rewards.rejected)
    return loss_of_pairs(scores, losses, scaled, sft_weight=options.sft_weight)
