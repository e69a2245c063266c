"""From the product of queries, keys and values to all three, where their norms are frozen: one step of autograd.

Megatron splits the product's columns, copies the queries out, and norms queries and keys: on a GPU that is five kernels
forward and six backward, which only move numbers. Here one kernel reads the product, and one writes its gradient. Kept
for the backward pass are the product and a number a head.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mcore_swift.models.layers import RMSNorm
from mcore_swift.peft.frozen import Norm, kernels


@dataclass(frozen=True)
class Heads:
    """The heads of a rank's attention: `queries` of them for each key and value, of `size` numbers."""

    queries: int
    size: int
    of_queries: Norm
    of_keys: Norm

    def split(self, product: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """product [groups, queries + 2, size] → queries [groups, queries, size], keys and values [groups, 1, size], and
        what `join` wants to know. Groups: of all tokens."""
        if not product.is_cuda:
            return *self._one_by_one(product), None
        parts = product.split([self.queries, 1, 1], dim=1)
        query, key, value = (product.new_empty(part.shape) for part in parts)
        weights = self.of_queries.weight, self.of_keys.weight
        return query, key, value, kernels().heads(product, *weights, self.of_keys.eps, query, key, value)

    def join(self, grads: Sequence[Tensor], product: Tensor, kept: Tensor | None) -> Tensor:
        """The product's gradient from those of queries, keys and values, all shaped as `split` has them."""
        if kept is not None:
            weights = self.of_queries.weight, self.of_keys.weight
            return kernels().heads_backward(*(grad.contiguous() for grad in grads), product, *weights, kept)
        with torch.enable_grad():
            again = product.detach().requires_grad_()
            return torch.autograd.grad(self._one_by_one(again), again, grads)[0]

    def _one_by_one(self, product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = product.split([self.queries, 1, 1], dim=1)
        return self._normed(query, self.of_queries), self._normed(key, self.of_keys), value.contiguous()

    def _normed(self, part: Tensor, norm: Norm) -> Tensor:
        return nn.functional.rms_norm(part, (self.size,), norm.weight, norm.eps)


class _Heads(torch.autograd.Function):
    """product [s, b, groups · (queries + 2) · size] → queries [s, b, groups · queries, size], keys and values alike."""

    @staticmethod
    def forward(ctx: Any, product: Tensor, heads: Heads) -> tuple[Tensor, ...]:
        whole = product.reshape(-1, heads.queries + 2, heads.size)
        *found, kept = heads.split(whole)
        ctx.heads, ctx.shape = heads, product.shape
        ctx.save_for_backward(whole, kept)
        return tuple(part.view(*product.shape[:2], -1, heads.size) for part in found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        heads: Heads = ctx.heads
        whole, kept = ctx.saved_tensors
        shaped = [grad.reshape(len(whole), -1, heads.size) for grad in grads]
        return heads.join(shaped, whole, kept).view(ctx.shape), None


def join_heads(chunk: nn.Module) -> None:
    """Lets the chunk's attention take its queries, keys and values so, where it norms queries and keys head by head."""
    from megatron.core.transformer.attention import SelfAttention

    every: list[Any] = list(chunk.modules())
    for attention in every:
        own = getattr(type(attention), "get_query_key_value_tensors", None)
        if own is SelfAttention.get_query_key_value_tensors and (heads := _heads(attention)) is not None:
            vars(attention)["get_query_key_value_tensors"] = partial(
                _tensors, attention, heads, attention.get_query_key_value_tensors
            )


def _heads(attention: Any) -> Heads | None:
    """None: its heads aren't normed, or not so, or ranks share them."""
    size, groups = attention.hidden_size_per_attention_head, attention.num_query_groups_per_partition
    norms = [_norm(module, size) for module in (attention.q_layernorm, attention.k_layernorm)]
    shared = attention.config.num_query_groups < attention.world_size
    moved = attention.config.fine_grained_activation_offloading or attention.config.test_mode
    if norms[0] is None or norms[1] is None or norms[0].eps != norms[1].eps or shared or moved:
        return None
    return Heads(attention.num_attention_heads_per_partition // groups, size, norms[0], norms[1])


def _norm(module: Any, size: int) -> Norm | None:
    kinds: list[type] = [RMSNorm]
    if importlib.util.find_spec("transformer_engine") is not None:
        kinds.append(importlib.import_module("transformer_engine.pytorch").RMSNorm)
    if not isinstance(module, tuple(kinds)) or module.weight.numel() != size:
        return None
    centered = getattr(module, "zero_centered", False) or getattr(module, "zero_centered_gamma", False)
    return None if centered else Norm(module.weight, float(module.eps))


def _tensors(
    attention: Any,
    heads: Heads,
    own: Callable[..., Any],
    hidden: Tensor,
    key_value_states: Tensor | None = None,
    output_gate: bool = False,
    split_qkv: bool = True,
) -> Any:
    """In place of SelfAttention.get_query_key_value_tensors; its own, where a norm is trained."""
    trained = heads.of_queries.weight.requires_grad or heads.of_keys.weight.requires_grad
    if trained or output_gate or not split_qkv or key_value_states is not None:
        return own(hidden, key_value_states, output_gate=output_gate, split_qkv=split_qkv)
    return _Heads.apply(attention.linear_qkv(hidden)[0], heads)
