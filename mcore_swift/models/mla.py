"""Rows and rules of multi-latent attention (`latent_attention.py` is the layer), which DeepSeek-V2 and V3 share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcore_swift.errors import InputError
from mcore_swift.models.family import DECODER_ROWS, ConfigRow, HFConfig, only, same
from mcore_swift.weights.rules import Rule

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig


def _read_heads(config: HFConfig) -> dict[str, object]:
    if config.num_key_value_heads != config.num_attention_heads:
        raise InputError(
            f"config.json: num_key_value_heads: {config.num_key_value_heads} is not supported; with multi-latent"
            f" attention it must be num_attention_heads, {config.num_attention_heads}"
        )
    return {"multi_latent_attention": True, "qk_layernorm": True}


def softmax_fields(config: HFConfig) -> dict[str, object]:
    """TransformerConfig fields of the softmax's scale, which follows from how RoPE is stretched.

    Megatron divides by √(head dimensions) and multiplies by (0.1 · mscale_all_dim · ln(rotary_scaling_factor) + 1)², as
    transformers does.
    """
    rope = config.rope_parameters
    scaled = rope.get("rope_type", "default") != "default"
    return {
        "rotary_scaling_factor": rope["factor"] if scaled else 1.0,
        "mscale_all_dim": rope.get("mscale_all_dim") or 0.0,
    }


MLA_ROWS = (
    *DECODER_ROWS,
    ConfigRow(_read_heads, lambda config: {}),
    same("q_lora_rank", "q_lora_rank", default=lambda config: None),  # None: queries have no latent
    same("kv_lora_rank", "kv_lora_rank"),
    same("qk_nope_head_dim", "qk_head_dim"),
    same("qk_rope_head_dim", "qk_pos_emb_head_dim"),
    same("v_head_dim", "v_head_dim"),
    only("attention_bias", False, default=False),
    only("rope_interleave", True, default=True),
)


def _query_latent(config: TransformerConfig) -> bool:
    return getattr(config, "q_lora_rank", None) is not None


def _no_query_latent(config: TransformerConfig) -> bool:
    return not _query_latent(config)


_SELF_ATTENTION = "model.layers.{i}.self_attn."
MLA = (
    Rule("layer.input_layernorm.weight", "model.layers.{i}.input_layernorm.weight"),
    Rule("mixer.linear_q_proj.weight", f"{_SELF_ATTENTION}q_proj.weight", when=_no_query_latent),
    Rule("mixer.linear_q_down_proj.weight", f"{_SELF_ATTENTION}q_a_proj.weight", when=_query_latent),
    Rule("mixer.linear_q_up_proj.layer_norm_weight", f"{_SELF_ATTENTION}q_a_layernorm.weight", when=_query_latent),
    Rule("mixer.linear_q_up_proj.weight", f"{_SELF_ATTENTION}q_b_proj.weight", when=_query_latent),
    Rule("mixer.linear_kv_down_proj.weight", f"{_SELF_ATTENTION}kv_a_proj_with_mqa.weight"),
    Rule("mixer.linear_kv_up_proj.layer_norm_weight", f"{_SELF_ATTENTION}kv_a_layernorm.weight"),
    Rule("mixer.linear_kv_up_proj.weight", f"{_SELF_ATTENTION}kv_b_proj.weight"),
    Rule("mixer.linear_proj.weight", f"{_SELF_ATTENTION}o_proj.weight"),
)
