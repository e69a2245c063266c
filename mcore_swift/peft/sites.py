"""The linear layers of a running model: what each is made of under Hugging Face names, and how it is sharded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from mcore_swift.peft.targets import is_linear
from mcore_swift.weights.live import sharded_state
from mcore_swift.weights.rules import TensorRule


@dataclass(frozen=True)
class Part:
    """One Hugging Face linear module inside a Megatron linear layer: all its rows, and those of this rank."""

    name: str
    rows: int
    local_rows: int

    @property
    def leaf(self) -> str:
        return self.name.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class Site:
    """A linear layer of this rank's model. Its rows are `groups` blocks, each of which has rows of every part.

    `split`: the axis that tensor parallel ranks share out, over `size` of them; this one is number `rank`.
    """

    module: nn.Module
    weight: nn.Parameter
    parts: tuple[Part, ...]
    groups: int
    split: Literal["rows", "columns", "none"]
    size: int
    rank: int
    expert: bool

    @property
    def in_features(self) -> int:
        """Of the whole layer."""
        return self.weight.size(1) * (self.size if self.split == "columns" else 1)

    def values(self) -> Tensor:
        """The weight as the layer computes with it, which may hold it in another form between its calls."""
        held: Any = getattr(self.module, "quantized_weight", None)
        return self.weight if held is None else held.whole()

    def rows_of(self, part: Part, whole: Tensor) -> Tensor:
        """A view of the rows of `part` in a tensor with this rank's rows: [groups, rows / groups, …]."""
        block = [p.local_rows // self.groups for p in self.parts]
        number = self.parts.index(part)
        first = sum(block[:number])
        return whole.view(self.groups, sum(block), *whole.shape[1:])[:, first : first + block[number]]


def find_sites(chunk: nn.Module, rules: Mapping[str, TensorRule]) -> Iterator[Site]:
    """The decoder layers' linear layers of this chunk, in model order."""
    owners = {id(weight): module for module in chunk.modules() for weight in module._parameters.values()}
    for item in sharded_state(chunk).values():
        weight: Any = getattr(item, "data", None)
        key: str = item.key
        if key in rules and is_linear(rules[key]):
            yield _site(owners[id(weight)], weight, item, rules[key])


def _site(module: nn.Module, weight: nn.Parameter, item: Any, rule: TensorRule) -> Site:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    shard: Any = next(iter(nested_values(item.build()))) if isinstance(item, ShardedTensorFactory) else item
    stacked: int = shard.prepend_axis_num
    if stacked:
        rule = rule.of_expert(shard.global_offset[0])
    rows, columns = shard.global_shape[stacked:]
    whole_rows = rule.rows or (rows,)
    axis = getattr(weight, "partition_dim", -1) if getattr(weight, "tensor_model_parallel", False) else -1
    size = {0: sum(whole_rows) // weight.size(0), 1: columns // weight.size(1)}.get(axis, 1)
    local = [count // size if axis == 0 else count for count in whole_rows]
    return Site(
        module=module,
        weight=weight,
        parts=tuple(
            Part(name.removesuffix(".weight"), count, own)
            for name, count, own in zip(rule.hf, whole_rows, local, strict=True)
        ),
        groups=max(rule.groups // size, 1) if axis == 0 else rule.groups,
        split={0: "rows", 1: "columns"}.get(axis, "none") if size > 1 else "none",  # type: ignore[arg-type]
        size=size,
        rank=shard.global_offset[stacked + axis] // shard.local_shape[axis] if size > 1 else 0,
        expert=".mlp.experts." in rule.key,
    )
