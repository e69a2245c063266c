"""NVIDIA GPUs: NCCL, Transformer Engine layers; Megatron-Core runs unpatched."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mcore_swift.errors import InputError
from mcore_swift.platform import Platform

if TYPE_CHECKING:
    import torch

    from mcore_swift.recipe import PrecisionSection

# FP8 recipe → compute capabilities [first, last) that run it natively (Transformer Engine's recipe documentation;
# blockwise is emulated with MXFP8 from Blackwell on, which is another number format, so it is not offered there).
FP8_CAPABILITIES = {
    "tensorwise": ((8, 9), (99, 0)),
    "delayed": ((8, 9), (99, 0)),
    "blockwise": ((9, 0), (10, 0)),
    "mxfp8": ((10, 0), (12, 0)),
}


def fp8_recipes(capability: tuple[int, int]) -> list[str]:
    """The FP8 recipes that a GPU of this compute capability runs natively."""
    return [name for name, (first, end) in FP8_CAPABILITIES.items() if first <= capability < end]


def device_count() -> int:
    """Visible GPUs, found without creating a CUDA context (the ranks are forked afterwards)."""
    import torch

    return torch.cuda.device_count()


def install() -> None:
    # One hardware queue keeps collectives and the GEMMs that hide them in issue order (Megatron's SP overlap).
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def set_device(local_rank: int) -> torch.device:
    import torch

    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def current_device() -> torch.device:
    import torch

    return torch.device("cuda", torch.cuda.current_device())


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name()


def memory_gib() -> float:
    import torch

    return torch.cuda.max_memory_allocated() / 2**30


def synchronize() -> None:
    import torch

    torch.cuda.synchronize()


def check_precision(precision: PrecisionSection) -> None:
    """Raises InputError when this GPU cannot run the FP8 recipe."""
    if precision.fp8 is None:
        return
    import torch

    have = torch.cuda.get_device_capability()
    allowed = fp8_recipes(have)
    if precision.fp8 not in allowed:
        raise InputError(
            f"precision.fp8: {precision.fp8} does not run on {device_name()} (compute capability {have[0]}.{have[1]});"
            f" allowed here: {', '.join(allowed) or 'none, leave it out'}"
        )


def transformer_config() -> dict[str, object]:
    return {
        "bias_activation_fusion": True,
        "bias_dropout_fusion": False,  # without a bias and dropout it is one addition, and compiled slower to call
        "masked_softmax_fusion": True,
        "apply_rope_fusion": True,
        "cross_entropy_loss_fusion": True,
        "cross_entropy_fusion_impl": "te",
        "gradient_accumulation_fusion": False,
        "use_cpu_initialization": False,
    }


PLATFORM = Platform(
    name="cuda",
    backend="nccl",
    layers="transformer_engine",
    default_dtype="bf16",
    install=install,
    set_device=set_device,
    current_device=current_device,
    device_count=device_count,
    device_name=device_name,
    memory_gib=memory_gib,
    synchronize=synchronize,
    check_precision=check_precision,
    transformer_config=transformer_config,
)
