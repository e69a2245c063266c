"""Qwen1.5 MoE and Qwen2 MoE: a shared expert behind a sigmoid gate; top-k probabilities that don't add up to 1."""

from __future__ import annotations

from mcore_swift.models.family import DECODER_ROWS, SLIDING_WINDOW_BY_LAYER, ConfigRow, Family, same
from mcore_swift.models.qwen3_moe import EXPERT_ROWS, NORM_TOPK, SPARSE_LAYERS
from mcore_swift.weights.rules import (
    ATTENTION,
    EMBEDDINGS,
    EXPERTS,
    GATED_MLP,
    Rule,
    is_moe_layer,
    shared_experts,
)

QWEN2_MOE = Family(
    name="qwen2_moe",
    model_types=("qwen2_moe",),
    architecture="Qwen2MoeForCausalLM",
    rows=(
        *DECODER_ROWS,
        *EXPERT_ROWS,
        SPARSE_LAYERS,
        NORM_TOPK,
        same("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
        ConfigRow(lambda config: {"moe_shared_expert_gate": True}, lambda config: {}),
        same("qkv_bias", "add_qkv_bias"),
        SLIDING_WINDOW_BY_LAYER,
    ),
    rules=(
        *EMBEDDINGS,
        *ATTENTION,
        *GATED_MLP,
        *EXPERTS,
        *shared_experts("model.layers.{i}.mlp.shared_expert."),
        Rule("shared.gate_weight", "model.layers.{i}.mlp.shared_expert_gate.weight", layers=is_moe_layer),
    ),
    requires={"transformers": "4.40"},
)
