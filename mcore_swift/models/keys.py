"""What GPTModel calls its tensors, and a model's weight rules, without importing Megatron.

Conversion works on files alone, and importing Megatron takes longer than converting a small model.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from mcore_swift.weights.rules import TensorRule, expand

if TYPE_CHECKING:
    from mcore_swift.models.build import ModelSource

# Places of weight rules → Megatron's global keys (GPTModel's naming).
GLOBAL_KEYS = {
    "embedding": "embedding.word_embeddings",
    "final_norm": "decoder.final_layernorm",
    "head": "output_layer",
    "mixer": "decoder.layers.{i}.self_attention",
    "ffn": "decoder.layers.{i}.mlp",
    "layer": "decoder.layers.{i}",
    "experts": "decoder.layers.{i}.mlp.experts.experts",
    "shared": "decoder.layers.{i}.mlp.shared_experts",
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
    return expand(source.family.rules, cast(Any, rule_config(source)), keys=GLOBAL_KEYS, tied=source.tied)


def global_shapes(source: ModelSource) -> dict[str, tuple[int, ...]]:
    """Global key → shape that the config asks for, the vocabulary unpadded; of the tensors whose kind is known here."""
    c = rule_config(source)
    hidden, ffn, vocabulary = c.hidden_size, c.ffn_hidden_size, source.vocab_size
    heads = c.num_attention_heads * c.kv_channels
    qkv = heads + 2 * c.num_query_groups * c.kv_channels
    kinds = {
        "word_embeddings.weight": (vocabulary, hidden),
        "output_layer.weight": (vocabulary, hidden),
        "final_layernorm.weight": (hidden,),
        "linear_qkv.layer_norm_weight": (hidden,),
        "linear_qkv.weight": (qkv, hidden),
        "linear_qkv.bias": (qkv,),
        "q_layernorm.weight": (c.kv_channels,),
        "k_layernorm.weight": (c.kv_channels,),
        "linear_proj.weight": (hidden, heads),
        "linear_proj.bias": (hidden,),
        "linear_fc1.layer_norm_weight": (hidden,),
        "linear_fc1.weight": (2 * ffn, hidden),
        "linear_fc1.bias": (2 * ffn,),
        "linear_fc2.weight": (hidden, ffn),
        "linear_fc2.bias": (hidden,),
    }
    tails = {key: ".".join(key.split(".")[-2:]) for key in weight_rules(source)}
    return {key: kinds[tail] for key, tail in tails.items() if tail in kinds}
