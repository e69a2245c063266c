"""GLM-4.5 and 4.6: DeepSeek-V3's routing, shared experts, a part of each head rotated, optional norms on q and k."""

from __future__ import annotations

from mcore_swift.models.family import DECODER_ROWS, Family, same
from mcore_swift.models.sigmoid_routing import SIGMOID_ROUTING_ROWS
from mcore_swift.weights.rules import ATTENTION, CORRECTION_BIAS, EMBEDDINGS, EXPERTS, GATED_MLP, MTP, shared_experts

GLM4_MOE = Family(
    name="glm4_moe",
    model_types=("glm4_moe",),
    architecture="Glm4MoeForCausalLM",
    rows=(
        *DECODER_ROWS,
        *SIGMOID_ROUTING_ROWS,
        same("use_qk_norm", "qk_layernorm"),
        same("attention_bias", "add_qkv_bias"),  # of q, k and v alone
    ),
    rules=(
        *EMBEDDINGS,
        *ATTENTION,
        *GATED_MLP,
        *EXPERTS,
        CORRECTION_BIAS,
        *shared_experts("model.layers.{i}.mlp.shared_experts."),
        *MTP,
    ),
    requires={"transformers": "4.54"},
)
