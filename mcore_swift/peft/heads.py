"""From the product of queries, keys and values to all three, where their norms are frozen: one step of autograd.

Megatron splits the product's columns, copies the queries out, norms queries and keys, and turns them by the angles of
their positions (RoPE, arXiv:2104.09864): on a GPU that is seven kernels forward and eight backward, which only move
numbers. Here one kernel reads the product, and one writes its gradient. Kept for the backward pass are the product and
a number a head; cosines and sines are computed once for all layers.
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

Angles = tuple[Tensor, Tensor]  # cosines and sines, float32 [tokens, size / 2]
# float32 [positions, 1, 1, size], of both halves of a head alike; the boundaries of packed documents, whose positions
# begin with 0, or None; the factor of cosines and sines
Turning = tuple[Tensor, Tensor | None, float]


@dataclass(frozen=True)
class Heads:
    """The heads of a rank's attention: `queries` of them for each key and value, of `size` numbers."""

    queries: int
    size: int
    of_queries: Norm
    of_keys: Norm

    def split(self, product: Tensor, angles: Angles | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """product [groups, queries + 2, size] → queries [groups, queries, size], keys and values [groups, 1, size], and
        what `join` wants to know. Groups: of all tokens, in order. angles: of the tokens; None: nothing is turned."""
        if not product.is_cuda:
            return *self._one_by_one(product, angles), None
        parts = product.split([self.queries, 1, 1], dim=1)
        query, key, value = (product.new_empty(part.shape) for part in parts)
        weights = self.of_queries.weight, self.of_keys.weight
        return query, key, value, kernels().heads(product, *weights, self.of_keys.eps, angles, query, key, value)

    def join(
        self, grads: Sequence[Tensor], product: Tensor, kept: Tensor | None, angles: Angles | None = None
    ) -> Tensor:
        """The product's gradient from those of queries, keys and values, all shaped as `split` has them."""
        if kept is not None:
            weights = self.of_queries.weight, self.of_keys.weight
            return kernels().heads_backward(*(grad.contiguous() for grad in grads), product, *weights, angles, kept)
        with torch.enable_grad():
            again = product.detach().requires_grad_()
            return torch.autograd.grad(self._one_by_one(again, angles), again, grads)[0]

    def _one_by_one(self, product: Tensor, angles: Angles | None) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = product.split([self.queries, 1, 1], dim=1)
        query, key = self._normed(query, self.of_queries), self._normed(key, self.of_keys)
        return _turned(query, angles), _turned(key, angles), value.contiguous()

    def _normed(self, part: Tensor, norm: Norm) -> Tensor:
        return nn.functional.rms_norm(part, (self.size,), norm.weight, norm.eps)


def _turned(part: Tensor, angles: Angles | None) -> Tensor:
    """[groups, heads, size], the same: each number of the first half turned with its partner in the second."""
    if angles is None:
        return part
    cosines, sines = (values.to(part.dtype)[:, None, None] for values in angles)
    first, second = part.view(len(cosines), -1, *part.shape[1:]).chunk(2, dim=-1)
    turned = torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)
    return turned.view(part.shape)


