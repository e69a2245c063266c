"""Attention of whole documents in a model that computes each pair's prompt once (`data.shared_prompts`).

Between the product of queries, keys and values and the attention's output each shared position is there twice, once for
each of its documents. Megatron's own code in between, rotary positions and attention, sees the packed documents that it
always sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn

from mcore_swift.data.batch import SharedPrompts


@dataclass
class SharedParams(PackedSeqParams):
    """Of whole documents, and which of their positions are computed. Layers get it, when they compute again, too."""

    shared: SharedPrompts | None = None


class _Whole(torch.autograd.Function):
    """[s, …], the computed positions → [whole, …], each where it stands; a sum of at most two gradients comes back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, shared: SharedPrompts) -> Tensor:
        ctx.shared = shared
        return values.index_select(0, shared.rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        shared: SharedPrompts = ctx.shared
        found = grads[0].index_select(0, shared.positions)
        return found.index_add_(0, shared.second_rows, grads[0].index_select(0, shared.second)), None


class _Computed(torch.autograd.Function):
    """[whole, …] → [s, …]. Of what is there twice one is taken: they are the same."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, shared: SharedPrompts) -> Tensor:
        ctx.shared, ctx.length = shared, len(values)
        return values.index_select(0, shared.positions)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        found = grads[0].new_zeros(ctx.length, *grads[0].shape[1:])
        return found.index_copy_(0, ctx.shared.positions, grads[0]), None


def attend_whole_documents(chunk: nn.Module) -> None:
    """Lets the chunk's attention take `SharedParams`."""
    from megatron.core.transformer.attention import SelfAttention

    every: list[Any] = list(chunk.modules())
    for module in every:
        if isinstance(module, SelfAttention):
            expansion = _Expansion(module.linear_qkv)
            module.register_forward_pre_hook(expansion.begin, with_kwargs=True)
            core: nn.Module = module.core_attention  # type: ignore[assignment]
            core.register_forward_hook(_contract, with_kwargs=True)


class _Expansion:
    """Of what a layer's product of queries, keys and values gives, with the adapters that are hung there later."""

    def __init__(self, linear: nn.Module) -> None:
        self.shared: SharedPrompts | None = None
        self.number = linear.register_forward_hook(self.end).id
        self.hooks: Any = linear._forward_hooks

    def begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.shared = getattr(kwargs.get("packed_seq_params"), "shared", None)
        if next(reversed(self.hooks)) != self.number:
            self.hooks.move_to_end(self.number)

    def end(self, module: nn.Module, args: Any, output: Any) -> Any:
        """output: [s, 1, …], with a bias or None behind it."""
        return output if self.shared is None else (_Whole.apply(output[0], self.shared), *output[1:])


def _contract(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Any:
    """Of the attention's output, [whole, …]."""
    shared = getattr(kwargs.get("packed_seq_params"), "shared", None)
    return output if shared is None else _Computed.apply(output, shared)
