"""Products of several experts' tokens with their weights, each pass of all experts one call of one kernel.

Tokens are sorted by expert, and an expert's weight is [out, in], as in a linear layer. torch's grouped product takes
all weights as one tensor. Where experts' parameters lie one behind another in memory that is a view of them: `in_line`
makes new ones so, and Megatron's parameter buffers, which they move to, keep them so as they begin with the parameter
that was registered last.

Transformer Engine 2.20 asks cuBLAS once for each expert, and each time which kernel would be best: with 64 experts a
call takes 5.7 ms of the process, which is several times what an H100 takes to compute it. But it adds a weight's
gradient to the main gradient in float32; here a micro-batch's is rounded to the weight's dtype before, as Megatron does
without that fusion.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn

ROW_BYTES = 16  # a grouped product's rows must be multiples of so many


def rows_fit(weight: Tensor) -> bool:
    """Whether torch groups products with such weights."""
    return not any(size * weight.element_size() % ROW_BYTES for size in weight.shape)


def ends_of(splits: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """Tokens of each expert → where each expert's tokens end: int32 [experts] on `device`, which is not waited for."""
    if isinstance(splits, Tensor):
        return splits.cumsum(0).to(device, torch.int32, non_blocking=True)
    pinned = torch.tensor(list(accumulate(splits)), dtype=torch.int32, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


def grouped_product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Each expert's tokens times its weight, transposed: x [tokens, in], weights [experts, out, in] → [tokens, out].

    `ends`: int32 [experts], where each expert's tokens end.
    """
    return cast(Tensor, _Product.apply(x.contiguous(), weights, ends))


def grouped_linear(x: Tensor, weights: Sequence[nn.Parameter], ends: Tensor) -> Tensor:
    """The same with a parameter for each expert. x [tokens, in], weights[i] [out, in] → [tokens, out].

    Where Megatron's DDP has given the weights main gradients, their gradients are added to those here, once for all.
    """
    return cast(Tensor, _Linear.apply(x.contiguous(), ends, *weights))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights, ends)
        return _forward(x, weights, ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weights, ends = ctx.saved_tensors
        grad = grads[0].contiguous()
        to_x = _to_input(grad, weights, ends) if ctx.needs_input_grad[0] else None
        return to_x, _to_weights(grad, x, ends) if ctx.needs_input_grad[1] else None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Tensor, *weights: nn.Parameter) -> Tensor:
        ctx.weights, trained = weights, any(ctx.needs_input_grad[2:])
        ctx.save_for_backward(x if trained else None, ends)
        return _forward(x, stacked(weights), ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, ends = ctx.saved_tensors
        grad = grads[0].contiguous()
        to_x = _to_input(grad, stacked(ctx.weights), ends) if ctx.needs_input_grad[0] else None
        if x is None:
            return to_x, None, *[None for _ in ctx.weights]
        return to_x, None, *_handed(ctx.weights, _to_weights(grad, x, ends))


def _forward(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    if not x.size(0):
        return x.new_zeros(0, weights.size(1))
    return nn.functional.grouped_mm(x, weights.transpose(1, 2), offs=ends)


def _to_input(grad: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """grad [tokens, out], weights [experts, out, in] → [tokens, in]."""
    if not grad.size(0):
        return grad.new_zeros(0, weights.size(2))
    return nn.functional.grouped_mm(grad, weights, offs=ends)


def _to_weights(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """grad [tokens, out], x [tokens, in] → [experts, out, in]."""
    if not x.size(0):
        return grad.new_zeros(ends.size(0), grad.size(1), x.size(1))
    to_weights = nn.functional.grouped_mm(grad.t(), x, offs=ends)
    if x.is_cuda and torch.cuda.get_device_capability(x.device) >= (10, 0):
        # torch 2.11 leaves out an expert without tokens there (github.com/pytorch/pytorch/issues/172439).
        to_weights.masked_fill_((ends.diff(prepend=ends.new_zeros(1)) == 0)[:, None, None], 0)
    return to_weights


# --- parameters -------------------------------------------------------------------------------------------------------


def in_line(module: nn.Module, names: Sequence[str]) -> None:
    """Puts a new module's parameters of these names, alike in shape, one behind another in memory, in this order.

    They are then the module's last ones, in reverse order: Megatron's buffers turn it round once more.
    """
    own: Any = module._parameters
    found = {name: own.pop(name) for name in names}
    if not any(parameter.is_meta for parameter in found.values()):
        together = torch.stack([parameter.data for parameter in found.values()])
        for parameter, place in zip(found.values(), together, strict=True):
            parameter.data = place
    own.update(reversed(found.items()))


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """[n, *shape] of n tensors alike: a view where they lie one behind another in memory, otherwise a copy."""
    view = _view(tensors)
    return torch.stack([tensor.detach() for tensor in tensors]) if view is None else view


def _view(tensors: Sequence[Tensor]) -> Tensor | None:
    first = tensors[0].detach()
    start, step = first.data_ptr(), first.numel() * first.element_size()
    end = first.untyped_storage().data_ptr() + first.untyped_storage().nbytes()
    if start + step * len(tensors) > end or not first.is_contiguous():
        return None
    if any(tensor.data_ptr() != start + step * number for number, tensor in enumerate(tensors)):
        return None
    return first.as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()))


def _handed(weights: Sequence[Any], grads: Tensor) -> list[Tensor | None]:
    """What autograd is given for the weights' gradients [experts, out, in].

    Where the weights have main gradients, these are added to them, and what is given only calls DDP's hooks.
    """
    if not all(hasattr(weight, "main_grad") and hasattr(weight, "grad_added_to_main_grad") for weight in weights):
        return [grad if weight.requires_grad else None for weight, grad in zip(weights, grads, strict=True)]
    mains = [weight.main_grad for weight in weights]
    together = _view(mains)
    if together is not None:
        together.add_(grads)
    else:
        for main, grad in zip(mains, grads, strict=True):
            main.add_(grad)
    for weight in weights:
        weight.grad_added_to_main_grad = True
    return [_unread(weight).detach() for weight in weights]


_EMPTY: dict[tuple[torch.Size, torch.dtype, torch.device], Tensor] = {}


def _unread(weight: Tensor) -> Tensor:
    """A tensor of the weight's shape that nobody reads, the same for all weights alike."""
    key = (weight.shape, weight.dtype, weight.device)
    if key not in _EMPTY:
        _EMPTY[key] = torch.empty_like(weight, requires_grad=False)
    return _EMPTY[key]