class _Heads(torch.autograd.Function):
    """product [s, b, groups · (queries + 2) · size] → queries [s, b, groups · queries, size], keys and values alike."""

    @staticmethod
    def forward(ctx: Any, product: Tensor, heads: Heads, angles: Angles | None) -> tuple[Tensor, ...]:
        whole = product.reshape(-1, heads.queries + 2, heads.size)
        *found, kept = heads.split(whole, angles)
        ctx.heads, ctx.angles, ctx.shape = heads, angles, product.shape
        ctx.save_for_backward(whole, kept)
        return tuple(part.view(*product.shape[:2], -1, heads.size) for part in found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        heads: Heads = ctx.heads
        whole, kept = ctx.saved_tensors
        shaped = [grad.reshape(len(whole), -1, heads.size) for grad in grads]
        return heads.join(shaped, whole, kept, ctx.angles).view(ctx.shape), None, None


class _Angles:
    """Cosines and sines of a micro-batch's tokens, for all layers that get the same table of angles."""

    def __init__(self) -> None:
        self._last: tuple[Any, ...] = ()
        self._found: Angles | None = None

    def __call__(self, turning: Turning, length: int, rows: int) -> Angles:
        """Of [length, rows] tokens, in order; rows: 1 where documents are packed."""
        table, boundaries, factor = turning
        # A layer that is computed again gets another tensor for the table, of the same memory.
        same = self._last and table.data_ptr() == self._last[0].data_ptr() and boundaries is self._last[1]
        if not same or self._last[2:] != (table.shape, factor, length, rows):
            half = table.flatten(1)[:, : table.size(-1) // 2]
            each = half[:length].repeat_interleave(rows, 0) if boundaries is None else half[_places(boundaries, length)]
            self._found = each.cos() * factor, each.sin() * factor
            self._last = table, boundaries, table.shape, factor, length, rows
        assert self._found is not None
        return self._found


def _places(boundaries: Tensor, tokens: int) -> Tensor:
    """int32 [tokens]: where in its document each token of a pack is."""
    places = torch.arange(tokens, dtype=torch.int32, device=boundaries.device)
    return places - boundaries[torch.searchsorted(boundaries, places, right=True) - 1]


class _Tensors:
    """In place of SelfAttention.get_query_key_value_tensors; its own, where a norm is trained."""

    def __init__(self, attention: Any, heads: Heads, angles: _Angles) -> None:
        self.attention, self.heads, self.angles = attention, heads, angles
        self.own: Callable[..., Any] = attention.get_query_key_value_tensors
        self.turning: Turning | None = None  # how the next ones are to be turned

    def applies(self) -> bool:
        return not (self.heads.of_queries.weight.requires_grad or self.heads.of_keys.weight.requires_grad)

    def __call__(
        self,
        hidden: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> Any:
        turning, self.turning = self.turning, None
        if not self.applies() or output_gate or not split_qkv or key_value_states is not None:
            assert turning is None
            return self.own(hidden, key_value_states, output_gate=output_gate, split_qkv=split_qkv)
        product = self.attention.linear_qkv(hidden)[0]
        angles = None if turning is None else self.angles(turning, *product.shape[:2])
        return _Heads.apply(product, self.heads, angles)


def join_heads(chunk: nn.Module) -> None:
    """Lets the chunk's attention take its queries, keys and values so, where it norms queries and keys head by head."""
    from megatron.core.transformer.attention import Attention, SelfAttention

    every: list[Any] = list(chunk.modules())
    angles = _Angles()
    for attention in every:
        own = getattr(type(attention), "get_query_key_value_tensors", None)
        if own is SelfAttention.get_query_key_value_tensors and (heads := _heads(attention)) is not None:
            tensors = _Tensors(attention, heads, angles)
            vars(attention)["get_query_key_value_tensors"] = tensors
            if type(attention).forward is Attention.forward and _turns_in_halves(attention.config):
                vars(attention)["forward"] = partial(_attend, attention, tensors, attention.forward)


def _turns_in_halves(config: Any) -> bool:
    """Whether a position's angles are those of the table's row, and each number's partner is half a head away."""
    other = config.rotary_interleaved or config.no_rope_freq or config.mrope_section or config.attention_output_gate
    return not other and not config.fused_single_qkv_rope and config.context_parallel_size == 1


def _attend(
    attention: Any, tensors: _Tensors, own: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """In place of SelfAttention.forward, which then turns nothing; its own to infer, or to turn parts of heads."""
    table: Any = kwargs.get("rotary_pos_emb")
    packed = kwargs.get("packed_seq_params")
    whole = isinstance(table, Tensor) and table.size(-1) == tensors.heads.size
    if args or not whole or not tensors.applies() or kwargs.get("inference_context") is not None:
        return own(hidden, *args, **kwargs)
    boundaries = None
    if packed is not None:
        boundaries = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
    tensors.turning = table, boundaries, attention._yarn_concentration_factor
    return own(hidden, **(kwargs | {"rotary_pos_emb": None}))


def _heads(attention: Any) -> Heads | None:
    """None: its heads aren't normed, or not so, or ranks share them."""
    size, groups = attention.hidden_size_per_attention_head, attention.num_query_groups_per_partition
    norms = [_norm(module, size) for module in (attention.q_layernorm, attention.k_layernorm)]
    shared = attention.config.num_query_groups < attention.world_size
    moved = attention.config.fine_grained_activation_offloading or attention.config.test_mode
    if norms[0] is None or norms[1] is None or norms[0].eps != norms[1].eps or shared or moved or size % 2:
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
