"""The core attention of the CPU platform, in plain torch."""

from __future__ import annotations

from typing import Any, cast

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor, nn

from mcore_swift.data.context_split import sequence_order, zigzag


class TorchAttention(nn.Module):
    """Causal attention by torch's scaled_dot_product_attention: packed (THD) or not, grouped queries, sliding window.

    query: [s, b, heads, head_dim], or packed [t, heads, head_dim]; key, value the same with query groups for heads.
    Returns [s, b, heads · head_dim], or packed [t, heads · head_dim]. Documents of a packed sequence, bounded by
    `cu_seqlens_q`, don't see each other.

    Under context parallelism s and t are this rank's share, cut in a zigzag (`data.context_split`); it gathers the keys
    and values of all ranks, and autograd scatters the sum of their gradients back. That is the mathematics of one rank,
    in whatever way Transformer Engine would be told to exchange them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        assert attn_mask_type is AttnMaskType.causal and attention_type == "self"
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)  # type: ignore[arg-type]
        self.window = config.window_size[0] if windowed and config.window_size else None
        self.dropout = config.attention_dropout
        self.scale = softmax_scale
        self.cp_group: Any = pg_collection.cp if config.context_parallel_size > 1 else None  # type: ignore[union-attr]

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
        cp = self.cp_group.size() if self.cp_group is not None else 1
        if packed_seq_params is None:  # [s, b, n, d] → [b, n, s, d]
            if cp > 1:
                key, value = self._gather(key, value, torch.tensor([0, cp * query.size(0)]))
            out = self._attend(*(t.permute(1, 2, 0, 3) for t in (query, key, value)))
            return out.permute(2, 0, 1, 3).flatten(2)
        boundaries = cast(Tensor, packed_seq_params.cu_seqlens_q)
        if cp > 1:
            key, value = self._gather(key, value, boundaries)
        lengths = boundaries.diff()
        queries = query.transpose(0, 1).split((lengths // cp).tolist(), dim=1)
        keys, values = (t.transpose(0, 1).split(lengths.tolist(), dim=1) for t in (key, value))
        documents = zip(queries, keys, values, strict=True)
        out = torch.cat([self._attend(q[None], k[None], v[None])[0] for q, k, v in documents if q.size(1)], dim=1)
        return out.transpose(0, 1).flatten(1)

    def _gather(self, key: Tensor, value: Tensor, boundaries: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's keys and values → those of all positions between `boundaries`, in order."""
        both = torch.cat([key, value], dim=-1)
        whole = gather_from_sequence_parallel_region(both, tensor_parallel_output_grad=True, group=self.cp_group)
        ordered = whole.index_select(0, sequence_order(boundaries, size=self.cp_group.size()).to(whole.device))
        return tuple(ordered.split([key.size(-1), value.size(-1)], dim=-1))  # type: ignore[return-value]

    def _positions(self, queries: int, keys: int) -> Tensor:
        """Where in a document of `keys` tokens the queries stand: at its end, or in this rank's chunks."""
        if self.cp_group is None:
            return torch.arange(keys - queries, keys)
        return zigzag(torch.tensor([0, keys]), size=self.cp_group.size(), rank=self.cp_group.rank())

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [b, heads, s, d], key, value [b, groups, t, d] → [b, heads, s, d]."""
        queries, keys = query.size(2), key.size(2)
        mask = None
        windowed = self.window is not None and self.window < keys - 1
        if windowed or 1 < queries < keys or self.cp_group is not None:
            distance = self._positions(queries, keys)[:, None] - torch.arange(keys)[None, :]
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
