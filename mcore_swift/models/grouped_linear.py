"""A rank's experts in one module, their products grouped: for the CPU, and in place of Transformer Engine's own way.

On the CPU parameters (weight0, weight1, …), marks and checkpoint keys are those of Transformer Engine's grouped linear
layers, so that Megatron's TEGroupedMLP, and all that knows a grouped layer by them, is at work without a GPU. On GPUs
the layers are Transformer Engine's, and what they don't need it for, they compute as here.
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

from mcore_swift.models.grouped_product import ends_of, grouped_linear, in_line, rows_fit


def weight_names(module: Any) -> list[str]:
    """The parameters of a grouped layer's experts, in their order."""
    return [f"weight{number}" for number in range(module.num_gemms)]


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
        in_line(self, weight_names(self))

    def forward(self, x: Tensor, m_splits: Sequence[int]) -> tuple[Tensor, list[Tensor] | None]:
        """x [tokens, in], sorted by expert, m_splits[i] of them expert i's → [tokens, out], biases still to add."""
        weights = [getattr(self, name) for name in weight_names(self)]
        if not self.use_bias and rows_fit(weights[0]):
            return grouped_linear(x, weights, ends_of(m_splits, x.device)), None
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


def without_detours(kind: Any) -> Any:
    """One of Megatron's grouped layers of Transformer Engine, as a class that multiplies in one call where it can.

    It can in BF16 and FP16 without biases; not in FP8, with delayed weight gradients, offloaded activations or FSDP.
    """

    class Grouped(kind):  # type: ignore[misc]
        def __init__(self, *args: Any, config: Any, **kwargs: Any) -> None:
            super().__init__(*args, config=config, **kwargs)
            away = config.cpu_offloading or config.fine_grained_activation_offloading or self.delay_wgrad_compute
            plain = not (config.fp8 or config.fp4 or self.use_bias or away)
            names = weight_names(self)
            self.one_call = plain and all(type(getattr(self, name)) is nn.Parameter for name in names)
            if self.one_call:
                in_line(self, names)

        def forward(self, x: Tensor, m_splits: Sequence[int]) -> tuple[Tensor, Any]:
            weights = [getattr(self, name) for name in weight_names(self)]
            if not self.one_call or x.dtype != weights[0].dtype or not rows_fit(weights[0]) or _sharded(weights[0]):
                return super().forward(x, m_splits)
            return grouped_linear(x, weights, ends_of(m_splits, x.device)), None

    Grouped.__name__ = Grouped.__qualname__ = f"Grouped{kind.__name__}"
    return Grouped


def _sharded(weight: Tensor) -> bool:
    return hasattr(weight, "__fsdp_param__") or type(weight.data) is not Tensor


def in_one_call(mlp: Any) -> Any:
    """Megatron's builder of a mixture of experts on Transformer Engine, its grouped layers `without_detours`."""
    if not isinstance(mlp, partial) or not hasattr(mlp.keywords.get("submodules"), "experts"):
        return mlp
    experts = mlp.keywords["submodules"].experts
    if not isinstance(experts, partial) or experts.func is not TEGroupedMLP:
        return mlp
    own = experts.keywords["submodules"]
    own = replace(own, linear_fc1=without_detours(own.linear_fc1), linear_fc2=without_detours(own.linear_fc2))
    experts = partial(experts, submodules=own)
    return partial(mlp, submodules=replace(mlp.keywords["submodules"], experts=experts))


def with_groups(mlp: Any) -> Any:
    """Megatron's builder of a mixture of experts in plain torch, with a rank's experts in one module."""
    column, row = cast(Any, ColumnGroupedLinear), cast(Any, RowGroupedLinear)
    linears = GroupedMLPSubmodules(linear_fc1=column, linear_fc2=row)
    experts = partial(TEGroupedMLP, submodules=linears)
    return partial(mlp, submodules=replace(mlp.keywords["submodules"], experts=experts))
