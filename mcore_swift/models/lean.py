"""A model whose linear layers are built without keeping their weights, where these are to be held in another form.

A large model's weights don't fit in a GPU's memory before they are quantized. So each layer gives its weights away as
soon as it is built, and memory never holds those of more than one. What is left of a weight has its shape, dtype and
marks, and is NaN wherever it is read by mistake.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


def released(weight: Tensor) -> Tensor:
    """A tensor like `weight` that takes one number's memory."""
    return torch.full((), torch.nan, dtype=weight.dtype, device=weight.device).expand(weight.shape)


def is_released(weight: Tensor) -> bool:
    """Whether it is such a tensor. (One of a single number is as small anyway.)"""
    return weight.numel() > 1 and not any(weight.stride())


def lean_layers(specs: Sequence[Any]) -> list[Any]:
    """The layers' specs, changed so that they are built without keeping the weights of their linear layers."""
    return [replace(spec, module=_lean(spec.module)) for spec in specs]


@cache
def _lean(layer: type[nn.Module]) -> type[nn.Module]:
    class LeanLayer(layer):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            for module in self.modules():
                if isinstance(module, linear_layers()):
                    module.weight.data = released(module.weight)  # type: ignore[arg-type]

    return LeanLayer


@cache
def linear_layers() -> tuple[type, ...]:
    """Megatron's parallel linear layers, Transformer Engine's too where it is installed."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    found = (ColumnParallelLinear, RowParallelLinear)
    if importlib.util.find_spec("transformer_engine") is None:
        return found
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear, TELinear

    return *found, TELinear, TELayerNormColumnParallelLinear
