"""What objectives over pairs of answers share: the pair's two sides, the likelihood term, the metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mcore_swift.objectives.objective import Answers, Loss, Mean, Scores

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sides:
    """One number of each pair's preferred answer and of the other: float32 [pairs]."""

    chosen: Tensor
    rejected: Tensor

    @property
    def difference(self) -> Tensor:
        return self.chosen - self.rejected


def sides(values: Tensor) -> Sides:
    """values: float32 [n], answer 2i is the preferred one of pair i, answer 2i + 1 the other."""
    return Sides(values[0::2], values[1::2])


def answers_of(scores: Scores) -> Answers:
    assert scores.answers is not None and scores.answers.of.desirable is None, "a batch without pairs"
    return scores.answers


def means(answers: Answers) -> Sides:
    """Mean log-probability of an answer's labels."""
    return sides(answers.logps / answers.lengths.clamp(min=1))


def loss_of_pairs(scores: Scores, losses: Tensor, rewards: Sides, *, sft_weight: float = 0.0) -> Loss:
    """The loss of a micro-batch from each pair's: losses float32 [pairs]; `rewards` are for display.

    `sft_weight` times the preferred answers' negative log-likelihood is added: a mean over all their labels in the
    global batch, while the loss itself is a mean over pairs.
    """
    answers = answers_of(scores)
    if answers.of.weight is not None:
        losses = losses * answers.of.weight[0::2]
    total = losses.sum()
    likelihood = -sides(answers.plain).chosen.sum()
    if sft_weight:
        total = total + sft_weight * (scores.totals["pairs"] / scores.totals["chosen_labels"]).float() * likelihood
    count = losses.new_full((), len(losses), dtype=torch.int32)  # made on the device: a copy would wait for the pass
    rewards = Sides(rewards.chosen.detach(), rewards.rejected.detach())
    logps = sides(answers.logps.detach())
    metrics = {
        "reward_chosen": Mean(rewards.chosen.sum(), count),
        "reward_rejected": Mean(rewards.rejected.sum(), count),
        "accuracy": Mean((rewards.difference > 0).float().sum(), count),
        "logp_chosen": Mean(logps.chosen.sum(), count),
        "logp_rejected": Mean(logps.rejected.sum(), count),
    }
    if sft_weight:
        metrics["nll"] = Mean(likelihood.detach(), sides(answers.lengths).chosen.sum())
    return Loss(total=total, count=count, metrics=metrics)
