"""Where snapshots of tensors lie until they are written: memory of the host, kept from one save to the next.

New memory is slow: its pages are made, and those for a GPU locked, at the first touch. So each save writes over the
copies of the save before it. A GPU's tensors get page-locked ("pinned") memory, which the GPU writes to directly: all
copies are queued at once and run at the full speed of its link, where a copy to other memory goes through a small
buffer of the driver, piece by piece. (`preload_tensors` of Megatron's asynchronous writer queues such copies too.)

torch rounds the size of page-locked memory up to a power of two, so that for odd sizes twice as much may be held.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

Kind = tuple[torch.Size, torch.dtype, bool]  # shape, dtype, whether the memory is page-locked


class HostCopies:
    """The copies of one snapshot at a time. Their memory is as much as the largest snapshot's."""

    def __init__(self) -> None:
        self._buffers: dict[Kind, list[Tensor]] = {}

    def take(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Contiguous copies of `tensors` in the host's memory, complete when this returns.

        They are written over those that the call before returned: nothing may read those any more.
        """
        free, self._buffers = self._buffers, defaultdict(list)
        copies = []
        for tensor in tensors:
            kind = (tensor.shape, tensor.dtype, tensor.is_cuda)
            copy = free[kind].pop(0) if free.get(kind) else _new(kind)
            copy.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
            copies.append(copy)
            self._buffers[kind].append(copy)
        if any(pinned for _, _, pinned in self._buffers):
            torch.cuda.synchronize()
        return copies


def _new(kind: Kind) -> Tensor:
    shape, dtype, pinned = kind
    return torch.empty(shape, dtype=dtype, pin_memory=True) if pinned else torch.empty(shape, dtype=dtype)
