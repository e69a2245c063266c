"""The optimizer's state in the model's global tensor space, so that it can be saved and resumed at any layout.

Each parameter's moments (and fp32 master weight, where the parameter is not fp32 itself) get the key
`optimizer.state.NAME.KEY` and the place of the parameter KEY. The distributed optimizer holds a range of each flattened
parameter: it is cut into rectangles that are views of its own tensors, so each rank writes, and reads, only what it
holds, without gathering anything, and a checkpoint does not show whether the optimizer was distributed. (Megatron's own
`fully_reshardable` format gathers the whole state of a model-parallel rank on every data parallel rank.)

A checkpoint holds every state in float32, whatever form the run holds it in (bf16 moments, fp32 parameters as the 16
bits that the bf16 ones lack, states on the CPU): what is not held so is copied, and put back after loading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
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
    tensors: dict[str, Tensor] = field(default_factory=dict)
    put_back: list[Callable[[], object]] = field(default_factory=list)  # what takes over new values of copies


def optimizer_items(optimizer: Any, parts: Mapping[int, list[ShardedTensor]]) -> list[ShardedTensor]:
    """This rank's optimizer state as shards of global tensors, to be saved. See `load_targets`."""
    return load_targets(optimizer, parts)[0]


def load_targets(
    optimizer: Any, parts: Mapping[int, list[ShardedTensor]]
) -> tuple[list[ShardedTensor], Callable[[], None]]:
    """This rank's optimizer state as shards of global tensors, and what to call once they, and the model, are filled.

    `parts`: id of a parameter → its shards (`dist_checkpoint.ModelItems.parts`). The shards' data are views of the
    optimizer's own tensors where those are float32. State that the optimizer makes in its first step is made here, so
    that it can be filled.
    """
    states = list(_states(optimizer))
    items = []
    for state in states:
        for part in parts[id(state.parameter)]:
            for name, flat in state.tensors.items():
                items += _shards(part, state, f"{PREFIX}.{name}.{part.key}", flat)

    for member in members(optimizer):
        if hasattr(member.optimizer, "sharded_states"):  # states that have another shape than their parameter
            items += member.optimizer.sharded_states()

    def put_back() -> None:
        for action in (action for state in states for action in state.put_back):
            action()

    return items, put_back


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
    for member in members(optimizer):
        _initialize(member)
        for parameter, main, start, sharded in main_parameters(member):
            state = ParameterState(parameter, start, start + main.numel(), sharded)
            _fill(state, member, main)
            yield state


def _fill(state: ParameterState, member: Any, main: Tensor) -> None:
    """Adds what the inner optimizer holds for `main`, the tensor that it updates."""
    own = member.optimizer.state[main]
    lean = hasattr(member.optimizer, "get_unscaled_state") and member.config.use_precision_aware_optimizer
    for name, held in own.items():
        if not torch.is_tensor(held) or held.shape != main.shape or name == "master_param":
            continue
        if lean and held.dtype != torch.float32:
            _add_copy(state, name, held, held.detach().float(), held.copy_)
        else:
            state.tensors[name] = held.view(-1)
    if main.dtype != state.parameter.dtype:
        state.tensors["fp32_param"] = main.detach().view(-1)
    elif "master_param" in own:
        _add_master(state, main.detach(), own["master_param"].detach())


def _add_copy(
    state: ParameterState, name: str, held: Tensor, copy: Tensor, put_back: Callable[[Tensor], object]
) -> None:
    state.tensors[name] = copy.view(-1)
    state.put_back.append(lambda: put_back(copy.view(held.shape)))


def _add_master(state: ParameterState, main: Tensor, master: Tensor) -> None:
    """The fp32 parameter that the inner optimizer itself holds (`master`) beside the model's own (`main`)."""
    if main.dtype == torch.float32:  # a copy, on the CPU: a checkpoint needs no second one
        state.put_back.append(lambda: master.copy_(main))
    elif master.dtype == torch.int16:
        whole = join_remainder(main, master)
        _add_copy(state, "fp32_param", master, whole, lambda filled: master.copy_(split_remainder(main, filled)))
    else:
        state.tensors["fp32_param"] = master.view(-1)


