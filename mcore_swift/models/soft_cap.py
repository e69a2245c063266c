"""Attention with soft-capped scores (Gemma 2): cap · tanh(score / cap) is what the softmax gets.

torch's attention function has no place for the cap, and Transformer Engine's neither: so this is the layers' core
attention on CUDA, too. It holds the scores of a whole document, in memory that grows with the square of its length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mcore_swift.models.attention import TorchAttention
from mcore_swift.models.config import DecoderConfig


class CappedAttention(TorchAttention):
    """TorchAttention whose scores are capped to ± `config.attn_logit_softcapping`."""

    def __init__(self, config: DecoderConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        assert config.attn_logit_softcapping is not None
        self.cap = config.attn_logit_softcapping

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [b, heads, s, d], key, value [b, groups, t, d] → [b, heads, s, d]."""
        queries, keys = query.size(2), key.size(2)
        positions = self._positions(queries, keys).to(query.device)
        distance = positions[:, None] - torch.arange(keys, device=query.device)[None, :]
        visible = (distance >= 0) & (distance <= (keys if self.window is None else self.window))
        grouped = query.unflatten(1, (key.size(1), -1))  # [b, groups, heads of a group, s, d]
        scale = query.size(-1) ** -0.5 if self.scale is None else self.scale
        scores = torch.tanh(grouped @ key.unsqueeze(2).mT * scale / self.cap) * self.cap
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1, dtype=torch.float32).to(value.dtype)
        weights = nn.functional.dropout(weights, self.dropout, self.training)
        return (weights @ value.unsqueeze(2)).flatten(1, 2)
