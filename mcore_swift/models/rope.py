"""Rotary frequencies of any Hugging Face config, computed by transformers' own functions so that they agree exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcore_swift.errors import InputError
from mcore_swift.models.family import HFConfig

if TYPE_CHECKING:
    import torch

SUPPORTED = ("default", "linear", "llama3", "yarn")


def rope_frequencies(config: HFConfig, layer_type: str | None = None) -> tuple[torch.Tensor, float]:
    """Inverse frequencies, float32 [rotated part of a head / 2], and the factor on cos and sin (YaRN's, else 1).

    `layer_type`: of which layers, in a model whose config has `rope_parameters` for each of its layer types.
    Raises InputError for a RoPE type whose frequencies change with the sequence length.
    """
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    kind = parameters.get("rope_type", "default")
    if kind not in SUPPORTED:
        raise InputError(f"config.json: rope_type {kind!r} is not supported; allowed: {', '.join(SUPPORTED)}")
    if kind != "default":
        with torch.device("cpu"):  # values are needed, though the model may be built without storage
            frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), layer_type=layer_type)
        return frequencies.float(), float(factor)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    exponents = torch.arange(0, rotated, 2, dtype=torch.float, device="cpu") / rotated
    return 1.0 / parameters["rope_theta"] ** exponents, 1.0


def rope_layer_types(config: HFConfig) -> tuple[str | None, ...]:
    """The layer types whose frequencies differ: (None,), or those with and those without a sliding window."""
    by_type = "full_attention" in config.rope_parameters
    return ("full_attention", "sliding_attention") if by_type else (None,)
