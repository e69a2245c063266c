"""The core attention of the CPU platform, in plain torch."""

from __future__ import annotations

from typing import Any, cast

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor, nn


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
