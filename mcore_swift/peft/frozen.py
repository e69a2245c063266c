"""A frozen linear layer and the LoRA beside it as one step of autograd, where a rank holds all of the layer.

out = y Wᵀ + scaling · (y Aᵀ) Bᵀ. y is the layer's input; its RMSNorm, where Transformer Engine has that in the layer;
or SwiGLU of what the layer before it gives, at the end of a gated MLP. Only the input is kept: y is computed again.
The weights and the norm's scale get no gradient, so none is computed. In the backward pass the branch's part is added
to the layer's input gradient in place.

Between two steps of the optimizer A and B stay what they are. A trainer says when (`steady`): then those of one layer
are put together once, and their gradients are summed in float32 by the products that compute them, until `collect`
adds them to Megatron's main gradients. Otherwise every call looks at A and B anew, and autograd gets the gradients.

In BF16, where y is written anyway, B stands beside W in one matrix, [W B], and scaling · y Aᵀ beside y: then the
forward pass of the branch is a few more columns of the layer's own product. If there are more columns than rows, A
stands below W, too, and scaling · g B beside a copy of the gradient g, which is smaller than the input's.

Autograd would do the same in many more steps, and a layer of Transformer Engine takes longer to be called than such a
layer to be computed: with both of them, one pack of 4,096 tokens keeps an H100 waiting for its process.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mcore_swift.models.lean import linear_layers
from mcore_swift.peft.eight_bit import EightBitWeight

if TYPE_CHECKING:
    from mcore_swift.peft.lora import LoraBranch

LINE = 128  # bytes that a GPU's cache holds together


@dataclass(frozen=True)
class Norm:
    """RMSNorm of rows."""

    weight: Tensor
    eps: float

    def forward(self, inputs: Tensor, out: Tensor) -> Tensor:
        """inputs [rows, n] → out, alike; returns what `backward` wants to know of it."""
        if inputs.is_cuda:
            return kernels().norm(inputs, self.weight, self.eps, out)
        reciprocal = (inputs.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        out.copy_(inputs * reciprocal * self.weight)
        return reciprocal

    def backward(self, grad: Tensor, inputs: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the inputs from that of `out`, and `out` again."""
        if inputs.is_cuda:
            return kernels().norm_backward(grad, inputs, self.weight, kept, again=True)
        unit, scaled = inputs * kept, grad * self.weight
        return kept * (scaled - unit * (scaled * unit).mean(-1, keepdim=True)), unit * self.weight


@dataclass(frozen=True)
class Swiglu:
    """silu(gate) · up of rows of both."""

    def forward(self, inputs: Tensor, out: Tensor) -> None:
        """inputs [rows, 2 · n] → out [rows, n]."""
        if inputs.is_cuda:
            kernels().swiglu(inputs, out)
            return
        gate, up = inputs.chunk(2, dim=-1)
        out.copy_(nn.functional.silu(gate) * up)

    def backward(self, grad: Tensor, inputs: Tensor, kept: None) -> tuple[Tensor, Tensor]:
        """The gradient of the inputs from that of `out`, and `out` again."""
        if inputs.is_cuda:
            return kernels().swiglu_backward(grad, inputs)
        gate, up = inputs.chunk(2, dim=-1)
        share = gate.sigmoid()
        silu = gate * share
        return torch.cat([grad * up * (share + silu * (1 - share)), grad * silu], dim=-1), silu * up