def join_remainder(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 numbers of which `high` (bf16) are the rounded values and `low` (int16) what they lack.

    As Transformer Engine's FusedAdam holds them (store_param_remainders): read as integers, fp32 = bf16 · 2¹⁶ + low.
    """
    return ((high.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)).view(torch.float32)


def split_remainder(high: Tensor, whole: Tensor) -> Tensor:
    """The inverse. `high` must be `whole` rounded; of two that are equally near, the lower costs the last bit."""
    low = whole.view(torch.int32) - (high.view(torch.int16).to(torch.int32) << 16)
    return low.clamp(-(2**15), 2**15 - 1).to(torch.int16)


def members(optimizer: Any) -> list[Any]:
    """Megatron's optimizers that this rank has parameters in: one of dense ones, one of experts."""
    members = getattr(optimizer, "chained_optimizers", [optimizer])
    return [member for member in members if not member.is_stub_optimizer]


def _inner(member: Any) -> list[Any]:
    """The optimizers that do the work: several where some parameters are updated on the CPU."""
    return getattr(member.optimizer, "sub_optimizers", [member.optimizer])


def _initialize(member: Any) -> None:
    """Makes the state that the first step would make, where there is none yet."""
    if hasattr(member.optimizer, "sub_optimizers"):
        for inner in _inner(member):
            _initialize_adam(inner)
        member.optimizer._sync_sub_optimizers_state_to_hdo()
    elif member.config.use_precision_aware_optimizer:  # Megatron's own function is not up to Transformer Engine 2.20
        _initialize_adam(member.optimizer)
    elif member.init_state_fn is not None:
        member.init_state_fn(member.optimizer, member.config)
        if is_torch(member.optimizer):
            for state in member.optimizer.state.values():
                state.setdefault("step", torch.tensor(0.0))
    else:
        _initialize_sgd(member.optimizer)


def _initialize_adam(inner: Any) -> None:
    for parameter in (p for group in inner.param_groups for p in group["params"]):
        state = inner.state[parameter]
        if state:
            continue
        if is_torch(inner):
            data = parameter.data
            state |= {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(data),
                "exp_avg_sq": torch.zeros_like(data),
            }
        else:
            remainders = getattr(inner, "store_param_remainders", False) and parameter.dtype == torch.bfloat16
            inner.initialize_state(parameter, remainders)


def _initialize_sgd(inner: Any) -> None:
    for group in inner.param_groups:
        for parameter in group["params"]:
            if group.get("momentum") and inner.state[parameter].get("momentum_buffer") is None:
                inner.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.data)


def main_parameters(member: Any) -> Iterator[tuple[Tensor, Tensor, int, bool]]:
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
    for inner in (inner for member in members(optimizer) for inner in _inner(member)):
        steps += [int(state["step"]) for state in inner.state.values() if "step" in state]
        steps += [int(group["step"]) for group in inner.param_groups if "step" in group]
    return max(steps)


def set_step(optimizer: Any, step: int) -> None:
    """The inverse. torch keeps the number with each parameter, Transformer Engine's and Apex's Adam with each group.

    Optimizers without Adam's moments (SGD, Muon) don't count.
    """
    for inner in (inner for member in members(optimizer) for inner in _inner(member)):
        adam = [state for state in inner.state.values() if "exp_avg" in state]
        if is_torch(inner):
            for state in adam:
                state["step"] = torch.tensor(float(step))
        elif adam or hasattr(inner, "sharded_states"):
            for group in inner.param_groups:
                group["step"] = step


def is_torch(inner: Any) -> bool:
    """Whether an optimizer is one of torch's, which count updates for each parameter, in place of each group."""
    return type(inner).__module__.startswith("torch.optim")
