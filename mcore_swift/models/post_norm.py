"""A second norm after each half of a layer, before its output is added to the residual (Gemma 2, 3).

Megatron-Core has no place for it in its layer. The step that adds the output to the residual is a part of the layer's
spec, though: the norm goes in there. The linear layers stay as they are, so that what is added to their output (an
adapter's, say) is normalized with it. The global keys are those that Megatron-Bridge gives these norms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer import ModuleSpec, TransformerConfig
from torch import Tensor, nn

# Where the norms are in our layers → what their tensors are called in checkpoints.
NORM_KEYS = {
    "self_attn_bda.norm.": "self_attention.linear_proj.post_layernorm.",
    "mlp_bda.norm.": "mlp.linear_fc2.post_layernorm.",
}


class NormDropoutAdd(nn.Module):
    """Stands for Megatron's bias-dropout-add: residual + dropout(norm(output + bias))."""

    def __init__(self, config: TransformerConfig, norm: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.norm = norm(config, config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """Gives a function, as Megatron's get_bias_dropout_add: ((output, bias or None), residual, dropout) → sum."""
        dropout_add = get_bias_dropout_add(training, fused)

        def add(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            output, bias = output_with_bias
            return dropout_add((self.norm(output if bias is None else output + bias), None), residual, dropout)

        return add


def add_post_norms(layer: ModuleSpec, config: TransformerConfig, norm: Callable[..., nn.Module]) -> ModuleSpec:
    """The layer's spec with a norm, made by `norm`, after both of its halves."""
    submodules = cast(Any, layer.submodules)
    step = ModuleSpec(module=NormDropoutAdd, params={"config": config, "norm": norm})
    keys = submodules.sharded_state_dict_keys_map | NORM_KEYS
    return replace(
        layer, submodules=replace(submodules, self_attn_bda=step, mlp_bda=step, sharded_state_dict_keys_map=keys)
    )
