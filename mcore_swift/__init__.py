"""Megatron-centric training stack: Hugging Face folder in, Megatron-Core at any layout, Hugging Face folder out."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcore_swift.peft.swift import LoRAConfig, Swift

__version__ = "0.1.0"
__all__ = ["LoRAConfig", "Swift"]


def __getattr__(name: str) -> Any:
    """Imports what is asked for, and Megatron with it, when it is: the command line answers in a tenth of a second."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mcore_swift.peft import swift

    return getattr(swift, name)
