"""The CPU: gloo, plain-torch layers, and Megatron-Core 0.19.2 made to run without CUDA.

Megatron-Core asks `torch.cuda` for its device, streams and random state, and creates tensors with `device="cuda"`.
`install` answers all of these for the CPU. It is called by a run that has chosen this platform, never at import, and it
changes only torch: Megatron's own code stays as it is. Unnecessary once Megatron-Core takes its device from
`torch.accelerator`.
"""

from __future__ import annotations

import contextlib
import functools
import platform as python_platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_swift.errors import InputError
from mcore_swift.platform import Platform

if TYPE_CHECKING:
    import torch

    from mcore_swift.recipe import PrecisionSection

# Factories that Megatron-Core calls with device="cuda" or torch.cuda.current_device().
FACTORIES = [
    "empty",
    "zeros",
    "ones",
    "full",
    "tensor",
    "as_tensor",
    "arange",
    "linspace",
    "rand",
    "randn",
    "randint",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
]


class _NoEvent:
    """Stands for torch.cuda.Event: work on the CPU is done when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _NoEvent) -> float:
        return 0.0


class _NoStream:
    """Stands for torch.cuda.Stream."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, event: _NoEvent | None = None) -> _NoEvent:
        return event or _NoEvent()


def install() -> None:
    """Makes torch answer Megatron-Core's CUDA calls for the CPU. Safe to call twice."""
    import torch

    from mcore_swift.platform import gloo

    if getattr(torch.cuda, "_mcore_swift_cpu", False):
        return
    torch.cuda._mcore_swift_cpu = True  # type: ignore[attr-defined]
    for name, value in _cuda_answers(torch).items():
        setattr(torch.cuda, name, value)
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.cuda.random.set_rng_state = torch.cuda.set_rng_state
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *args, **kwargs: 0  # type: ignore[assignment]
    # `with torch.device(...)` remembers the factories at its first use: it must see torch's own, or it has no effect
    # afterwards (transformers builds on "meta" so, and would leave its rotary frequencies uninitialized).
    with torch.device("meta"):
        torch.empty(0)
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    _patch_tensor(torch)
    gloo.install()
    _disable_compiled_fusions()


def _cuda_answers(torch: Any) -> dict[str, object]:
    cpu = torch.device("cpu")

    def nothing(*args: object, **kwargs: object) -> None:
        return None

    return {
        "current_device": lambda: cpu,
        "set_device": nothing,
        "synchronize": nothing,
        "empty_cache": nothing,
        "Stream": _NoStream,
        "Event": _NoEvent,
        "current_stream": lambda *args: _NoStream(),
        "default_stream": lambda *args: _NoStream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        # torch.manual_seed would call back into torch.cuda.manual_seed_all.
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "manual_seed_all": nothing,
        "memory_allocated": lambda *args: 0,
        "max_memory_allocated": lambda *args: 0,
        "is_current_stream_capturing": lambda: False,
        **{
            f"{kind}Tensor": getattr(torch, f"{kind}Tensor")
            for kind in ("Int", "Float", "Long", "Bool", "Byte", "BFloat16")
        },
    }


def _is_cuda(device: object) -> bool:
    return device is not None and str(device).startswith("cuda")


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)  # it would start the CUDA driver
        return function(*args, **kwargs)

    return call


def _patch_tensor(torch: Any) -> None:
    tensor_to, tensor_type = torch.Tensor.to, torch.Tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if args and not isinstance(args[0], torch.dtype | torch.Tensor) and _is_cuda(args[0]):
            args = ("cpu", *args[1:])
        return tensor_to(self, *args, **kwargs)

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # The optimizers select parameters by the name "torch.cuda.FloatTensor".
        name = tensor_type(self, *args, **kwargs)
        return name.replace("torch.", "torch.cuda.", 1) if isinstance(name, str) else name

    torch.Tensor.to, torch.Tensor.type = to, type_
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self


def _disable_compiled_fusions() -> None:
    """Megatron's jit_fuser is torch.compile, which would start a C++ compiler for each small function."""
    from megatron.core import jit

    jit.disable_jit_fuser()


def set_device(local_rank: int) -> torch.device:
    import torch

    return torch.device("cpu")


def current_device() -> torch.device:
    return set_device(0)


def device_name() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).split(":", 1)[1].strip()
    return python_platform.processor() or "CPU"


def memory_gib() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def check_precision(precision: PrecisionSection) -> None:
    if precision.fp8 is not None:
        raise InputError(
            f"precision.fp8: {precision.fp8} needs an NVIDIA GPU with Transformer Engine; on the CPU leave it out"
        )


def transformer_config() -> dict[str, object]:
    return {
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "cross_entropy_loss_fusion": False,
        "persist_layer_norm": False,
        "batch_p2p_comm": False,  # gloo has no batched isend/irecv
        "use_cpu_initialization": True,
    }


PLATFORM = Platform(
    name="cpu",
    backend="gloo",
    layers="torch",
    default_dtype="fp32",
    install=install,
    set_device=set_device,
    current_device=current_device,
    device_count=lambda: None,
    device_name=device_name,
    memory_gib=memory_gib,
    synchronize=lambda: None,
    check_precision=check_precision,
    transformer_config=transformer_config,
)
