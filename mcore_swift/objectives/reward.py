"""Reward models: which of two answers is better, by a score of each (Bradley and Terry 1952; Ouyang et al. 2022,
arXiv:2203.02155, equation 1)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import logsigmoid

from mcore_swift.objectives.objective import Loss, Scores
from mcore_swift.objectives.pairs import answers_of, loss_of_pairs, sides

if TYPE_CHECKING:
    from torch import Tensor

    from mcore_swift.recipe import ObjectiveSection


def rm(scores: Scores, options: ObjectiveSection) -> Loss:
    """−log σ(r_w − r_l − m) + c (r_w + r_l)², m the pair's margin (Touvron et al. 2023, arXiv:2307.09288, equation 2),
    0 where it has none; the square keeps scores near 0 (Eisenstein et al. 2023, arXiv:2312.09244, section 3.3)."""
    answers = answers_of(scores)
    rewards = sides(answers.logps)
    margin = torch.zeros_like(rewards.difference) if answers.of.margin is None else answers.of.margin
    losses = -logsigmoid(rewards.difference - margin)
    if options.centering:
        losses = losses + options.centering * (rewards.chosen + rewards.rejected).square()
    found = loss_of_pairs(scores, losses, rewards)
    metrics = {name: mean for name, mean in found.metrics.items() if not name.startswith("logp_")}
    extremes = _extremes("reward_chosen", rewards.chosen) | _extremes("reward_rejected", rewards.rejected)
    return replace(found, metrics=metrics, extremes=extremes)


def _extremes(name: str, values: Tensor) -> dict[str, Tensor]:
    end = values.new_full((1,), torch.inf)  # a micro-batch may hold no pair
    return {
        f"{name}_min": torch.cat([values.detach(), end]).min(),
        f"{name}_max": torch.cat([values.detach(), -end]).max(),
    }
