"""Rows of routing by sigmoid scores with a correction bias and groups of experts: DeepSeek-V3's and GLM-4.5's.

score = sigmoid(logits); the top k are chosen by score + bias, at first among groups; the scores of the chosen, divided
by their sum and times a factor, weigh the experts. DeepSeek-V3's report, arXiv 2412.19437, section 2.1.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcore_swift.errors import InputError
from mcore_swift.models.family import ConfigRow, HFConfig, same

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig


def _read_groups(config: HFConfig) -> dict[str, object]:
    groups, chosen, top_k = config.n_group or 1, config.topk_group or 1, config.num_experts_per_tok
    if groups == 1 or groups == chosen:  # every group is chosen
        return {"moe_router_num_groups": None, "moe_router_group_topk": None}
    # transformers ranks a group by its two best experts, Megatron by its top_k / chosen best.
    if top_k // chosen != 2:
        raise InputError(
            f"config.json: topk_group: {chosen} of {groups} groups with num_experts_per_tok {top_k} is not supported:"
            f" groups are ranked by their 2 best experts, so num_experts_per_tok // topk_group must be 2"
        )
    return {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}


def _write_groups(config: TransformerConfig) -> dict[str, object]:
    return {"n_group": config.moe_router_num_groups or 1, "topk_group": config.moe_router_group_topk or 1}


def _read_normalization(config: HFConfig) -> dict[str, object]:
    if not config.norm_topk_prob or config.num_experts_per_tok == 1:
        raise InputError(
            f"config.json: norm_topk_prob: {config.norm_topk_prob} with num_experts_per_tok"
            f" {config.num_experts_per_tok} is not supported: sigmoid scores are normalized over at least 2 experts"
        )
    return {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}


def _read_shared(config: HFConfig) -> dict[str, object]:
    # Hugging Face counts shared experts, but holds them as one wide one.
    width = config.moe_intermediate_size * (config.n_shared_experts or 0)
    return {"moe_shared_expert_intermediate_size": width or None}


def _write_shared(config: TransformerConfig) -> dict[str, object]:
    width = config.moe_shared_expert_intermediate_size or 0
    return {"n_shared_experts": width // (config.moe_ffn_hidden_size or 1)}


def _read_sparse_layers(config: HFConfig) -> dict[str, object]:
    dense = config.first_k_dense_replace
    return {"moe_layer_freq": [int(layer >= dense) for layer in range(config.num_hidden_layers)]}


def _write_sparse_layers(config: TransformerConfig) -> dict[str, object]:
    flags: list[int] = config.moe_layer_freq  # type: ignore[assignment]
    return {"first_k_dense_replace": len(flags) - sum(flags)}


DEEPSEEK_EXPERT_ROWS = (
    same("n_routed_experts", "num_moe_experts"),
    same("num_experts_per_tok", "moe_router_topk"),
    same("moe_intermediate_size", "moe_ffn_hidden_size"),
    same("routed_scaling_factor", "moe_router_topk_scaling_factor"),
    ConfigRow(_read_shared, _write_shared),
    ConfigRow(_read_sparse_layers, _write_sparse_layers),
)
SIGMOID_ROUTING_ROWS = (
    *DEEPSEEK_EXPERT_ROWS,
    ConfigRow(_read_groups, _write_groups),
    ConfigRow(_read_normalization, lambda config: {"norm_topk_prob": True}),
)