class FrozenLinear:
    """Stands in for the forward call of a layer with one LoRA branch.

    It steps aside, for the layer's own call and the branch's hook, where another adapter acts or a parameter of the
    layer is trained. `took`: whether the last call did all, the branch's part included. `gated`: whether the input is
    that of SwiGLU.
    """

    def __init__(self, branch: LoraBranch, *, single: Callable[[], bool]) -> None:
        """`single`: whether no more than this branch acts on the layer, on all positions alike."""
        self.branch, self.site, self.single = branch, branch.site, single
        self.own = branch.site.module.forward
        self.took = self.gated = False
        self.added: Tensor | None = None  # the layer's bias, if it adds it
        self.handed: Tensor | None = None  # … and if it hands it on
        self.norm = Norm(branch.site.module.layer_norm_weight, branch.site.module.eps) if _has_norm(branch) else None  # type: ignore[arg-type]
        self.wide: Tensor | None = None  # [W B], its rows a multiple of LINE bytes apart
        self.tall: Tensor | None = None  # [W; A], if it is in the same memory
        self.a: Tensor | None = None  # [parts · rank, columns]; None before the first call
        self.b: Tensor  # [rows, parts · rank]
        self.places: list[Tensor] = []  # where each of `parameters` belongs in them
        self.steady = False  # from one call to the next
        self.gathered = False  # a and b are up to date, as long as it is steady
        self._fresh = False  # … and the layer is given no parameter
        self._sums: tuple[Tensor, Tensor] | None = None  # of a's and b's gradients

    def alone(self) -> bool:
        """Whether the next call does all."""
        parameters = self.site.module._parameters.values()
        return self.single() and not any(parameter.requires_grad for parameter in parameters if parameter is not None)

    @property
    def preparation(self) -> Norm | Swiglu | None:
        return Swiglu() if self.gated else self.norm

    def __call__(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._fresh and self.branch.acts and self.single():
            return _FrozenLinear.apply(inputs, self, True), self.handed
        self.took = self.alone()
        if not self.took:
            self._part()
            return self.own(inputs, *args, **kwargs)
        self.added, self.handed = bias_of(self.site.module)
        if not self.branch.acts:
            return _FrozenLinear.apply(inputs, self, False), self.handed
        if self.a is None:
            self.make_room()
        if not self.gathered:
            gather([self])
        # What autograd is given no parameter of has to be reached through its inputs.
        self._fresh = self.steady and inputs.requires_grad
        every = [] if self._fresh else self.parameters
        return _FrozenLinear.apply(inputs, self, True, *every), self.handed

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """The branch's A, and its B in the order of its parts. (A ParameterDict takes long to be asked.)"""
        return [*self.branch.lora_A.values(), *self.branch.lora_B.values()]

    # --- the branch's matrices, in one piece --------------------------------------------------------------------------

    def set_steady(self, steady: bool) -> None:
        self.steady = steady and all(hasattr(parameter, "main_grad") for parameter in self.parameters)
        self.gathered = self._fresh = False

    @torch.no_grad()
    def collect(self) -> None:
        """Adds what `accumulate` has summed to the parameters' main gradients."""
        if self._sums is None:
            return
        shares = self.branch.shares(*self._sums)
        mains: Any = [parameter.main_grad for parameter in self.parameters]  # type: ignore[attr-defined]
        views = [main.view(share.shape) for main, share in zip(mains, shares, strict=True)]
        torch._foreach_add_(views, shares)  # type: ignore[attr-defined]
        self._sums = None

    def accumulate(self, low_grad: Tensor, prepared: Tensor, grad: Tensor, low: Tensor) -> None:
        """Adds low_gradᵀ prepared to the sum of A's gradients, and gradᵀ low to that of B's."""
        assert self.a is not None
        if self._sums is None:
            kind: torch.dtype = self.parameters[0].main_grad.dtype  # type: ignore[attr-defined]
            self._sums = (torch.zeros_like(self.a, dtype=kind), self.b.new_zeros(self.b.shape, dtype=kind))
        for total, left, right in zip(self._sums, (low_grad, grad), (prepared, low), strict=True):
            if total.dtype == left.dtype:
                total.addmm_(left.t(), right)
            else:
                torch.addmm(total, left.t(), right, out_dtype=total.dtype, out=total)

    @torch.no_grad()
    def make_room(self) -> None:
        """Makes `a` and `b`, empty, and says where in them each parameter belongs."""
        branch, weight = self.branch, self.site.weight
        width = branch.settings.rank * len(branch.lora_A)
        rows, columns = weight.shape
        if self._extends(width):
            below = width if columns > rows else 0
            room = rows_apart(weight, rows + below, columns + width)
            self.wide, self.b = room[:rows], room[:rows, columns:]
            self.b.zero_()
            self.wide[:, :columns] = weight.data
            weight.data = self.wide[:, :columns]
            if below:
                self.tall = room[:, :columns]
        else:
            self.b = weight.new_zeros(rows, width)
        self.a = weight.new_empty(width, columns) if self.tall is None else self.tall[rows:]
        self.places = branch.shares(self.a, self.b)

    def _extends(self, width: int) -> bool:
        """Whether B is to stand beside the weight: rows then begin at multiples of 16 bytes, as matrix units want."""
        weight = self.site.weight
        held = hasattr(self.site.module, "quantized_weight")
        return weight.is_cuda and weight.dtype == torch.bfloat16 and not held and not (width % 8 or weight.size(1) % 8)

    def _part(self) -> None:
        """The weight is alone again: the layer's own call may not take one with gaps between its rows."""
        if self.wide is not None:
            self.site.weight.data = self.site.weight.data.contiguous()
        self.a = self.wide = self.tall = None
        self.gathered = False

    # --- the layer's own products -------------------------------------------------------------------------------------

    def product(self, inputs: Tensor) -> Tensor:
        """[tokens, columns] → [tokens, rows], without the bias."""
        held = getattr(self.site.module, "quantized_weight", None)
        return held.product(inputs) if isinstance(held, EightBitWeight) else torch.mm(inputs, self.site.values().t())

    def gradients(self, grad: Tensor, low: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """grad [tokens, rows] → the gradients of what W and A multiply, [tokens, columns], and of `low`, which B does.

        Without the branch, `low` is None, and so is the latter.
        """
        if low is None or self.a is None:
            return self.input_gradient(grad), None
        scaling = self.branch.settings.scaling
        if self.tall is None:
            low_grad = torch.empty_like(low).addmm_(grad, self.b, beta=0, alpha=scaling)
            return self.input_gradient(grad).addmm_(low_grad, self.a), low_grad
        beside = rows_apart(grad, len(grad), self.tall.size(0))
        beside[:, : grad.size(1)] = grad
        low_grad = beside[:, grad.size(1) :].addmm_(grad, self.b, beta=0, alpha=scaling)
        return torch.mm(beside, self.tall), low_grad

    def input_gradient(self, grad: Tensor) -> Tensor:
        """[tokens, rows] → [tokens, columns]."""
        held = getattr(self.site.module, "quantized_weight", None)
        return held.input_gradient(grad) if isinstance(held, EightBitWeight) else torch.mm(grad, self.site.values())


class _FrozenLinear(torch.autograd.Function):
    """inputs [..., in], the branch's A [rank, in] and B [rows, rank] one after the other → [..., rows].

    `acts`: with the branch. Its parameters are there if autograd wants their gradients, rather than the layer.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: FrozenLinear, acts: bool, *parameters: Tensor) -> Tensor:
        flat, kept, low = inputs.flatten(0, -2).contiguous(), None, None
        width, rank = layer.site.weight.size(1), layer.b.size(1) if acts else 0
        preparation, scaling = layer.preparation, layer.branch.settings.scaling
        wide = layer.wide if acts and preparation is not None else None
        whole = prepared = flat
        if preparation is not None:
            whole = (
                flat.new_empty(flat.size(0), width) if wide is None else rows_apart(flat, flat.size(0), width + rank)
            )
            prepared = whole[:, :width]
            kept = preparation.forward(flat, prepared)
        if acts:
            assert layer.a is not None
            low = flat.new_empty(flat.size(0), rank) if wide is None else whole[:, width:]
            low.addmm_(prepared, layer.a.t(), beta=0, alpha=scaling)
        if wide is not None and low is not None:
            out, low = torch.mm(whole, wide.t()), low.clone()
        else:
            out = layer.product(prepared)
            if low is not None:
                out.addmm_(low, layer.b.t())
        if layer.added is not None:
            out.add_(layer.added)
        ctx.layer, ctx.preparation, ctx.summed = layer, preparation, acts and not parameters
        ctx.save_for_backward(flat if acts or preparation is not None else None, kept, low)
        return out.view(*inputs.shape[:-1], out.size(-1))  # an expert may have no tokens: −1 could be any size

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layer: FrozenLinear = ctx.layer
        saved: tuple[Any, ...] = ctx.saved_tensors
        flat, kept, low = saved
        grad = grads[0].flatten(0, -2).contiguous()
        back, low_grad = layer.gradients(grad, low)
        prepared: Any = flat
        if ctx.preparation is not None:
            back, prepared = ctx.preparation.backward(back, flat, kept)
        own: list[Tensor] = []
        if low is not None and low_grad is not None:
            if ctx.summed:
                layer.accumulate(low_grad, prepared, grad, low)
            else:
                shares = layer.branch.shares(low_grad.t() @ prepared, grad.t() @ low)
                own = [share.reshape(p.shape) for share, p in zip(shares, layer.parameters, strict=True)]
        return back.view(*grads[0].shape[:-1], back.size(-1)), None, None, *own


@torch.no_grad()
def gather(layers: Sequence[FrozenLinear]) -> None:
    """Brings `a` and `b` of all these layers up to date, since A and B may have changed, in one call."""
    pairs = [zip(layer.places, layer.parameters, strict=True) for layer in layers]
    every = [(place, parameter.view(place.shape)) for own in pairs for place, parameter in own]
    # Those without gaps between their rows are copied by a few kernels, if no others are among them.
    for dense in (True, False):
        chosen = [pair for pair in every if pair[0].is_contiguous() == dense]
        if chosen:
            torch._foreach_copy_(*zip(*chosen, strict=True))  # type: ignore[attr-defined]
    for layer in layers:
        layer.gathered = layer.steady


def rows_apart(like: Tensor, rows: int, columns: int) -> Tensor:
    """An empty [rows, columns] of the dtype and device of `like`, its rows a multiple of LINE bytes apart."""
    numbers = LINE // like.element_size()
    return like.new_empty(rows, -(-columns // numbers) * numbers)[:, :columns]


def fits(branch: LoraBranch) -> bool:
    """Whether a `FrozenLinear` can stand in for the branch's layer: whole on this rank, and plain LoRA beside it."""
    site, settings = branch.site, branch.settings
    module: Any = site.module
    plain = site.split == "none" and not settings.dora and not settings.dropout
    if not plain or not isinstance(module, linear_layers()) or module.weight.dim() != 2:
        return False
    if _has_norm(branch) and (module.normalization != "RMSNorm" or module.zero_centered_gamma):
        return False
    if getattr(module.config, "cpu_offloading", False) or getattr(
        module.config, "fine_grained_activation_offloading", False
    ):
        return False  # what is moved is what the layer's own call keeps
    # Otherwise Transformer Engine computes the layer in FP8, and keeps copies of its weights for that.
    return not getattr(module.config, "fp8", None) or isinstance(
        getattr(module, "quantized_weight", None), EightBitWeight
    )


def _has_norm(branch: LoraBranch) -> bool:
    return getattr(branch.site.module, "layer_norm_weight", None) is not None


def bias_of(module: Any) -> tuple[Tensor | None, Tensor | None]:
    """A linear layer's bias, if it has one: the one that it adds, and the one that it hands to what follows it."""
    bias = module.bias if getattr(module, "use_bias", True) else None  # Transformer Engine has an empty one otherwise
    handed = module.te_return_bias if hasattr(module, "te_return_bias") else module.skip_bias_add
    return (None, bias) if handed else (bias, None)


def kernels() -> Any:
    return importlib.import_module("mcore_swift.peft.kernels")


# --- in a model -------------------------------------------------------------------------------------------------------


def join_gates(chunk: nn.Module) -> None:
    """Lets the last layer of each gated MLP, if it is such a layer, compute the SwiGLU before it."""
    from megatron.core.transformer.mlp import MLP

    every: list[Any] = list(chunk.modules())
    for mlp in every:
        if type(mlp) is MLP and isinstance(mlp.linear_fc2.forward, FrozenLinear) and _is_swiglu(mlp):
            vars(mlp)["forward"] = partial(_gated, mlp, mlp.forward)


def _is_swiglu(mlp: Any) -> bool:
    config, last = mlp.config, mlp.linear_fc2.forward
    plain = config.activation_func_clamp_value is None and not config.glu_linear_offset
    gated = config.gated_linear_unit and config.activation_func is nn.functional.silu and not config.add_bias_linear
    return gated and plain and not config.use_te_activation_func and not last.site.expert


def _gated(mlp: Any, own: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    last: FrozenLinear = mlp.linear_fc2.forward
    last.gated = last.alone() and not args and not any(value is not None for value in kwargs.values())
    return mlp.linear_fc2(mlp.linear_fc1(hidden)[0]) if last.gated else own(hidden, *args, **kwargs)


class _FrozenNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, norm: Norm) -> Tensor:
        flat = inputs.reshape(-1, inputs.size(-1)).contiguous()
        out = torch.empty_like(flat)
        ctx.norm = norm
        ctx.save_for_backward(flat, norm.forward(flat, out))
        return out.view(inputs.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        flat, kept = ctx.saved_tensors
        grad = grads[0].reshape(flat.shape).contiguous()
        return kernels().norm_backward(grad, flat, ctx.norm.weight, kept, again=False)[0].view(grads[0].shape), None


def lighten_norms(chunk: nn.Module) -> None:
    """Takes over the frozen RMSNorms that are Transformer Engine modules of their own.

    Those take several times as long to be called, and compute the gradient of a scale that nobody trains.
    """
    kind: type = importlib.import_module("transformer_engine.pytorch").RMSNorm
    norms: list[Any] = [module for module in chunk.modules() if isinstance(module, kind)]
    for module in norms:
        if not module.weight.requires_grad and not module.zero_centered_gamma:
            norm = Norm(module.weight, module.eps)
            module.forward = lambda inputs, norm=norm: _FrozenNorm.apply(inputs, norm)
