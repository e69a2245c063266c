"""The layer that gives each token's hidden state a score: transformers' `score`, of one row and without a bias."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn


class ScoreHead(nn.Module):
    """Every tensor parallel rank holds it whole. Scores are computed in float32, whatever the model's dtype.

    weight: [1, hidden size]. Under sequence parallelism each rank scores its own tokens, so that its weight's gradient
    is a part of the whole one's; Megatron adds up those of parameters that are marked so.
    """

    def __init__(self, config: TransformerConfig, *, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))
        self.sequence_parallel, self.tp_group = config.sequence_parallel, tp_group
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.weight.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]

    @torch.no_grad()
    def initialize(self, *, std: float, seed: int) -> None:
        """Fills it as transformers does, from a normal distribution; with the same numbers at any layout."""
        values = torch.empty(self.weight.shape).normal_(0.0, std, generator=torch.Generator().manual_seed(seed))
        self.weight.copy_(values)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [s, b, h], or [s / tp, b, h] under sequence parallelism → float32 [b, s], the same on all ranks."""
        scores = nn.functional.linear(hidden.float(), self.weight.float()).squeeze(-1)
        if self.sequence_parallel:
            scores = gather_from_sequence_parallel_region(
                scores, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return scores.t().contiguous()
