"""Gemma 2: zero-centred norms before and after each half of a layer, scaled embeddings, and soft-capped logits.

Every other layer sees a sliding window. The scores of attention are capped as well, so that Transformer Engine's
attention can't be used: a GPU runs the plain-torch one, whose memory grows with the square of a document's length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mcore_swift.errors import InputError
from mcore_swift.models.family import (
    GATED_DECODER_ROWS,
    ConfigRow,
    Family,
    HFConfig,
    gated_decoder_fields,
    only,
    read_window,
)
from mcore_swift.weights.rules import ATTENTION, EMBEDDINGS, GATED_MLP, Rule

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig
    from torch import Tensor


def tanh_gelu(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, "gelu_pytorch_tanh"."""
    import torch

    return torch.nn.functional.gelu(x, approximate="tanh")


def gemma_fields() -> dict[str, object]:
    """TransformerConfig fields of both Gemmas."""
    return gated_decoder_fields() | {
        "layernorm_zero_centered_gamma": True,  # a norm multiplies by 1 + weight; both sides store the weight
        "activation_func": tanh_gelu,
        "bias_activation_fusion": False,  # Megatron has no fused kernel for this activation
        "post_layernorm": True,
    }


def optional(name: str) -> ConfigRow:
    """A row of a number that may be None and has the same name on both sides."""
    return ConfigRow(lambda config: {name: getattr(config, name)}, lambda config: {name: getattr(config, name)})


def _read_layers(config: HFConfig) -> dict[str, object]:
    unknown = [kind for kind in config.layer_types if kind not in ("sliding_attention", "full_attention")]
    if unknown or (config.sliding_window is None and "sliding_attention" in config.layer_types):
        kind, value = ("layer_types", unknown[0]) if unknown else ("sliding_window", None)
        raise InputError(
            f"config.json: {kind}: {value!r} is not supported; layers are full_attention, or sliding_attention with a"
            " sliding_window"
        )
    return read_window(config)


def _write_layers(config: TransformerConfig) -> dict[str, object]:
    if config.window_size is None:
        return {"layer_types": ["full_attention"] * config.num_layers}
    flags: Any = config.window_attn_skip_freq
    kinds = ["sliding_attention" if windowed else "full_attention" for windowed in flags]
    return {"sliding_window": config.window_size[0] + 1, "layer_types": kinds}


def _scale(config: HFConfig) -> dict[str, object]:
    return {"softmax_scale": config.query_pre_attn_scalar**-0.5}


def _write_scale(config: TransformerConfig) -> dict[str, object]:
    assert config.softmax_scale is not None
    return {"query_pre_attn_scalar": round(config.softmax_scale**-2)}


GEMMA_ROWS = (
    *GATED_DECODER_ROWS,
    only("hidden_activation", "gelu_pytorch_tanh"),
    only("attention_bias", False, default=False),
    only("use_bidirectional_attention", None, False),
    ConfigRow(_scale, _write_scale),
    ConfigRow(lambda config: {"embedding_scale": config.hidden_size**0.5}, lambda config: {}),
    ConfigRow(_read_layers, _write_layers),
    optional("final_logit_softcapping"),
)
_LAYER = "model.layers.{i}."
GEMMA_RULES = (
    *EMBEDDINGS,
    *ATTENTION,
    Rule("mixer.linear_proj.post_layernorm.weight", f"{_LAYER}post_attention_layernorm.weight"),
    Rule("ffn.linear_fc1.layer_norm_weight", f"{_LAYER}pre_feedforward_layernorm.weight"),
    *(rule for rule in GATED_MLP if rule.mcore != "ffn.linear_fc1.layer_norm_weight"),
    Rule("ffn.linear_fc2.post_layernorm.weight", f"{_LAYER}post_feedforward_layernorm.weight"),
)

GEMMA2 = Family(
    name="gemma2",
    model_types=("gemma2",),
    architecture="Gemma2ForCausalLM",
    rows=(*GEMMA_ROWS, optional("attn_logit_softcapping")),
    rules=GEMMA_RULES,
    fields=gemma_fields,
    requires={"transformers": "5.0"},  # layer_types in its config
)
