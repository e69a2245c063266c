"""Transformer Engine's fused attention without what its module asks before each call.

For each layer and micro-batch the module checks its arguments anew, compares them with those that it chose a kernel
for, and opens and closes contexts for FP8, offloading and dropout: that takes the process longer than starting the
kernels, and a GPU that computes in FP8 waits for it. Here the first call of each kind goes through the module. If it
chose its fused kernel, the next calls of that kind start the same kernel with the same arguments.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

LAYOUT = "thd_thd_thd"
MASK = "padding_causal"


@dataclass(frozen=True)
class Call:
    """What both directions of a call are told, beside tensors."""

    longest: tuple[int, int]  # documents, of queries and of keys
    boundaries: tuple[Tensor, Tensor]  # of documents, int32 [n + 1], for queries and for keys
    backend: Any
    scale: float
    trained: bool  # whether there will be a backward pass
    deterministic: bool

    @property
    def words(self) -> dict[str, Any]:
        first, second = self.boundaries
        return {
            "cu_seqlens_q_padded": first,
            "cu_seqlens_kv_padded": second,
            "attn_scale": self.scale,
            "qkv_layout": LAYOUT,
            "o_format": "thd",
            "attn_mask_type": MASK,
            "window_size": (-1, 0),
        }


class _Attention(torch.autograd.Function):
    """query [t, heads, d], key and value [u, groups, d] → [t, heads, d]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
        out, kept = kernels().fused_attn_fwd(
            call.trained, *call.longest, *call.boundaries, query, key, value, query.dtype, call.backend, **call.words
        )[:2]
        ctx.call = call
        if call.trained:
            ctx.save_for_backward(query, key, value, out, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        query, key, value, out, *kept = ctx.saved_tensors
        found = kernels().fused_attn_bwd(
            *call.longest,
            *call.boundaries,
            query,
            key,
            value,
            out,
            grads[0].contiguous(),
            query.dtype,
            kept,
            call.backend,
            **call.words,
            do_format="thd",
            dqkv_layout=LAYOUT,
            deterministic=call.deterministic,
        )
        return *found[:3], None


def kernels() -> Any:
    return importlib.import_module("transformer_engine.pytorch.cpp_extensions.fused_attn")


def quicken_attention(chunk: nn.Module) -> None:
    """Lets all plain causal attention of Transformer Engine in the chunk start its kernels so, for packed documents."""
    kind = importlib.import_module("megatron.core.extensions.transformer_engine").TEDotProductAttention
    known: dict[tuple[Any, ...], Any] = {}
    every: list[Any] = list(chunk.modules())
    for module in every:
        if type(module) is kind and is_plain(module):
            vars(module)["forward"] = partial(attend, module, module.forward, known)


def is_plain(module: Any) -> bool:
    """Whether there is nothing in its attention but a causal mask, and nothing that watches it."""
    config = module.config
    eight_bit = config.fp8_dot_product_attention or config.fp8_multi_head_attention
    moved = config.cpu_offloading or config.fine_grained_activation_offloading
    # The module keeps count of its scales for these, and all ranks have to keep the same.
    remembered = config.fp8 and (config.recompute_granularity or config.fp8_recipe == "delayed")
    watched = config.qk_clip or config.log_max_attention_logit
    alone = config.context_parallel_size == 1 and config.softmax_type == "vanilla" and not module.attention_dropout
    causal = module.attn_mask_type in ("causal", MASK) and tuple(module.window_size or (-1, 0)) == (-1, 0)
    return alone and causal and not (eight_bit or moved or remembered or watched or module.fused_attention.use_FAv2_bwd)


def attend(
    module: Any,
    own: Callable[..., Tensor],
    known: dict[tuple[Any, ...], Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    attn_mask_type: Any,
    attention_bias: Tensor | None = None,
    packed_seq_params: Any = None,
    **more: Any,
) -> Tensor:
    """In place of TEDotProductAttention.forward; its own for the first call of each kind. `known`: the fused kernel
    that it chose for a kind, or None."""

    def through_module() -> Tensor:
        return own(query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params, **more)

    packed = packed_seq_params
    whole = query.is_contiguous() and key.is_contiguous() and value.is_contiguous()
    if packed is None or attention_bias is not None or more or not whole or attn_mask_type.name != "causal":
        return through_module()
    if packed.cu_seqlens_q_padded is not None or packed.cu_seqlens_kv_padded is not None:
        return through_module()
    longest = packed.max_seqlen_q, packed.max_seqlen_kv
    boundaries = packed.cu_seqlens_q, packed.cu_seqlens_kv
    sizes = query.shape, key.shape, value.shape, len(boundaries[0])
    what = (*sizes, *longest, query.dtype, module.training, module.softmax_scale)
    if what not in known:
        out = through_module()
        known[what] = _chosen()
        return out
    backend = known[what]
    if backend is None:
        return through_module()
    trained = module.training and torch.is_grad_enabled()
    call = Call(longest, boundaries, backend, module.softmax_scale, trained, module.deterministic)
    return _Attention.apply(query, key, value, call).flatten(1)


def _chosen() -> Any:
    """The fused kernel that the module's last call took; None: another one, or several might have been."""
    path = "transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention"
    last: dict[str, Any] = importlib.import_module(path)._attention_backends
    fused = last["use_fused_attention"] and not last["use_flash_attention"]
    arbitrary = kernels().FusedAttnBackend["F16_arbitrary_seqlen"]
    return last["fused_attention_backend"] if fused and last["fused_attention_backend"] == arbitrary else None
