"""Attention sinks (gpt-oss): each head has a learned logit that takes part in the softmax and belongs to no token.

A head can so attend to nothing at all: exp(sink) stands in the denominator, and no value goes with it. On CUDA
Transformer Engine has them; here are the CPU's, under the same global key.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from mcore_swift.models.attention import TorchAttention


class SinkAttention(TorchAttention):
    """TorchAttention with sinks: `softmax_offset`, a logit for each of this rank's heads."""

    def __init__(
        self, config: TransformerConfig, *args: Any, pg_collection: ProcessGroupCollection, **kwargs: Any
    ) -> None:
        super().__init__(config, *args, pg_collection=pg_collection, **kwargs)
        self.tp_group = pg_collection.tp
        heads = config.num_attention_heads // self.tp_group.size()
        self.softmax_offset = nn.Parameter(torch.zeros(heads, dtype=config.params_dtype))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [b, heads, s, d], key, value [b, groups, t, d] → [b, heads, s, d]."""
        queries, keys = query.size(2), key.size(2)
        distance = self._positions(queries, keys)[:, None] - torch.arange(keys)[None, :]
        visible = (distance >= 0) & (distance <= (keys if self.window is None else self.window))
        grouped = query.unflatten(1, (key.size(1), -1))  # [b, groups, heads of a group, s, d]
        scale = query.size(-1) ** -0.5 if self.scale is None else self.scale
        scores = (grouped @ key.unsqueeze(2).mT * scale).masked_fill(~visible, float("-inf"))
        sinks = self.softmax_offset.view(1, key.size(1), -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1, dtype=torch.float32)[..., :-1].to(value.dtype)
        weights = nn.functional.dropout(weights, self.dropout, self.training)
        return (weights @ value.unsqueeze(2)).flatten(1, 2)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """The sinks are cut by heads over TP."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
