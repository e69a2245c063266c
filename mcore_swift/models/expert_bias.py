"""Biases of experts on the CPU, where Megatron-Core's plain-torch experts can't be trained with them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core.tensor_parallel import RowParallelLinear
from torch import Tensor


class ExpertProjection(RowParallelLinear):
    """Megatron 0.19.2's MLP adds an expert's bias to the output in place, which autograd forbids for what the reduction
    over tensor parallel ranks returns: here it gets a copy."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor]:
        output, bias = super().forward(input_)
        return output.clone(), bias


def with_bias(mlp: Any) -> Any:
    """Megatron's builder of a mixture of experts in plain torch, with experts whose biases have gradients."""
    modules = mlp.keywords["submodules"]
    experts = modules.experts
    linears = replace(experts.keywords["submodules"], linear_fc2=ExpertProjection)
    return partial(mlp, submodules=replace(modules, experts=partial(experts, submodules=linears)))
