"""A frozen base in FP8: each weight held as the matrix products take it, in no other form.

Transformer Engine casts a weight to FP8 for each step and keeps that beside the weight: 4 bytes a number. A frozen
weight never changes, so the cast is done once and the weight is let go, which leaves 2: an H100's FP8 products want
both operands along the sum, so a weight is there as it is for the forward pass, and transposed for the backward pass.

The mathematics is Transformer Engine's tensorwise recipe: a tensor's largest magnitude becomes the format's largest
number, E4M3 for weights and inputs, E5M2 for gradients (fp8_format hybrid).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from mcore_swift.models.lean import released
from mcore_swift.peft.quantized import QuantizedWeight

WEIGHTS = torch.float8_e4m3fn


def in_eight_bits(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """values → (codes of FP8 type `dtype`, shaped alike; float32 [1]: what they are multiplied by)."""
    if values.is_cuda:
        held = _quantizer(dtype).quantize_impl(values)
        return held._data.view(dtype), held._scale_inv
    largest = torch.finfo(dtype).max
    scale = largest / values.abs().amax().float()
    scale = torch.where(scale.isfinite(), scale, 1.0)
    return (values.float() * scale).clamp(-largest, largest).to(dtype), scale.reciprocal().view(1)


@cache
def _quantizer(dtype: torch.dtype) -> Any:
    """Transformer Engine's kernels for the largest magnitude and the cast."""
    types: Any = importlib.import_module("transformer_engine_torch").DType
    kinds = {torch.float8_e4m3fn: types.kFloat8E4M3, torch.float8_e5m2: types.kFloat8E5M2}
    make: Any = importlib.import_module("transformer_engine.pytorch").Float8CurrentScalingQuantizer
    quantizer = make(kinds[dtype], torch.device("cuda"), rowwise=True, columnwise=False)
    quantizer.internal = True
    return quantizer


class EightBitWeight(QuantizedWeight):
    """One layer's weight in FP8, one scale for this rank's shard."""

    _codes: Tensor  # FP8 [rows / tp, columns / tp]
    _transposed: Tensor  # FP8 [columns / tp, rows / tp]
    _scale: Tensor  # float32 [1]

    @property
    def nbytes(self) -> int:
        return self._codes.nbytes + self._transposed.nbytes + self._scale.nbytes

    @torch.no_grad()
    def store(self, whole: Tensor) -> None:
        """Takes this rank's shard [rows / tp, columns / tp]."""
        self._codes, self._scale = in_eight_bits(whole.contiguous(), WEIGHTS)
        self._transposed = self._codes.view(torch.uint8).t().contiguous().view(WEIGHTS)
        self._last = None
        self._hand_over()
        self.off = torch.linalg.vector_norm(self._dequantized().sub_(whole), dtype=torch.float32).item() ** 2
        self.size = torch.linalg.vector_norm(whole, dtype=torch.float32).item() ** 2

    def _dequantized(self) -> Tensor:
        return (self._codes.float() * self._scale).to(self.dtype)

    def product(self, inputs: Tensor) -> Tensor:
        """inputs [tokens, columns / tp] → [tokens, rows / tp], in their dtype."""
        codes, scale = in_eight_bits(inputs, WEIGHTS)
        return torch.ops.aten._scaled_mm(
            codes, self._codes.t(), scale_a=scale, scale_b=self._scale, out_dtype=inputs.dtype, use_fast_accum=True
        )

    def input_gradient(self, grad: Tensor) -> Tensor:
        """grad [tokens, rows / tp] → [tokens, columns / tp]."""
        codes, scale = in_eight_bits(grad.contiguous(), self.settings.gradients)
        return torch.ops.aten._scaled_mm(
            codes, self._transposed.t(), scale_a=scale, scale_b=self._scale, out_dtype=grad.dtype
        )

    def hang(self) -> None:
        """Lets the layer's weight go."""
        module: Any = self.site.module
        self.site.weight.requires_grad_(False)
        self.site.weight.data = released(self.site.weight)
        module.quantized_weight = self
        if hasattr(module, "_fp8_workspaces"):
            module.forward = partial(_without_casting, module, module.forward)

    def _hand_over(self) -> None:
        """Gives Transformer Engine, where it computes the layer, what it would make of the weight itself."""
        held: dict[str, Any] | None = getattr(self.site.module, "_fp8_workspaces", None)
        if held is None:
            return
        storage = importlib.import_module("transformer_engine.pytorch.tensor.storage.float8_tensor_storage")
        held["weight"] = storage.Float8TensorStorage(
            data=self._codes.view(torch.uint8),
            data_transpose=self._transposed.view(torch.uint8),
            fp8_scale_inv=self._scale,
            fp8_dtype=importlib.import_module("transformer_engine_torch").DType.kFloat8E4M3,
            fake_dtype=self.dtype,
        )


def _without_casting(module: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Transformer Engine casts a weight in a step's first micro-batch, which it is told by this."""
    module.is_first_microbatch = False
    return forward(*args, **kwargs)
