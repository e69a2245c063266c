"""A rank's experts in one module on the CPU: Transformer Engine's grouped linear layers in plain torch.

Parameters (weight0, weight1, …), marks and checkpoint keys are theirs, so that Megatron's TEGroupedMLP, and all that
knows a grouped layer by them, is at work without a GPU. The products are not grouped: one follows the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, cast

import torch
from megatron.core.tensor_parallel.layers import _initialize_affine_weight_cpu, set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn


class GroupedLinear(nn.Module):
    """As many linear layers as the rank has experts. `axis`: that of the weights which expert-TP ranks share out."""

    axis: ClassVar[int]

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[Tensor], None],
        bias: bool,
        skip_bias_add: bool,
        pg_collection: Any,
        **_: Any,
    ) -> None:
        super().__init__()
        self.num_gemms, self.use_bias, self.skip_bias_add = num_gemms, bias, skip_bias_add
        self.groups = pg_collection
        size, rank = pg_collection.expt_tp.size(), pg_collection.expt_tp.rank()
        shape = [output_size, input_size]
        shape[self.axis] //= size
        own_groups = (
            config.expert_model_parallel_size > 1
            or config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )
        for number in range(num_gemms):
            weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
            set_tensor_model_parallel_attributes(weight, True, self.axis, 1)
            if config.perform_initialization:
                _initialize_affine_weight_cpu(
                    weight,
                    output_size,
                    input_size,
                    shape[self.axis],
                    self.axis,
                    init_method,
                    params_dtype=config.params_dtype,
                    rank=rank,
                    world_size=size,
                    skip_set_tensor_parallel_attributes=True,
                )
            weight.allreduce = not own_groups  # type: ignore[attr-defined]
            self.register_parameter(f"weight{number}", weight)
            if bias:
                added = nn.Parameter(torch.zeros(shape[0], dtype=config.params_dtype))
                set_tensor_model_parallel_attributes(added, self.axis == 0, 0, 1)
                added.allreduce = not own_groups  # type: ignore[attr-defined]
                self.register_parameter(f"bias{number}", added)

    def forward(self, x: Tensor, m_splits: Sequence[int]) -> tuple[Tensor, list[Tensor] | None]:
        """x [tokens, in], sorted by expert, m_splits[i] of them expert i's → [tokens, out], biases still to add."""
        weights = [getattr(self, f"weight{number}") for number in range(self.num_gemms)]
        biases: list[Any] = [getattr(self, f"bias{number}", None) for number in range(self.num_gemms)]
        later = self.use_bias and self.skip_bias_add
        parts = zip(x.split(list(m_splits)), weights, biases, strict=True)
        out = torch.cat([nn.functional.linear(part, weight, None if later else bias) for part, weight, bias in parts])
        return out, biases if later else None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Under the keys, and with the offsets, that the experts would have as modules of their own."""
        found = {}
        experts, first = self.groups.ep.size() * self.num_gemms, self.groups.ep.rank() * self.num_gemms
        for number in range(self.num_gemms):
            names = ("weight", "bias") if self.use_bias else ("weight",)
            shards = make_sharded_tensors_for_checkpoint(
                {name: getattr(self, f"{name}{number}") for name in names},
                prefix,
                {"weight": self.axis} | ({"bias": 0} if self.axis == 0 else {}),
                (*sharded_offsets, (len(sharded_offsets), first + number, experts)),
                tp_group=self.groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            for name in names:
                shard: Any = shards[prefix + name]
                shard.replica_id = (*shard.replica_id[:2], self.groups.expt_dp.rank())
                found[f"{prefix}{name}{number}"] = shard
        return found


class ColumnGroupedLinear(GroupedLinear):
    axis = 0


class RowGroupedLinear(GroupedLinear):
    axis = 1


def with_groups(mlp: Any) -> Any:
    """Megatron's builder of a mixture of experts in plain torch, with a rank's experts in one module."""
    column, row = cast(Any, ColumnGroupedLinear), cast(Any, RowGroupedLinear)
    linears = GroupedMLPSubmodules(linear_fc1=column, linear_fc2=row)
    experts = partial(TEGroupedMLP, submodules=linears)
    return partial(mlp, submodules=replace(mlp.keywords["submodules"], experts=experts))
