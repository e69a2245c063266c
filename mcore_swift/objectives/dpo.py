"""Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290) and the losses that were derived from it.

Notation of the table below: c and r are the log-ratios log π(y|x) − log π_ref(y|x) of the preferred and the other
answer, d the difference of their scores (c − r, unless another f-divergence is chosen), b is β, e label smoothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import logsigmoid

from mcore_swift.objectives.objective import Loss, Scores
from mcore_swift.objectives.pairs import Sides, answers_of, loss_of_pairs, sides

if TYPE_CHECKING:
    from torch import Tensor

    from mcore_swift.data.batch import MicroBatch
    from mcore_swift.recipe import ObjectiveSection

LARGEST_EXPONENT = 80.0  # exp of it is still a float32


class Pair(NamedTuple):
    """A loss's arguments: float32 [pairs], except b and e."""

    c: Tensor
    r: Tensor
    d: Tensor
    norm: Tensor  # d with each answer's score divided by its number of labels
    x: Tensor  # log π(y_w|x) − log π(y_l|x)
    partners: Sides  # what sorted losses compare with, constants
    b: float
    e: float
    tau: float


def _exo(p: Pair) -> Tensor:
    """Ji et al. 2024, arXiv:2402.00856, equation 16 for two answers: KL(σ(b·d) ‖ 1 − e)."""
    z = p.b * p.d
    better = z.sigmoid() * (logsigmoid(z) - math.log1p(-p.e))
    return better + (-z).sigmoid() * (logsigmoid(-z) - math.log(p.e))


def _smoothed(z: Tensor, e: float) -> Tensor:
    return -(1 - e) * logsigmoid(z) - e * logsigmoid(-z)


def _aot_unpaired(p: Pair) -> Tensor:
    """Melnyk et al. 2024, arXiv:2406.05882, unpaired: sorted c minus sorted r. The term of c_i and its partner counts;
    that of r_i and its own is another pair's value, and is here for its gradient only."""
    counted = _smoothed(p.b * (p.c - p.partners.chosen), p.e)
    other = _smoothed(p.b * (p.partners.rejected - p.r), p.e)
    return counted + other - other.detach()


def _discopop(p: Pair) -> Tensor:
    """Lu et al. 2024, arXiv:2406.08414, equation 5."""
    z = p.b * p.d
    share = (z / p.tau).sigmoid()
    return (1 - share) * -logsigmoid(z) + share * (-z).exp()


LOSSES: dict[str, Callable[[Pair], Tensor]] = {
    # With e > 0 it is cDPO (Mitchell 2023, "A note on DPO with noisy preferences").
    "sigmoid": lambda p: _smoothed(p.b * p.d, p.e),
    "sigmoid_norm": lambda p: -logsigmoid(p.b * p.norm),
    # Zhao et al. 2023, arXiv:2305.10425.
    "hinge": lambda p: (1 - p.b * p.d).relu(),
    # Azar et al. 2023, arXiv:2310.12036, equation 17, on means over labels, as its authors advise.
    "ipo": lambda p: (p.norm - 1 / (2 * p.b)).square(),
    # Chowdhury et al. 2024, arXiv:2403.00409, equation 13.
    "robust": lambda p: (-(1 - p.e) * logsigmoid(p.b * p.d) + p.e * logsigmoid(-p.b * p.d)) / (1 - 2 * p.e),
    "exo_pair": _exo,
    # Chen et al. 2024, arXiv:2402.05369, equation 11 for two answers.
    "nca_pair": lambda p: -logsigmoid(p.b * p.c) - 0.5 * logsigmoid(-p.b * p.c) - 0.5 * logsigmoid(-p.b * p.r),
    # Jung et al. 2024, arXiv:2404.04656, without its reward shift.
    "bco_pair": lambda p: -logsigmoid(p.b * p.c) - logsigmoid(-p.b * p.r),
    # Wu et al. 2024, arXiv:2405.00675, equation 4.7 with probabilities 1 and 0.
    "sppo_hard": lambda p: (p.c - 0.5 / p.b).square() + (p.r + 0.5 / p.b).square(),
    # D'Oosterlinck et al. 2024, arXiv:2408.06266, equations 7 and 8.
    "apo_zero": lambda p: (-p.b * p.c).sigmoid() + (p.b * p.r).sigmoid(),
    "apo_down": lambda p: (p.b * p.c).sigmoid() + (-p.b * (p.c - p.r)).sigmoid(),
    "discopop": _discopop,
    # Melnyk et al., paired: sorted x minus the reference's, sorted.
    "aot": lambda p: _smoothed(p.b * (p.x - p.partners.chosen), p.e),
    "aot_unpaired": _aot_unpaired,
}


def _scores(ratios: Tensor, options: ObjectiveSection) -> Tensor:
    """The derivative of f at exp(ratios) (Wang et al. 2023, arXiv:2309.16240), up to a constant, which cancels."""
    if options.f_divergence == "forward_kl":
        return 1 - (-ratios).exp()
    if options.f_divergence == "js":
        return math.log(2) + logsigmoid(ratios)
    if options.f_divergence == "alpha" and options.f_alpha != 1.0:
        power = options.f_alpha - 1.0
        return ((power * ratios).clamp(max=LARGEST_EXPONENT).exp() - 1) / power
    return ratios


def dpo(scores: Scores, options: ObjectiveSection) -> Loss:
    """The mean over pairs of `options.loss`, or of the weighted sum of `options.losses`."""
    answers = answers_of(scores)
    assert answers.of.ref_logps is not None and options.beta is not None
    ratios = answers.logps - answers.of.ref_logps
    found = _scores(ratios, options)
    both = sides(ratios)
    pair = Pair(
        c=both.chosen,
        r=both.rejected,
        d=sides(found).difference,
        norm=sides(found / answers.lengths.clamp(min=1)).difference,
        x=sides(answers.logps).difference,
        partners=sides(torch.zeros_like(found) if answers.of.partners is None else answers.of.partners),
        b=options.beta,
        e=options.label_smoothing,
        tau=options.discopop_tau,
    )
    wanted = options.losses or {options.loss or "sigmoid": 1.0}
    losses = torch.stack([weight * LOSSES[name](pair) for name, weight in wanted.items()]).sum(0)
    rewards = Sides(options.beta * both.chosen, options.beta * both.rejected)
    return loss_of_pairs(scores, losses, rewards, sft_weight=options.sft_weight or 0.0)


def shorten(batch: MicroBatch, options: ObjectiveSection) -> MicroBatch:
    """LD-DPO (Liu et al. 2024, arXiv:2409.06411, equation 8): labels beyond the shorter answer's length weigh ld_alpha.

    On whole micro-batches; the weights are written into the loss mask.
    """
    sequences = batch.sequences
    if options.ld_alpha is None or sequences is None or sequences.n == 0:
        return batch
    labels = sequences.index[None] == torch.arange(sequences.n)[:, None, None]  # [n, b, s]
    labels &= batch.loss_mask > 0
    place = labels.flatten(1).cumsum(1).view_as(labels)  # of a label in its answer, from 1
    lengths = labels.flatten(1).sum(1)
    shared = torch.minimum(lengths[0::2], lengths[1::2]).repeat_interleave(2)
    tail = (labels & (place > shared[:, None, None])).any(0)
    return replace(batch, loss_mask=torch.where(tail, batch.loss_mask * options.ld_alpha, batch.loss_mask))
