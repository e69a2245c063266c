"""The only place that knows what hardware runs: one module a platform, chosen by name or by what is there.

A platform module offers the names of `Platform` below; the rest of the project asks it instead of `torch.cuda`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mcore_swift.errors import InputError

if TYPE_CHECKING:
    import torch

    from mcore_swift.recipe import PrecisionSection


@dataclass(frozen=True)
class Platform:
    """What the rest of the project may ask about the hardware."""

    name: Literal["cpu", "cuda"]
    backend: Literal["gloo", "nccl"]
    layers: Literal["torch", "transformer_engine"]  # which layer spec models/layers.py builds
    default_dtype: Literal["fp32", "bf16"]
    install: Callable[[], None]  # once a process, before megatron.core is imported
    set_device: Callable[[int], torch.device]  # local rank → its device
    current_device: Callable[[], torch.device]
    device_count: Callable[[], int | None]  # None: as many ranks as asked for
    device_name: Callable[[], str]
    memory_gib: Callable[[], float]  # peak memory of this rank so far
    synchronize: Callable[[], None]
    check_precision: Callable[[PrecisionSection], None]  # raises InputError where the hardware can't
    transformer_config: Callable[[], dict[str, object]]  # TransformerConfig fields that the hardware decides


def select(device: str = "auto") -> Platform:
    """Returns the platform called `device`, or for `auto` CUDA when a GPU is there and the CPU otherwise.

    Raises InputError when CUDA is asked for and missing.
    """
    from mcore_swift.platform import cpu, cuda

    found = cuda.device_count() if device in ("auto", "cuda") else 0
    if device == "cuda" and not found:
        raise InputError("runtime.device: cuda was asked for, but no GPU is visible; allowed here: cpu, auto")
    return cuda.PLATFORM if found else cpu.PLATFORM
