"""Megatron's router with the load balance counted exactly: over real tokens, and the same at every layout.

Megatron 0.19.2 weighs an auxiliary loss by this rank's tokens where a part of a sequence weighs as much as its real
tokens (sequence and context parallel ranks hold different numbers of them), gives the global loss 1 / DP of its weight,
can't leave padding out of the correction bias' counts, and counts in bfloat16 where the model is. Here every loss is
written as a sum over tokens, which is divided by the global batch's tokens at the end: see `training.balance`.

The losses, of E experts, with s_xi token x's normalized score of expert i and f_i the fraction of choices that went to
expert i (Switch Transformer, arXiv 2101.03961, section 2.2): E · Σ_i f_i · mean_x s_xi. They differ in what f counts:
  aux_loss         a micro-batch's tokens
  seq_aux_loss     a row's tokens (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)
  global_aux_loss  all data parallel ranks' tokens, in this and the step's earlier micro-batches (arXiv 2501.11873)
The z loss is the mean over tokens of logsumexp(logits)² (ST-MoE, arXiv 2202.08906, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

TOTALS = ("tokens", "aux_loss", "z_loss")  # what `Router.sums` holds after the counts


class Router(TopKRouter):
    """`sums`: float64 [experts + 3], this rank's since the last `reset`: choices an expert, tokens, aux loss, z loss.

    The losses in it are sums over tokens, without their coefficients.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.experts: int = self.num_experts  # type: ignore[assignment]  (None for a dense model, which has no router)
        self.frozen_expert_bias = config.moe_router_bias_update_rate == 0.0
        self.sums = torch.zeros(self.experts + len(TOTALS), dtype=torch.float64, device=torch.cuda.current_device())
        self._padding: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Buffers stay float32 when the model becomes bfloat16: one counts tokens, the other grows by 0.001 a step."""
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            self._buffers[name] = buffer if buffer is None else buffer.float()
        return self

    def reset(self) -> None:
        self.sums.zero_()

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits [s, b, experts]; padding_mask bool [s, b], true for padding → weights and choices [s · b, experts]."""
        self._padding = padding_mask
        return super().routing(logits)  # its own ways to leave padding out are those of the module's docstring

    @property
    def _counting(self) -> bool:
        """False in evaluation, and in the forward pass that a recomputation will repeat."""
        return self.training and torch.is_grad_enabled()

    def _real(self, values: Tensor) -> Tensor:
        """values [s · b, …], 0 for padding."""
        if self._padding is None:
            return values
        return values.masked_fill(self._padding.reshape(-1, *[1] * (values.dim() - 1)), 0)

    def _note(self, name: str, value: Tensor) -> None:
        self.sums[self.experts + TOTALS.index(name)] += value.detach()

    # --- what Megatron's routing calls ----------------------------------------------------------------------------

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        if not self.config.moe_z_loss_coeff or not self._counting:
            return logits
        loss = self._real(logits.logsumexp(-1).square()).sum()
        self._note("z_loss", loss)
        return MoEAuxLossAutoScaler.apply(logits, self.config.moe_z_loss_coeff * loss)  # type: ignore[return-value]

    def _apply_aux_loss(self, probs: Tensor, scores: Tensor, choices: Tensor, **_: Any) -> Tensor:
        if not self.get_aux_loss_coeff("aux_loss"):
            return probs
        counts = _summed(self._real(choices).sum(0), self.tp_cp_group)
        return self._attach("aux_loss", probs, scores, counts)

    def _apply_seq_aux_loss(
        self, probs: Tensor, scores: Tensor, choices: Tensor, seq_length: int, bsz: int, **_: Any
    ) -> Tensor:
        if not self.get_aux_loss_coeff("seq_aux_loss"):
            return probs
        counts = _summed(self._real(choices).view(seq_length, bsz, -1).sum(0), self.tp_cp_group)
        return self._attach("seq_aux_loss", probs, scores.view(seq_length, bsz, -1), counts)

    def _apply_global_aux_loss(self, probs: Tensor, scores: Tensor, choices: Tensor, **_: Any) -> Tensor:
        if not self.get_aux_loss_coeff("global_aux_loss"):
            return probs
        assert self.global_tokens_per_expert is not None  # Megatron zeroes it after each step
        self.global_tokens_per_expert += _summed(self._real(choices).sum(0), self.tp_dp_cp_group)
        return self._attach("global_aux_loss", probs, scores, self.global_tokens_per_expert)

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        if not self._counting:
            return
        counts = self._real(routing_map).sum(0)
        self.sums[: self.experts] += counts
        padding = 0 if self._padding is None else self._padding.sum()
        self._note("tokens", routing_map.size(0) - torch.as_tensor(padding))
        if self.local_tokens_per_expert is not None:  # Megatron moves the correction bias by it after the step
            self.local_tokens_per_expert += counts

    def _attach(self, kind: str, probs: Tensor, scores: Tensor, counts: Tensor) -> Tensor:
        """Adds the loss to what `probs` is differentiated for. scores [tokens, …, experts], counts […, experts]."""
        fractions = counts / counts.sum(-1, keepdim=True).clamp(min=1)
        real = self._real(scores.flatten(0, -2)).view_as(scores)
        loss = self.experts * (real.sum(0) * fractions).sum()
        self._note("aux_loss", loss)
        return MoEAuxLossAutoScaler.apply(probs, self.get_aux_loss_coeff(kind) * loss)  # type: ignore[return-value]


@torch.no_grad()
def _summed(counts: Tensor, group: Any) -> Tensor:
    counts = counts.float()
    if group is not None and group.size() > 1:
        dist.all_reduce(counts, group=group)
    return counts


def with_router(mlp: Any) -> Any:
    """A layer spec's feed-forward half, with the router above where it has experts."""
    submodules = getattr(mlp, "keywords", {}).get("submodules")
    if not isinstance(submodules, MoESubmodules):
        return mlp
    return partial(mlp, submodules=replace(submodules, router=Router))
