"""DeepSeek-V3, V3.1 and R1: V2's attention and shared experts, sigmoid routing, layers that predict further tokens."""

from __future__ import annotations

from mcore_swift.models.family import Family
from mcore_swift.models.mla import MLA, MLA_ROWS
from mcore_swift.models.sigmoid_routing import SIGMOID_ROUTING_ROWS
from mcore_swift.weights.rules import CORRECTION_BIAS, EMBEDDINGS, EXPERTS, GATED_MLP, MTP, shared_experts

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    model_types=("deepseek_v3",),
    architecture="DeepseekV3ForCausalLM",
    rows=(*MLA_ROWS, *SIGMOID_ROUTING_ROWS),
    rules=(
        *EMBEDDINGS,
        *MLA,
        *GATED_MLP,
        *EXPERTS,
        CORRECTION_BIAS,
        *shared_experts("model.layers.{i}.mlp.shared_experts."),
        *MTP,
    ),
    requires={"transformers": "4.51"},
)
