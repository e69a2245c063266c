"""gpt-oss 20B and 120B: attention sinks, alternating sliding windows, biases everywhere, clamped SwiGLU experts.

What is unusual. The MLP computes g · sigmoid(1.702 g) · (u + 1) of g clamped from above and u clamped on both sides:
Megatron's quick-GELU unit with an offset. transformers' folders hold all experts of a layer in one tensor, transposed,
with the rows of gate and up alternating; the hub's hold that in MXFP4, which conversion decodes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcore_swift.models.family import (
    DECODER_ROWS,
    SLIDING_WINDOW_BY_LAYER,
    ConfigRow,
    Family,
    gated_decoder_fields,
    only,
    same,
)
from mcore_swift.weights.rules import ATTENTION, EMBEDDINGS, EXPERT_DOWN, EXPERT_GATED, Rule

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

SWIGLU_LIMIT = 7.0  # transformers' experts have it as a constant


def _activation() -> dict[str, object]:
    from megatron.core.fusions.fused_bias_geglu import quick_gelu

    return {"activation_func": quick_gelu}  # the function that Megatron's fused kernel is chosen by


def _fields() -> dict[str, object]:
    return gated_decoder_fields() | {
        "glu_linear_offset": 1.0,
        "activation_func_clamp_value": SWIGLU_LIMIT,
        "softmax_type": "learnable",
        "add_bias_linear": True,
        "bias_dropout_fusion": False,
        "moe_router_pre_softmax": False,  # softmax over the top k's logits
    }


def _write_window(config: TransformerConfig) -> dict[str, object]:
    written = SLIDING_WINDOW_BY_LAYER.write(config)
    return {key: value for key, value in written.items() if key != "use_sliding_window"}


_EXPERTS = "model.layers.{i}.mlp.experts."
_ROUTER = "model.layers.{i}.mlp.router."

GPT_OSS = Family(
    name="gpt_oss",
    model_types=("gpt_oss",),
    architecture="GptOssForCausalLM",
    rows=(
        *DECODER_ROWS,
        ConfigRow(SLIDING_WINDOW_BY_LAYER.read, _write_window),
        same("num_local_experts", "num_moe_experts"),
        same("num_experts_per_tok", "moe_router_topk"),
        same("intermediate_size", "moe_ffn_hidden_size"),
        only("attention_bias", True, default=True),  # Megatron has one switch for all the layer's biases
        only("swiglu_limit", SWIGLU_LIMIT, default=SWIGLU_LIMIT),
    ),
    rules=(
        *EMBEDDINGS,
        *ATTENTION,
        Rule("mixer.core_attention.softmax_offset", "model.layers.{i}.self_attn.sinks"),
        Rule("layer.pre_mlp_layernorm.weight", "model.layers.{i}.post_attention_layernorm.weight"),
        Rule("ffn.router.weight", f"{_ROUTER}weight"),
        Rule("ffn.router.bias", f"{_ROUTER}bias"),
        Rule(
            "experts.linear_fc1.weight",
            f"{_EXPERTS}gate_up_proj",
            EXPERT_GATED,
            experts=True,
            packed=True,
            transposed=True,
        ),
        Rule("experts.linear_fc1.bias", f"{_EXPERTS}gate_up_proj_bias", EXPERT_GATED, experts=True, packed=True),
        Rule(
            "experts.linear_fc2.weight",
            f"{_EXPERTS}down_proj",
            EXPERT_DOWN,
            experts=True,
            packed=True,
            transposed=True,
        ),
        Rule("experts.linear_fc2.bias", f"{_EXPERTS}down_proj_bias", EXPERT_DOWN, experts=True, packed=True),
    ),
    fields=_fields,
    megatron_fields=_activation,
    requires={"transformers": "4.55"},
)
