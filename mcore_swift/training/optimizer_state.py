"""The optimizer's state in the model's global tensor space, so that it can be saved and resumed at any layout.

Each parameter's moments (and fp32 master weight, where the parameter is not fp32 itself) get the key
`optimizer.state.NAME.KEY` and the place of the parameter KEY. The distributed optimizer holds a range of each flattened
parameter: it is cut into rectangles that are views of its own tensors, so each rank writes, and reads, only what it
holds, without gathering anything, and a checkpoint does not show whether the optimizer was distributed. (Megatron's own
`fully_reshardable` format gathers the whole state of a model-parallel rank on every data parallel rank.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from mcore_swift.weights.dist_checkpoint import boxes

PREFIX = "optimizer.state"


@dataclass(frozen=True)
class ParameterState:
    """Elements [start, stop) of a flattened parameter, and their state: flat tensors of that many elements."""

    parameter: Tensor
    start: int
    stop: int
    sharded: bool  # over data parallel ranks
    tensors: dict[str, Tensor]


def optimizer_items(optimizer: Any, parts: Mapping[int, list[ShardedTensor]]) -> list[ShardedTensor]:
    """This rank's optimizer state as shards of global tensors; their data are views of the optimizer's own tensors.

    `parts`: id of a parameter → its shards (`dist_checkpoint.ModelItems.parts`). State that the optimizer makes in its
    first step is made here, so that it can be filled.
    """
    items = []
    for state in _states(optimizer):
        for part in parts[id(state.parameter)]:
            for name, flat in state.tensors.items():
                items += _shards(part, state, f"{PREFIX}.{name}.{part.key}", flat)
    return items


def _shards(part: ShardedTensor, state: ParameterState, key: str, flat: Tensor) -> Iterator[ShardedTensor]:
    assert part.data is not None and part.data.is_contiguous()
    first = int(part.data.storage_offset() - state.parameter.storage_offset())  # where the part starts in its parameter
    low, high = max(state.start, first), min(state.stop, first + part.data.numel())
    if not state.sharded:
        yield replace(part, key=key, data=flat[low:high].view(part.local_shape), dtype=flat.dtype)
        return
    position = low - state.start
    for offset, shape in boxes(part.local_shape, low - first, high - first):
        data = flat[position : position + torch.Size(shape).numel()].view(shape)
        position += data.numel()
        yield replace(
            part,
            key=key,
            data=data,
            dtype=flat.dtype,
            local_shape=tuple(shape),
            global_offset=tuple(a + b for a, b in zip(part.global_offset, offset, strict=True)),
            axis_fragmentations=None,  # not a regular grid
            replica_id=(*part.replica_id[:2], 0),  # type: ignore[index]  # no other data parallel rank has it
        )


def _states(optimizer: Any) -> Iterator[ParameterState]:
    for part in _members(optimizer):
        _initialize(part)
        for parameter, main, start, sharded in _main_parameters(part):
            own = part.optimizer.state[main]
            tensors = {name: t.view(-1) for name, t in own.items() if torch.is_tensor(t) and t.shape == main.shape}
            if main.dtype != parameter.dtype:
                tensors["fp32_param"] = main.detach().view(-1)
            yield ParameterState(parameter, start, start + main.numel(), sharded, tensors)


def _members(optimizer: Any) -> list[Any]:
    members = getattr(optimizer, "chained_optimizers", [optimizer])
    return [member for member in members if not member.is_stub_optimizer]


def _initialize(member: Any) -> None:
    """Makes the state that the first step would make, where there is none yet."""
    if member.init_state_fn is not None:
        member.init_state_fn(member.optimizer, member.config)
        if _is_torch(member):
            for state in member.optimizer.state.values():
                state.setdefault("step", torch.tensor(0.0))
        return
    for group in member.optimizer.param_groups:  # SGD
        for parameter in group["params"]:
            if group.get("momentum") and member.optimizer.state[parameter].get("momentum_buffer") is None:
                member.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.data)


def _main_parameters(member: Any) -> Iterator[tuple[Tensor, Tensor, int, bool]]:
    """(parameter of the model, tensor that the inner optimizer updates for it, its first element, is it a shard)."""
    if hasattr(member, "gbuf_ranges"):  # DistributedOptimizer
        for buckets in (buckets for ranges in member.gbuf_ranges for buckets in ranges.values()):
            for parameter, ranges in ((p, r) for bucket in buckets for p, r in bucket["param_map"].items()):
                group, order = member.model_param_group_index_map[parameter]
                main = member.optimizer.param_groups[group]["params"][order]
                yield parameter, main, ranges["param"].start, True
    elif hasattr(member, "fp32_from_float16_groups"):  # Float16OptimizerWithFloat16Params
        for models, mains in zip(member.float16_groups, member.fp32_from_float16_groups, strict=True):
            yield from ((parameter, main, 0, False) for parameter, main in zip(models, mains, strict=True))
        for group in member.fp32_from_fp32_groups:
            yield from ((parameter, parameter, 0, False) for parameter in group)
    else:  # FP32Optimizer
        yield from ((parameter, parameter, 0, False) for parameter in member.get_parameters())


def get_step(optimizer: Any) -> int:
    """How many updates the optimizer has made (Adam's bias correction depends on it)."""
    steps = [0]
    for member in _members(optimizer):
        steps += [int(state["step"]) for state in member.optimizer.state.values() if "step" in state]
        steps += [int(group["step"]) for group in member.optimizer.param_groups if "step" in group]
    return max(steps)


def set_step(optimizer: Any, step: int) -> None:
    """The inverse. torch keeps the number with each parameter, Transformer Engine's and Apex's Adam with each group."""
    for member in _members(optimizer):
        if _is_torch(member):
            for state in member.optimizer.state.values():
                if "exp_avg" in state:
                    state["step"] = torch.tensor(float(step))
        else:
            for group in member.optimizer.param_groups:
                group["step"] = step


def _is_torch(member: Any) -> bool:
    return type(member.optimizer).__module__.startswith("torch.optim")
