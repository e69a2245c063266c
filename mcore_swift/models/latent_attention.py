"""Multi-latent attention (MLA) as DeepSeek's models have it: Megatron-Core's layer, made to agree with transformers.

Queries, and keys with values, go through a narrow latent with a norm of its own; a part of each head, which all heads'
keys share, is rotated. DeepSeek-V2's report, arXiv 2405.04434, section 2.1.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from megatron.core.models.common.embeddings import RotaryEmbedding
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor
from torch.distributed import ProcessGroup

# transformers makes the norms of the latents without the config's rms_norm_eps.
LATENT_NORM_EPS = 1e-6
# What Transformer Engine's spec calls the norms that it fuses into the projections after them.
NORM_KEYS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}


class LatentRotary(RotaryEmbedding):
    """Rotary angles of the given frequencies, with the factor on cos and sin that Megatron's MLA asks YaRN's class for.

    frequencies: float32 [rotated dimensions / 2].
    """

    def __init__(self, frequencies: Tensor, factor: float, cp_group: ProcessGroup) -> None:
        super().__init__(2 * frequencies.numel(), rotary_percent=1.0, cp_group=cp_group)
        self.inv_freq = frequencies.to(self.inv_freq.device)
        self.factor = factor

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, float]:  # type: ignore[override]
        """As RotaryEmbedding's: (angles [length, 1, 1, rotated dimensions], factor)."""
        return super().forward(*args, **kwargs), self.factor

    def get_cached_cos_sin(
        self, seq_len: int, offset: int = 0, dtype: torch.dtype = torch.float32, packed_seq: bool = False
    ) -> tuple[Tensor, Tensor]:
        """What Megatron's fused kernel wants instead: cos and sin, the factor in them."""
        angles, factor = self.forward(seq_len, offset, packed_seq)
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


class LatentAttention(MLASelfAttention):
    """Megatron's MLA with three differences.

    The spec's modules are taken as they are: without a query latent, Megatron 0.19.2 would put a norm into the query
    projection that no model has. The latents' norms have transformers' epsilon. And where the projection to the latent
    is column parallel, as it is on the CPU, the gradient of the rotated keys, of which each TP rank has only its own
    heads' share, is added up: Megatron drops the other ranks' shares. (That needs sequence parallelism, which models
    with experts can't be trained without.)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for module in self.children():
            if hasattr(module, "eps"):  # a norm, or a projection with a norm in it
                cast(Any, module).eps = LATENT_NORM_EPS

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """hidden_states [s (/ tp with SP), b, h] → latent of queries; that of keys and values, with rotated keys."""
        query, combined = super()._qkv_down_projection(hidden_states)
        whole = self.config.kv_lora_rank + self.config.qk_pos_emb_head_dim
        if combined.size(-1) != whole and self.config.sequence_parallel:
            combined = gather_from_tensor_model_parallel_region(combined, group=self.tp_group)
            # What follows then gathers the rotated keys from the sequence parallel ranks, which adds up in backward.
            combined = scatter_to_sequence_parallel_region(combined, group=self.tp_group)
        return query, combined
