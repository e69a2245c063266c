"""Collectives that Megatron-Core uses and gloo hasn't: tensors of differing lengths, and split sizes given as tensors.

Experts get differing numbers of tokens. NCCL exchanges those as they are; gloo wants equal shapes, so they are padded
to the longest here. `install` puts these in front of torch's own functions, and is called by the CPU platform only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_all_to_all_single, _all_gather, _reduce_scatter = dist.all_to_all_single, dist.all_gather, dist.reduce_scatter


def install() -> None:
    dist.all_to_all_single = all_to_all_single
    dist.all_gather = all_gather
    dist.reduce_scatter = reduce_scatter


def _sizes(sizes: Tensor | Sequence[int] | None) -> Sequence[int] | None:
    return sizes.tolist() if isinstance(sizes, Tensor) else sizes


def all_to_all_single(
    output: Tensor,
    input: Tensor,
    output_split_sizes: Tensor | Sequence[int] | None = None,
    input_split_sizes: Tensor | Sequence[int] | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    return _all_to_all_single(output, input, _sizes(output_split_sizes), _sizes(input_split_sizes), *args, **kwargs)


def all_gather(tensor_list: list[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
    """Tensors that differ in their first dimension are padded to the longest; those are never asynchronous."""
    longest = max(part.size(0) for part in tensor_list) if tensor.dim() else 0
    if tensor.dim() == 0 or all(part.size(0) == longest for part in tensor_list):
        return _all_gather(tensor_list, tensor, group, async_op)
    assert not async_op
    padded = [part.new_empty((longest, *part.shape[1:])) for part in tensor_list]
    _all_gather(padded, _pad(tensor, longest), group)
    for part, found in zip(tensor_list, padded, strict=True):
        part.copy_(found[: part.size(0)])


def reduce_scatter(
    output: Tensor, input_list: list[Tensor], op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Any:
    longest = max(part.size(0) for part in input_list)
    if all(part.size(0) == longest for part in input_list):
        return _reduce_scatter(output, input_list, op, group, async_op)
    assert not async_op
    padded = output.new_empty((longest, *output.shape[1:]))
    _reduce_scatter(padded, [_pad(part, longest) for part in input_list], op, group)
    output.copy_(padded[: output.size(0)])


def _pad(tensor: Tensor, length: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros((length - tensor.size(0), *tensor.shape[1:]))])
