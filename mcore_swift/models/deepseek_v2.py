"""DeepSeek-V2, V2-Lite: multi-latent attention, shared experts, softmax routing, a group ranked by its best expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcore_swift.errors import InputError
from mcore_swift.models.family import ConfigRow, Family, HFConfig, only
from mcore_swift.models.mla import MLA, MLA_ROWS
from mcore_swift.models.sigmoid_routing import DEEPSEEK_EXPERT_ROWS
from mcore_swift.weights.rules import EMBEDDINGS, EXPERTS, GATED_MLP, shared_experts

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

METHODS = ("greedy", "group_limited_greedy")


def _read_groups(config: HFConfig) -> dict[str, object]:
    if config.topk_method not in METHODS:
        raise InputError(
            f"config.json: topk_method: {config.topk_method!r} is not supported; allowed: {', '.join(METHODS)}"
        )
    grouped = config.topk_method == METHODS[1] and config.n_group != config.topk_group
    return {
        "moe_router_num_groups": config.n_group if grouped else None,
        "moe_router_group_topk": config.topk_group if grouped else None,
    }


def _write_groups(config: TransformerConfig) -> dict[str, object]:
    grouped = config.moe_router_num_groups is not None
    return {
        "topk_method": METHODS[grouped],
        "n_group": config.moe_router_num_groups or 1,
        "topk_group": config.moe_router_group_topk or 1,
    }


DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    model_types=("deepseek_v2",),
    architecture="DeepseekV2ForCausalLM",
    rows=(
        *MLA_ROWS,
        *DEEPSEEK_EXPERT_ROWS,
        ConfigRow(_read_groups, _write_groups),
        ConfigRow(lambda config: {"moe_router_pre_softmax": True}, lambda config: {}),
        only("norm_topk_prob", False, default=False),
        only("mlp_bias", False, default=False),
    ),
    rules=(
        *EMBEDDINGS,
        *MLA,
        *GATED_MLP,
        *EXPERTS,
        *shared_experts("model.layers.{i}.mlp.shared_experts."),
    ),
    group_rank=1,
    requires={"transformers": "4.55"},
)
