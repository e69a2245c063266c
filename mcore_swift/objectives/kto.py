"""KTO (Ethayarajh et al. 2024, arXiv:2402.01306): answers that are judged one by one, good or bad."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mcore_swift.objectives.objective import Loss, Mean, Scores

if TYPE_CHECKING:
    from mcore_swift.recipe import ObjectiveSection


def kto(scores: Scores, options: ObjectiveSection) -> Loss:
    """Its equation 7: λ (1 − σ(β (r − z))) of good answers, λ (1 − σ(β (z − r))) of bad ones, r the log-ratios.

    z is the divergence from the reference, estimated over the global batch's probes, never below 0 and a constant.
    apo_zero_unpaired (D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 7 for single answers) takes z = 0.
    """
    answers = scores.answers
    assert answers is not None and answers.of.ref_logps is not None and options.beta is not None
    good, counted = answers.of.desirable, torch.ones_like(answers.logps)
    assert good is not None, "a batch of pairs"
    if answers.of.probe is not None:
        counted = (~answers.of.probe).float()
    ratios = answers.logps - answers.of.ref_logps
    shift = scores.totals["kl"].float() if options.loss != "apo_zero_unpaired" else torch.zeros_like(ratios)
    sign = good.float() * 2 - 1
    weight = torch.where(good, options.desirable_weight, options.undesirable_weight) * counted
    if answers.of.weight is not None:
        weight = weight * answers.of.weight
    total = (weight * (-sign * options.beta * (ratios - shift)).sigmoid()).sum()

    kinds = {"chosen": good.float() * counted, "rejected": (~good).float() * counted}
    rewards, logps = options.beta * ratios.detach(), answers.logps.detach()
    metrics = {f"reward_{name}": Mean((rewards * kind).sum(), kind.sum()) for name, kind in kinds.items()}
    metrics |= {f"logp_{name}": Mean((logps * kind).sum(), kind.sum()) for name, kind in kinds.items()}
    if options.loss != "apo_zero_unpaired":
        metrics["kl"] = Mean(shift * counted.sum(), counted.sum())
    return Loss(total=total, count=counted.sum().int(), metrics=metrics)
