"""Snapshots lie in memory that is made once; a GPU's go to page-locked memory, and are waited for once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mcore_swift.weights.host_copies import HostCopies


def test_copies_are_whole_and_their_memory_is_used_again() -> None:
    copies = HostCopies()
    tensors = [torch.randn(4, 6).t(), torch.randn(6, 4), torch.randn(3).bfloat16(), torch.randn(8)[2:5]]
    first = copies.take(tensors)
    assert all(torch.equal(copy, tensor) and copy.is_contiguous() for copy, tensor in zip(first, tensors, strict=True))
    # the writer copies what is a part of something larger once more
    assert all(copy.untyped_storage().size() == copy.nbytes for copy in first)
    memory = [copy.data_ptr() for copy in first]
    for tensor in tensors:
        tensor.mul_(2)
    second = copies.take(tensors)
    assert [copy.data_ptr() for copy in second] == memory
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(second, tensors, strict=True))
    other = copies.take([*tensors[1:], torch.arange(3)])  # another set: what fits is used again
    assert [copy.data_ptr() for copy in other[1:3]] == memory[2:]
    assert other[3].tolist() == [0, 1, 2] and len({copy.data_ptr() for copy in other}) == 4


class OnGpu(torch.Tensor):
    """Says that it is on a GPU."""

    is_cuda = True
    __torch_function__: Any = torch._C._disabled_torch_function_impl


def test_gpu_copies_are_queued_and_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    empty, copy_ = torch.empty, torch.Tensor.copy_

    def make(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        events.append("pinned" if pin_memory else "pageable")
        return empty(*args, **kwargs)

    def copy(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        events.append("queued" if non_blocking else "copied")
        return copy_(self, source)

    monkeypatch.setattr(torch, "empty", make)
    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("waited"))
    tensors = [torch.randn(3).as_subclass(OnGpu), torch.randn(3), torch.randn(2).as_subclass(OnGpu)]
    copies = HostCopies()
    copies.take(tensors)
    assert events == ["pinned", "queued", "pageable", "copied", "pinned", "queued", "waited"]
    events.clear()
    copies.take(tensors)
    assert events == ["queued", "copied", "queued", "waited"]
    events.clear()
    copies.take(tensors[1:2])
    assert events == ["copied"]  # states on the CPU alone
