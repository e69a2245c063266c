"""A frozen linear layer and the LoRA beside it as one step of autograd, where a rank holds all of the layer.

out = y Wᵀ + scaling · (y Aᵀ) Bᵀ, y being the layer's input, or its RMSNorm where Transformer Engine has that in the
layer. Beside the layer's own matrix products that is one small product, and one that is added to the output in place.
In the backward pass the branch's part is added to the layer's input gradient in place, and nothing is kept but the
input: a norm is taken again. The weights need no gradient, and neither does the norm's scale, so none is computed.

Autograd would do the same in many more steps, and a layer of Transformer Engine takes longer to be called than such a
layer to be computed: with both of them, one pack of 4,096 tokens keeps an H100 waiting for its process.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mcore_swift.models.lean import linear_layers
from mcore_swift.peft.eight_bit import EightBitWeight

if TYPE_CHECKING:
    from mcore_swift.peft.lora import LoraBranch


class FrozenLinear:
    """Stands in for the forward call of a layer with one LoRA branch.

    It steps aside, for the layer's own call and the branch's hook, where another adapter acts or a parameter of the
    layer is trained. `took`: whether the last call did all, the branch's part included.
    """

    def __init__(self, branch: LoraBranch, *, single: Callable[[], bool]) -> None:
        """`single`: whether no more than this branch acts on the layer, on all positions alike."""
        self.branch, self.site, self.single = branch, branch.site, single
        self.own = branch.site.module.forward
        self.took = False

    def __call__(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Any:
        module = self.site.module
        trained = any(parameter.requires_grad for parameter in module._parameters.values() if parameter is not None)
        self.took = not trained and self.single()
        if not self.took:
            return self.own(inputs, *args, **kwargs)
        every = [*self.branch.lora_A.values(), *self.branch.lora_B.values()] if self.branch.acts else []
        out = _FrozenLinear.apply(inputs, self, *every)
        return out, bias_of(module)[1]

    # --- what the step of autograd computes: tensors are [tokens, …] --------------------------------------------------

    def normed(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """The linear layer's input, and the reciprocal root mean squares of its rows if it is normed."""
        module: Any = self.site.module
        if not _has_norm(module):
            return inputs, None
        return torch.ops.aten._fused_rms_norm(inputs, [inputs.size(-1)], module.layer_norm_weight, module.eps)

    def through_norm(self, grad: Tensor, inputs: Tensor, reciprocal: Tensor) -> Tensor:
        """The norm's input gradient from that of its output."""
        weight = cast(Tensor, self.site.module.layer_norm_weight)
        if inputs.is_cuda:
            operation = torch.ops.aten._fused_rms_norm_backward
            return operation(grad, inputs, [inputs.size(-1)], reciprocal, weight, [True, False])[0]
        unit, scaled = inputs * reciprocal, grad * weight
        return (reciprocal * (scaled - unit * (scaled * unit).mean(-1, keepdim=True))).to(inputs.dtype)

    def product(self, inputs: Tensor) -> Tensor:
        held = getattr(self.site.module, "quantized_weight", None)
        out = held.product(inputs) if isinstance(held, EightBitWeight) else inputs @ self.site.values().t()
        bias = bias_of(self.site.module)[0]
        return out if bias is None else out.add_(bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        held = getattr(self.site.module, "quantized_weight", None)
        return held.input_gradient(grad) if isinstance(held, EightBitWeight) else grad @ self.site.values()


class _FrozenLinear(torch.autograd.Function):
    """inputs [..., in], the branch's A [rank, in] and B [rows, rank] one after the other → [..., rows]."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: FrozenLinear, *parameters: Tensor) -> Tensor:
        flat = inputs.flatten(0, -2)
        normed, reciprocal = layer.normed(flat)
        out = layer.product(normed)
        ctx.layer = layer
        if parameters:
            a, b = layer.branch.all_a(), layer.branch.all_b()
            low = normed @ a.t()
            out.addmm_(low, b.t(), alpha=layer.branch.settings.scaling)
            ctx.save_for_backward(flat, reciprocal, low, a, b)
        else:
            ctx.save_for_backward(flat if reciprocal is not None else None, reciprocal)
        return out.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layer: FrozenLinear = ctx.layer
        flat, reciprocal, *branch = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        wanted = ctx.needs_input_grad[0]
        back = layer.input_gradient(grad) if wanted else None
        own: list[Tensor] = []
        if branch:
            low, a, b = branch
            low_grad = (grad @ b).mul_(layer.branch.settings.scaling)
            if back is not None:
                back.addmm_(low_grad, a)
            own = layer.branch.shares(
                low_grad.t() @ layer.normed(flat)[0], (grad.t() @ low).mul_(layer.branch.settings.scaling)
            )
        if back is not None and reciprocal is not None:
            back = layer.through_norm(back, flat, reciprocal)
        return back.view(*grads[0].shape[:-1], -1) if back is not None else None, None, *own


def fits(branch: LoraBranch) -> bool:
    """Whether a `FrozenLinear` can stand in for the branch's layer: whole on this rank, and plain LoRA beside it."""
    site, settings = branch.site, branch.settings
    module: Any = site.module
    plain = site.split == "none" and not settings.dora and not settings.dropout
    if not plain or not isinstance(module, linear_layers()) or module.weight.dim() != 2:
        return False
    if _has_norm(module) and (module.normalization != "RMSNorm" or module.zero_centered_gamma):
        return False
    # Otherwise Transformer Engine computes the layer in FP8, and keeps copies of its weights for that.
    return not getattr(module.config, "fp8", None) or isinstance(
        getattr(module, "quantized_weight", None), EightBitWeight
    )


def _has_norm(module: nn.Module) -> bool:
    return getattr(module, "layer_norm_weight", None) is not None


def bias_of(module: Any) -> tuple[Tensor | None, Tensor | None]:
    """A linear layer's bias, if it has one: the one that it adds, and the one that it hands to what follows it."""
    bias = module.bias if getattr(module, "use_bias", True) else None  # Transformer Engine has an empty one otherwise
    handed = module.te_return_bias if hasattr(module, "te_return_bias") else module.skip_bias_add
    return (None, bias) if handed else (bias, None)


def lighten_norms(chunk: nn.Module) -> None:
    """Lets torch compute the frozen RMSNorms that are Transformer Engine modules of their own.

    Those take several times as long to be called, and compute the gradient of a scale that nobody trains.
    """
    kind: type = importlib.import_module("transformer_engine.pytorch").RMSNorm
    norms: list[Any] = [module for module in chunk.modules() if isinstance(module, kind)]
    for module in norms:
        if not module.weight.requires_grad and not module.zero_centered_gamma:
            module.forward = partial(
                nn.functional.rms_norm, normalized_shape=module.weight.shape, weight=module.weight, eps=module.eps
            )
