"""Label smoothing (Szegedy et al. 2016, arXiv:1512.00567, section 7) over a vocabulary that ranks share out.

A label's loss is (1 − e) (−log p_y) + e mean_v (−log p_v) = −log p_y + e (z_y − mean_v z_v), z the logits: what is
added is linear in them, and needs no softmax. Megatron-Core 0.19.2 has an option of the same name, whose mean is over a
rank's own part of the vocabulary, with its padding.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor


class _LabelMinusMean(torch.autograd.Function):
    """A rank's share of z_y − mean_v z_v. Of the logits nothing is kept: what follows may overwrite them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, first: int, real: int, vocab_size: int) -> Tensor:
        own = (labels >= first) & (labels < first + real)
        columns = torch.where(own, labels - first, 0).unsqueeze(-1)
        ctx.save_for_backward(own, columns)
        ctx.like, ctx.real, ctx.vocab_size = (logits.shape, logits.dtype), real, vocab_size
        label = torch.where(own, logits.gather(-1, columns).squeeze(-1).float(), 0.0)
        return label - logits[..., :real].sum(-1, dtype=torch.float32) / vocab_size

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        own, columns = ctx.saved_tensors
        shape, dtype = ctx.like
        found = torch.zeros(shape, dtype=dtype, device=own.device)
        found[..., : ctx.real] = (-grads[0] / ctx.vocab_size).unsqueeze(-1)
        return found.scatter_add_(-1, columns, (grads[0] * own).unsqueeze(-1).to(dtype)), None, None, None, None


def label_minus_mean(
    logits: Tensor, labels: Tensor, *, vocab_size: int, group: torch.distributed.ProcessGroup
) -> Tensor:
    """logits [s, b, padded vocabulary / tp], labels int64 [b, s] → z_y − mean_v z_v, float32 [b, s], on each rank.

    Columns beyond `vocab_size` are padding, and are left out.
    """
    width = logits.size(-1)
    first = group.rank() * width
    real = min(max(vocab_size - first, 0), width)
    share: Any = _LabelMinusMean.apply(logits, labels.t(), first, real, vocab_size)
    whole: Any = reduce_from_tensor_model_parallel_region(share, group=group)
    return whole.t().contiguous()
