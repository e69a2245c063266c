"""Marks that Megatron's optimizer and gradient reductions read from parameters, where its layers set wrong ones."""

from __future__ import annotations

from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch import nn


def correct_marks(model: nn.Module) -> None:
    """Sinks are shards: unmarked, the gradient norm would count those of the first TP rank only.

    An expert's bias is no parameter of sequence parallelism: where the experts' TP size is 1, the TP ranks are among
    its data parallel ranks, and Megatron 0.19.2 would add up their gradients twice.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("softmax_offset"):
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
        if not getattr(parameter, "allreduce", True):  # it belongs to an expert
            parameter.sequence_parallel = False  # type: ignore[attr-defined]
