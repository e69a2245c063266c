"""Modules without storage: what is made inside `no_storage` lies on torch's meta device, which knows shapes only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_storage() -> Iterator[None]:
    """Puts tensors on the meta device, those too that Megatron-Core 0.19.2 makes on `torch.cuda.current_device()`.

    `TransformerConfig.init_model_with_meta_device` alone reaches Transformer Engine's layers, not Megatron's own.
    """
    import torch

    meta, before = torch.device("meta"), torch.cuda.current_device
    torch.cuda.current_device = lambda: meta  # type: ignore[assignment, return-value]
    try:
        with meta:
            yield
    finally:
        torch.cuda.current_device = before
