"""Rotary frequencies of their own for the layers with a sliding window (Gemma 3).

GPTModel computes one table of angles and hands it to all of its layers. Here the attention of the windowed ones gets
another in its place, cut as the first one was: to the same length, and for context parallelism in the same way.
"""

from __future__ import annotations

from copy import copy
from functools import partial
from typing import Any, cast

from megatron.core.models.common.embeddings import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor, nn


def set_windowed_rotary(model: GPTModel, frequencies: Tensor, factor: float) -> None:
    """Once the model has its rotary frequencies: gives its windowed layers others, float32 [head_dim / 2].

    factor: multiplies cos and sin.
    """
    rotary: Any = copy(model.rotary_pos_emb)  # one for all of these layers: it remembers the angles it has computed
    rotary.inv_freq = frequencies.to(rotary.inv_freq.device)
    config: Any = model.config
    for layer in model.decoder.layers:
        attention = cast(Any, layer.self_attention)
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, attention.layer_number):
            attention._yarn_concentration_factor = factor
            attention.register_forward_pre_hook(partial(_replace_angles, rotary), with_kwargs=True)


def _replace_angles(
    rotary: RotaryEmbedding, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before a layer's attention: its angles [length, 1, 1, head_dim] in place of those of GPTModel."""
    packed = kwargs["packed_seq_params"] is not None  # then angles are cut for context parallelism later, by document
    parts = 1 if packed else cast(Any, attention).config.context_parallel_size
    angles = rotary(kwargs["rotary_pos_emb"].size(0) * parts, packed_seq=packed)
    return args, kwargs | {"rotary_pos_emb": angles}
