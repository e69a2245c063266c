"""Qwen3 MoE: Qwen3's attention; softmax over all experts, the top k renormalized; dense layers possible between."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcore_swift.models.family import (
    DECODER_ROWS,
    SLIDING_WINDOW_BY_LAYER,
    ConfigRow,
    Family,
    HFConfig,
    only,
    same,
)
from mcore_swift.models.qwen3 import QK_NORM
from mcore_swift.weights.rules import ATTENTION, EMBEDDINGS, EXPERTS, GATED_MLP

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig


def _read_sparse_layers(config: HFConfig) -> dict[str, object]:
    dense = set(config.mlp_only_layers or ())
    layers = range(config.num_hidden_layers)
    return {"moe_layer_freq": [int(i not in dense and (i + 1) % config.decoder_sparse_step == 0) for i in layers]}


def _write_sparse_layers(config: TransformerConfig) -> dict[str, object]:
    flags: list[int] = config.moe_layer_freq  # type: ignore[assignment]
    return {"decoder_sparse_step": 1, "mlp_only_layers": [i for i, moe in enumerate(flags) if not moe]}


SPARSE_LAYERS = ConfigRow(_read_sparse_layers, _write_sparse_layers)
# Softmax after the choice of the top k is softmax before it, renormalized.
NORM_TOPK = ConfigRow(
    lambda config: {"moe_router_pre_softmax": not config.norm_topk_prob},
    lambda config: {"norm_topk_prob": not config.moe_router_pre_softmax},
)
EXPERT_ROWS = (
    same("num_experts", "num_moe_experts"),
    same("num_experts_per_tok", "moe_router_topk"),
    same("moe_intermediate_size", "moe_ffn_hidden_size"),
)

QWEN3_MOE = Family(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    architecture="Qwen3MoeForCausalLM",
    rows=(
        *DECODER_ROWS,
        *EXPERT_ROWS,
        SPARSE_LAYERS,
        NORM_TOPK,
        QK_NORM,
        only("attention_bias", False, default=False),
        SLIDING_WINDOW_BY_LAYER,
    ),
    rules=EMBEDDINGS + ATTENTION + GATED_MLP + EXPERTS,
    requires={"transformers": "4.51"},
)
