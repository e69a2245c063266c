"""What GPTModel calls its tensors, and a model's weight rules, without importing Megatron.

Conversion works on files alone, and importing Megatron takes longer than converting a small model.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from mcore_swift.models.scored import scored_rules
from mcore_swift.weights.rules import TensorRule, expand

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

    from mcore_swift.models.build import ModelSource

# Places of weight rules → Megatron's global keys (GPTModel's naming).
GLOBAL_KEYS = {
    "embedding": "embedding.word_embeddings",
    "final_norm": "decoder.final_layernorm",
    "head": "output_layer",
    "score": "score",
    "mixer": "decoder.layers.{i}.self_attention",
    "ffn": "decoder.layers.{i}.mlp",
    "layer": "decoder.layers.{i}",
    "experts": "decoder.layers.{i}.mlp.experts.experts",
    "shared": "decoder.layers.{i}.mlp.shared_experts",
}
# The same of the layers of multi-token prediction, counted from 0.
MTP_KEYS = {"mtp": "mtp.layers.{i}"} | {
    place: key.replace("decoder.layers.{i}", "mtp.layers.{i}.transformer_layer")
    for place, key in GLOBAL_KEYS.items()
    if "{i}" in key
}

# TransformerConfig's defaults of the fields that rules read and that not every family sets.
_DEFAULTS = {
    "add_qkv_bias": False,
    "add_bias_linear": False,
    "qk_layernorm": False,
    "num_moe_experts": None,
    "moe_layer_freq": 1,
}


def rule_config(source: ModelSource) -> Any:
    """The fields of a TransformerConfig that weight rules read. Raises InputError for a config that isn't supported."""
    return SimpleNamespace(**(_DEFAULTS | source.family.read_config(source.config)))


def weight_rules(source: ModelSource) -> dict[str, TensorRule]:
    """The model's weight rules written out: global key → TensorRule (what `build.tensor_rules` gives)."""
    return expand_rules(source, cast(Any, rule_config(source)))


def expand_rules(source: ModelSource, config: TransformerConfig) -> dict[str, TensorRule]:
    return expand(
        scored_rules(source.family.rules) if source.scored else source.family.rules,
        config,
        keys=GLOBAL_KEYS,
        mtp_keys=MTP_KEYS,
        mtp_layers=source.mtp_layers,
        tied=source.tied,
    )


def _qkv_rows(c: Any) -> int:
    return (c.num_attention_heads + 2 * c.num_query_groups) * c.kv_channels


def _latent_query_rows(c: Any) -> int:
    return c.num_attention_heads * (c.qk_head_dim + c.qk_pos_emb_head_dim)


def _latent_key_value_rows(c: Any) -> int:
    return c.num_attention_heads * (c.qk_head_dim + c.v_head_dim)


def _hidden(c: Any) -> tuple[int, ...]:
    return (c.hidden_size,)


# Shapes by global key, that of a layer's tensor without the layer's own prefix; the vocabulary unpadded.
_SHAPES: dict[str, Callable[[Any], tuple[int, ...]]] = {
    "embedding.word_embeddings.weight": lambda c: (c.vocab_size, c.hidden_size),
    "output_layer.weight": lambda c: (c.vocab_size, c.hidden_size),
    "score.weight": lambda c: (1, c.hidden_size),
    "decoder.final_layernorm.weight": _hidden,
    "self_attention.linear_qkv.layer_norm_weight": _hidden,
    "self_attention.linear_qkv.weight": lambda c: (_qkv_rows(c), c.hidden_size),
    "self_attention.linear_qkv.bias": lambda c: (_qkv_rows(c),),
    "self_attention.q_layernorm.weight": lambda c: (c.kv_channels,),
    "self_attention.k_layernorm.weight": lambda c: (c.kv_channels,),
    "self_attention.linear_proj.weight": lambda c: (
        c.hidden_size,
        c.num_attention_heads * getattr(c, "v_head_dim", c.kv_channels),
    ),
    "self_attention.linear_proj.bias": _hidden,
    "self_attention.linear_proj.post_layernorm.weight": _hidden,
    "input_layernorm.weight": _hidden,
    "self_attention.linear_q_proj.weight": lambda c: (_latent_query_rows(c), c.hidden_size),
    "self_attention.linear_q_down_proj.weight": lambda c: (c.q_lora_rank, c.hidden_size),
    "self_attention.linear_q_up_proj.layer_norm_weight": lambda c: (c.q_lora_rank,),
    "self_attention.linear_q_up_proj.weight": lambda c: (_latent_query_rows(c), c.q_lora_rank),
    "self_attention.linear_kv_down_proj.weight": lambda c: (c.kv_lora_rank + c.qk_pos_emb_head_dim, c.hidden_size),
    "self_attention.linear_kv_up_proj.layer_norm_weight": lambda c: (c.kv_lora_rank,),
    "self_attention.linear_kv_up_proj.weight": lambda c: (_latent_key_value_rows(c), c.kv_lora_rank),
    "enorm.weight": _hidden,
    "hnorm.weight": _hidden,
    "eh_proj.weight": lambda c: (c.hidden_size, 2 * c.hidden_size),
    "final_layernorm.weight": _hidden,
    "pre_mlp_layernorm.weight": _hidden,
    "mlp.linear_fc1.layer_norm_weight": _hidden,
    "mlp.linear_fc1.weight": lambda c: (2 * c.ffn_hidden_size, c.hidden_size),
    "mlp.linear_fc1.bias": lambda c: (2 * c.ffn_hidden_size,),
    "mlp.linear_fc2.weight": lambda c: (c.hidden_size, c.ffn_hidden_size),
    "mlp.linear_fc2.bias": _hidden,
    "mlp.linear_fc2.post_layernorm.weight": _hidden,
    "mlp.router.weight": lambda c: (c.num_moe_experts, c.hidden_size),
    "self_attention.core_attention.softmax_offset": lambda c: (c.num_attention_heads,),
    "mlp.router.bias": lambda c: (c.num_moe_experts,),
    "mlp.experts.experts.linear_fc1.bias": lambda c: (c.num_moe_experts, 2 * c.moe_ffn_hidden_size),
    "mlp.experts.experts.linear_fc2.bias": lambda c: (c.num_moe_experts, c.hidden_size),
    "mlp.router.expert_bias": lambda c: (c.num_moe_experts,),
    "mlp.experts.experts.linear_fc1.weight": lambda c: (c.num_moe_experts, 2 * c.moe_ffn_hidden_size, c.hidden_size),
    "mlp.experts.experts.linear_fc2.weight": lambda c: (c.num_moe_experts, c.hidden_size, c.moe_ffn_hidden_size),
    "mlp.shared_experts.linear_fc1.weight": lambda c: (2 * c.moe_shared_expert_intermediate_size, c.hidden_size),
    "mlp.shared_experts.linear_fc2.weight": lambda c: (c.hidden_size, c.moe_shared_expert_intermediate_size),
    "mlp.shared_experts.gate_weight": lambda c: (1, c.hidden_size),
}
_LAYER = re.compile(r"^(decoder|mtp)\.layers\.\d+\.((mtp_model_layer|transformer_layer)\.)?")


def global_shapes(source: ModelSource) -> dict[str, tuple[int, ...]]:
    """Global key → shape that the config asks for, the vocabulary unpadded; of the tensors whose kind is known here."""
    config = SimpleNamespace(**vars(rule_config(source)), vocab_size=source.vocab_size)
    kinds = {key: _SHAPES.get(_LAYER.sub("", key)) for key in weight_rules(source)}
    return {key: shape(config) for key, shape in kinds.items() if shape is not None}
