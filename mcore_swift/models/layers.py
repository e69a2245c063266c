"""The layer specs, and everything else that knows what GPTModel calls its parts.

Two specs: Transformer Engine's on CUDA, and a plain-torch one that gives the same mathematics on the CPU (with sequence
parallelism and packed sequences, which Megatron-Core's local spec refuses). Upstream is moving from GPTModel to
HybridModel: that change is this file's alone.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any, cast

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor, nn

from mcore_swift.platform import Platform


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm with the constructor Megatron-Core calls; marks its weight so that SP gradients are reduced."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class TorchAttention(nn.Module):
    """Causal attention by torch's scaled_dot_product_attention: packed (THD) or not, grouped queries, sliding window.

    query: [s, b, heads, head_dim], or packed [t, heads, head_dim]; key, value the same with query groups for heads.
    Returns [s, b, heads · head_dim], or packed [t, heads · head_dim]. Documents of a packed sequence, bounded by
    `cu_seqlens_q`, don't see each other.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        assert attn_mask_type is AttnMaskType.causal and attention_type == "self"
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)  # type: ignore[arg-type]
        self.window = config.window_size[0] if windowed and config.window_size else None
        self.dropout = config.attention_dropout
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        if packed_seq_params is None:  # [s, b, n, d] → [b, n, s, d]
            out = self._attend(*(t.permute(1, 2, 0, 3) for t in (query, key, value)))
            return out.permute(2, 0, 1, 3).flatten(2)
        lengths = cast(Tensor, packed_seq_params.cu_seqlens_q).diff().tolist()
        documents = zip(*(t.transpose(0, 1).split(lengths, dim=1) for t in (query, key, value)), strict=True)
        out = torch.cat([self._attend(q[None], k[None], v[None])[0] for q, k, v in documents if q.size(1)], dim=1)
        return out.transpose(0, 1).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [b, heads, s, d], key, value [b, groups, t, d] → [b, heads, s, d]; the queries are the last s of t."""
        queries, keys = query.size(2), key.size(2)
        mask = None
        windowed = self.window is not None and self.window < keys - 1
        if windowed or 1 < queries < keys:
            distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None, :]
            mask = (distance >= 0) & (distance <= (self.window if windowed else keys))  # type: ignore[operator]
        return nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and queries > 1,
            scale=self.scale,
            enable_gqa=query.size(1) != key.size(1),
        )


class FusedWgradLayer(TransformerLayer):
    """A layer whose linear layers add their weight gradients straight to the fp32 main gradients, inside the GEMM.

    Transformer Engine does that by itself, but Megatron's own output layer, which shares the config, would then ask for
    NVIDIA Apex: so only the layers get a config with the fusion on.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        fused = copy(config)
        fused.gradient_accumulation_fusion = True
        super().__init__(fused, *args, **kwargs)


def decoder_spec(
    config: TransformerConfig, platform: Platform, *, chunk: int | None
) -> ModuleSpec | TransformerBlockSubmodules:
    """The decoder's layers for this config on this platform. `chunk`: the number of this rank's chunk, if several."""
    if platform.layers == "transformer_engine":
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        return replace(spec, module=FusedWgradLayer)
    spec = get_gpt_layer_local_spec(normalization="LayerNorm", qk_layernorm=config.qk_layernorm)
    layer = cast(Any, spec.submodules)
    attention = layer.self_attention
    norms = {"q_layernorm": RMSNorm, "k_layernorm": RMSNorm} if config.qk_layernorm else {}
    attention = replace(attention, submodules=replace(attention.submodules, core_attention=TorchAttention, **norms))
    layer = replace(layer, input_layernorm=RMSNorm, self_attention=attention, pre_mlp_layernorm=RMSNorm)
    num_layers = get_num_layers_to_build(config, vp_stage=chunk)
    return TransformerBlockSubmodules([replace(spec, submodules=layer)] * num_layers, layer_norm=RMSNorm)


class _MaskPadding(torch.autograd.Function):
    """Sets the logits of vocabulary padding to −inf in place: padding must not take part in the softmax."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, first: int) -> Tensor:
        logits[..., first:] = torch.finfo(logits.dtype).min
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None  # the softmax there is exactly 0, and so is its gradient


class DecoderModel(GPTModel):
    """GPTModel whose loss leaves out vocabulary padding, with the family's own rotary frequencies.

    `true_vocab_size`: rows of the vocabulary that are real; the rest pads it to a multiple of the TP size.
    """

    true_vocab_size: int

    def set_rotary(self, frequencies: Tensor, factor: float) -> None:
        """Replaces the rotary frequencies; `factor` multiplies cos and sin (YaRN's attention factor)."""
        self.rotary_pos_emb.inv_freq = frequencies.to(self.rotary_pos_emb.inv_freq.device)
        for layer in self.decoder.layers:
            # Megatron derives this from YaRN-only config fields; transformers gives the number itself.
            cast(Any, layer.self_attention)._yarn_concentration_factor = factor

    def mask_padding(self, logits: Tensor) -> Tensor:
        """Masks this rank's share of vocabulary padding. logits: [..., vocabulary / tp], changed in place."""
        width = logits.size(-1)
        first = self.true_vocab_size - self.pg_collection.tp.rank() * width
        return _MaskPadding.apply(logits, max(first, 0)) if first < width else logits  # type: ignore[return-value]

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [b, s], logits [s, b, vocabulary / tp] → −log p of the labels, float32 [b, s]."""
        return super().compute_language_model_loss(labels, self.mask_padding(logits))
