"""ORPO (Hong et al. 2024, arXiv:2403.07691): likelihood of the preferred answer, and the answers' odds ratio."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import logsigmoid

from mcore_swift.objectives.objective import Loss, Mean, Scores
from mcore_swift.objectives.pairs import Sides, answers_of, loss_of_pairs, means

if TYPE_CHECKING:
    from torch import Tensor

    from mcore_swift.recipe import ObjectiveSection


def orpo(scores: Scores, options: ObjectiveSection) -> Loss:
    """Equation 6: −log π(y_w) − β log σ(log odds(y_w) − log odds(y_l)), p(y) the geometric mean over its labels.

    The likelihood term is a mean over the preferred answers' labels, prompts left out (its equation 1).
    """
    assert options.beta is not None
    logps = means(answers_of(scores))
    log_odds = logps.difference - (_log1mexp(logps.chosen) - _log1mexp(logps.rejected))
    ratio = logsigmoid(log_odds)
    rewards = Sides(options.beta * logps.chosen, options.beta * logps.rejected)
    loss = loss_of_pairs(scores, -options.beta * ratio, rewards, sft_weight=1.0)
    loss.metrics["log_odds"] = Mean(log_odds.detach().sum(), loss.metrics["accuracy"].count)
    return loss


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 − exp(x)) for x < 0, exact at both ends (Mächler 2012, "Accurately computing log(1 − exp(−|a|))")."""
    small = x > -math.log(2)
    near = torch.where(small, x, torch.full_like(x, -1.0))
    far = torch.where(small, torch.full_like(x, -1.0), x)
    return torch.where(small, (-near.expm1()).log(), (-far.exp()).log1p())
