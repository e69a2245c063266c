"""A frozen layer and its LoRA in one step of autograd: the same values and gradients as by autograd, in float64.

Layers of Megatron's own are compared with PEFT at one rank by the other tests here. Transformer Engine's layers, which
have a norm inside, and FP8 are not to be had on the CPU: layers with the same attributes stand in for them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mcore_swift.peft import adapters, eight_bit, frozen
from mcore_swift.peft.eight_bit import EightBitWeight, in_eight_bits
from mcore_swift.peft.frozen import FrozenLinear
from mcore_swift.peft.lora import LoraBranch, LoraSettings
from mcore_swift.peft.quantized import Quantization
from mcore_swift.peft.sites import Part, Site

ROWS, COLUMNS, GROUPS = 48, 32, 2
SETTINGS = LoraSettings(rank=4, alpha=6)


class NormedLinear(nn.Module):
    """What Transformer Engine's LayerNormLinear is to Megatron, in plain torch."""

    te_return_bias = False

    def __init__(self, *, norm: bool, bias: str, columns: int = COLUMNS) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(ROWS, columns), requires_grad=False)
        self.layer_norm_weight = nn.Parameter(torch.rand(COLUMNS) + 0.5, requires_grad=False) if norm else None
        self.use_bias = bias != "none"
        self.bias = nn.Parameter(torch.randn(ROWS if self.use_bias else 0), requires_grad=False)
        self.te_return_bias = bias == "handed"
        self.eps, self.normalization, self.zero_centered_gamma = 1e-5, "RMSNorm", False
        self.config = SimpleNamespace(fp8=None)
        self.return_layernorm_output = False

    def forward(self, inputs: Tensor) -> Any:
        normed = inputs
        if self.layer_norm_weight is not None:
            normed = nn.functional.rms_norm(inputs, (COLUMNS,), self.layer_norm_weight, self.eps)
        bias = self.bias if self.use_bias and not self.te_return_bias else None
        out = nn.functional.linear(normed, self.weight, bias)
        return (out, normed) if self.return_layernorm_output else out, self.bias if self.te_return_bias else None


def branch_on(module: NormedLinear, settings: LoraSettings, adapted: tuple[str, ...]) -> LoraBranch:
    """Rows in two groups of 12 of q, 6 of k and 6 of v."""
    parts = tuple(Part(f"layer.{name}", rows, rows) for name, rows in (("q", 24), ("k", 12), ("v", 12)))
    site = Site(module, module.weight, parts, GROUPS, "none", 1, 0, expert=False)
    chosen = [part for part in parts if part.leaf in adapted]
    branch = LoraBranch(site, chosen, settings, group=None, sequence_parallel=False)
    for number, parameter in enumerate(branch.lora_B.values()):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return branch


@pytest.fixture(autouse=True)
def double(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(frozen, "linear_layers", lambda: (NormedLinear,))
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def by_autograd(branch: LoraBranch, module: NormedLinear, inputs: Tensor) -> Tensor:
    out, normed = module(inputs)[0]
    return branch.adapted(normed, out)


@pytest.mark.parametrize(("norm", "beside"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("bias", ["none", "added", "handed"])
@pytest.mark.parametrize(("adapted", "share"), [(("q", "k", "v"), False), (("q", "v"), False), (("q", "k", "v"), True)])
def test_one_step_of_autograd_is_the_many(
    norm: bool, beside: bool, bias: str, adapted: tuple[str, ...], share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`beside`: B stands beside the weight, as in BF16 on a GPU."""
    monkeypatch.setattr(FrozenLinear, "_extends", lambda self, width: beside)
    module = NormedLinear(norm=norm, bias=bias)
    branch = branch_on(module, replace(SETTINGS, share_a=share), adapted)
    module.return_layernorm_output = True
    assert frozen.fits(branch)
    inputs = torch.randn(5, 3, COLUMNS, requires_grad=True)
    weights = torch.randn(5, 3, ROWS)
    wanted = [inputs, *branch.parameters()]
    expected = by_autograd(branch, module, inputs)
    expected_grads = torch.autograd.grad((expected * weights).sum(), wanted)

    fused = FrozenLinear(branch, single=lambda: True)
    found, handed = fused(inputs)
    assert fused.took
    assert (fused.wide is not None) == beside
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert (handed is module.bias) == (bias == "handed")
    grads = torch.autograd.grad((found * weights).sum(), wanted)
    for grad, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-11, atol=1e-11)

    with torch.no_grad():  # an optimizer's step, told to nobody
        for parameter in branch.parameters():
            parameter.data += 0.1
    torch.testing.assert_close(fused(inputs)[0], by_autograd(branch, module, inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("beside", "columns"), [(False, 32), (True, 32), (False, 80), (True, 80)])
def test_swiglu_before_the_layer(beside: bool, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more columns than rows, A stands below the weight where B stands beside it."""
    monkeypatch.setattr(FrozenLinear, "_extends", lambda self, width: beside)
    module = NormedLinear(norm=False, bias="none", columns=columns)
    branch = branch_on(module, SETTINGS, ("q", "k", "v"))
    inputs, weights = torch.randn(5, 3, 2 * columns, requires_grad=True), torch.randn(5, 3, ROWS)
    module.return_layernorm_output = False
    wanted = [inputs, *branch.parameters()]
    gate, up = inputs.chunk(2, dim=-1)
    hidden = nn.functional.silu(gate) * up
    expected = branch.adapted(hidden, module(hidden)[0])
    fused = FrozenLinear(branch, single=lambda: True)
    fused.gated = True
    found = fused(inputs)[0]
    assert (fused.tall is not None) == (beside and columns > ROWS)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for grad, other in zip(
        torch.autograd.grad((found * weights).sum(), wanted),
        torch.autograd.grad((expected * weights).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(grad, other, rtol=1e-11, atol=1e-11)


def test_gradients_are_summed_until_they_are_collected() -> None:
    """Three micro-batches between two steps of the optimizer, and what a run that isn't steady gives."""
    module = NormedLinear(norm=True, bias="none")
    branch = branch_on(module, SETTINGS, ("q", "k", "v"))
    inputs = torch.randn(5, 3, COLUMNS, requires_grad=True)
    fused = FrozenLinear(branch, single=lambda: True)
    expected = torch.autograd.grad(fused(inputs)[0].square().sum(), list(branch.parameters()))
    fused.set_steady(True)
    assert not fused.steady  # without main gradients
    for parameter in branch.parameters():  # as Megatron's DDP has them
        parameter.main_grad = torch.ones_like(parameter)  # type: ignore[attr-defined]
    fused.set_steady(True)
    for _ in range(3):
        fused(inputs)[0].square().sum().backward()
    assert all(parameter.grad is None for parameter in branch.parameters())
    fused.collect()
    fused.collect()  # nothing is left
    fused.set_steady(False)
    for parameter, grad in zip(branch.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.main_grad, 1 + 3 * grad)  # type: ignore[attr-defined]
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.data += 0.1
    fused.set_steady(True)
    module.return_layernorm_output = True
    torch.testing.assert_close(fused(inputs)[0], by_autograd(branch, module, inputs), rtol=1e-12, atol=1e-12)


def test_an_expert_that_gets_no_tokens() -> None:
    module = NormedLinear(norm=False, bias="none")
    branch = branch_on(module, SETTINGS, ("q", "k", "v"))
    inputs = torch.randn(0, COLUMNS, requires_grad=True)
    out, _ = FrozenLinear(branch, single=lambda: True)(inputs)
    assert out.shape == (0, ROWS)
    gradients = torch.autograd.grad(out.sum(), [inputs, *branch.parameters()])
    assert gradients[0].shape == inputs.shape and not any(bool(gradient.any()) for gradient in gradients)


@pytest.mark.parametrize("early", [False, True])
def test_gradients_are_not_summed_where_they_are_reduced_early(early: bool) -> None:
    module = NormedLinear(norm=True, bias="none")
    fused = FrozenLinear(branch_on(module, SETTINGS, ("q",)), single=lambda: True)
    for parameter in fused.parameters:
        parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
    chunk: Any = nn.Module()
    chunk.adapters = adapters.Adapters()
    chunk.adapters.frozen.append(fused)
    chunk.config = SimpleNamespace(finalize_model_grads_func=adapters.CollectAndFinalize(lambda *_: None))
    chunk.ddp_config = SimpleNamespace(overlap_grad_reduce=early)
    with adapters.steady([chunk]):
        assert fused.steady == (not early)
        assert not fused.gathered  # it wasn't called yet
    assert not fused.steady


def test_adapters_are_put_together_once_for_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step with what the optimizer has made of them: as a layer of its own computes with the same parameters."""
    monkeypatch.setattr(FrozenLinear, "_extends", lambda self, width: True)
    chunk: Any = nn.Module()
    chunk.adapters = adapters.Adapters()
    for columns in (32, 80):
        module = NormedLinear(norm=True, bias="none", columns=columns)
        module.layer_norm_weight = nn.Parameter(torch.ones(columns), requires_grad=False)
        fused = FrozenLinear(branch_on(module, SETTINGS, ("q", "v")), single=lambda: True)
        chunk.adapters.frozen.append(fused)
        for parameter in fused.parameters:
            parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
    chunk.config = SimpleNamespace(finalize_model_grads_func=adapters.CollectAndFinalize(lambda *_: None))
    for step in range(3):
        with adapters.steady([chunk]):
            for fused in chunk.adapters.frozen:
                assert fused.gathered == (step > 0)
                inputs = torch.randn(5, fused.site.weight.size(1), requires_grad=True)
                out = fused(inputs)[0]
                assert fused.gathered
                normed = nn.functional.rms_norm(inputs, inputs.shape[1:], eps=fused.norm.eps)  # type: ignore[union-attr]
                delta = fused.branch.all_b() @ fused.branch.all_a() * SETTINGS.scaling
                torch.testing.assert_close(out, normed @ (fused.site.weight + delta).t(), rtol=1e-11, atol=1e-11)
        with torch.no_grad():
            for fused in chunk.adapters.frozen:
                for parameter in fused.parameters:
                    parameter += torch.randn_like(parameter)


def test_it_steps_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    module = NormedLinear(norm=True, bias="none")
    branch = branch_on(module, SETTINGS, ("q",))
    inputs = torch.randn(5, 3, COLUMNS)
    fused = FrozenLinear(branch, single=lambda: False)
    fused(inputs)
    assert not fused.took
    monkeypatch.setattr(FrozenLinear, "_extends", lambda self, width: True)
    fused = FrozenLinear(branch, single=lambda: True)
    fused(inputs)
    assert not module.weight.is_contiguous()
    module.layer_norm_weight.requires_grad_(True)  # type: ignore[union-attr]
    fused(inputs)
    assert not fused.took
    assert module.weight.is_contiguous()


def test_switched_off_it_is_the_layer_bit_for_bit() -> None:
    module = NormedLinear(norm=False, bias="added")
    branch = branch_on(module, SETTINGS, ("q", "k"))
    inputs = torch.randn(5, 3, COLUMNS)
    branch.enable(False)
    out, _ = FrozenLinear(branch, single=lambda: True)(inputs)
    assert torch.equal(out, inputs @ module.weight.t() + module.bias)


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({}, replace(SETTINGS, dora=True)),
        ({}, replace(SETTINGS, dropout=0.1)),
        ({"normalization": "LayerNorm"}, SETTINGS),
        ({"zero_centered_gamma": True}, SETTINGS),
        ({"config": SimpleNamespace(fp8="hybrid")}, SETTINGS),
        ({"config": SimpleNamespace(fp8=None, cpu_offloading=True)}, SETTINGS),
    ],
)
def test_what_it_does_not_fit(changes: dict[str, Any], settings: LoraSettings) -> None:
    module = NormedLinear(norm=True, bias="none")
    vars(module).update(changes)
    assert not frozen.fits(branch_on(module, settings, ("q",)))


# --- FP8 --------------------------------------------------------------------------------------------------------------


def held_in_eight_bits(module: NormedLinear, branch: LoraBranch, monkeypatch: pytest.MonkeyPatch) -> EightBitWeight:
    monkeypatch.setattr(eight_bit.QuantizedWeight, "__init__", lambda *_: None)  # no process groups here
    held = EightBitWeight(branch.site, Quantization(kind="fp8"), (None, None))
    held.site, held.settings = branch.site, Quantization(kind="fp8")
    held.shape, held.dtype, held._last = tuple(module.weight.shape), module.weight.dtype, None
    held.store(module.weight.data)
    held.hang()
    return held


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as FP8 with one scale has it, in float64."""
    scale = torch.finfo(dtype).max / values.abs().max()
    return (values * scale).float().to(dtype).double() / scale


def test_fp8_products_are_those_of_the_rounded_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32)
    module = NormedLinear(norm=False, bias="none")
    weight = module.weight.data.clone()
    branch = branch_on(module, SETTINGS, ("q", "k", "v"))
    module.config.fp8 = "hybrid"
    held = held_in_eight_bits(module, branch, monkeypatch)
    assert frozen.fits(branch)
    inputs = torch.randn(16, COLUMNS, requires_grad=True)
    slope = torch.randn(16, ROWS)
    out, _ = FrozenLinear(branch, single=lambda: True)(inputs)
    (grad,) = torch.autograd.grad(out, inputs, slope)

    eight = rounded(weight.double(), torch.float8_e4m3fn)
    delta = SETTINGS.scaling * (branch.all_b() @ branch.all_a()).double()
    exact = rounded(inputs.detach().double(), torch.float8_e4m3fn) @ eight.t() + inputs.double() @ delta.t()
    exact_grad = rounded(slope.double(), torch.float8_e5m2) @ eight + slope.double() @ delta
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(held.whole().double(), eight, rtol=1e-6, atol=0)
    assert module.weight.data.untyped_storage().nbytes() == module.weight.element_size()  # let go
    assert held.nbytes == 2 * weight.numel() + 4
    error = (held.off / held.size) ** 0.5
    assert error == pytest.approx(((eight - weight.double()).norm() / weight.double().norm()).item(), rel=1e-4)


def test_zeros_in_eight_bits() -> None:
    codes, scale = in_eight_bits(torch.zeros(3, 4), torch.float8_e4m3fn)
    assert not codes.float().any() and scale.item() == 1


# --- the kernels ------------------------------------------------------------------------------------------------------

INTERPRETED = """
import torch
from mcore_swift.peft import kernels
from mcore_swift.peft.frozen import Norm, Swiglu

torch.manual_seed(0)
for rows, n in ((5, 24), (70, 128), (3, 4100)):
    x, weight, grad = torch.randn(rows, n), torch.rand(n), torch.randn(rows, n)
    wide = torch.zeros(rows, n + 3)
    norm, plain = Norm(weight, 1e-5), torch.empty(rows, n)
    kept, reciprocal = norm.forward(x, plain), kernels.norm(x, weight, 1e-5, wide[:, :n])
    torch.testing.assert_close(wide[:, :n], plain)
    assert not wide[:, n:].any()
    torch.testing.assert_close(reciprocal, kept)
    for found, exact in zip(kernels.norm_backward(grad, x, weight, kept, again=True), norm.backward(grad, x, kept)):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)
    assert kernels.norm_backward(grad, x, weight, kept, again=False)[1] is None
    u = torch.randn(rows, 2 * n)
    Swiglu().forward(u, plain)
    kernels.swiglu(u, wide[:, :n])
    torch.testing.assert_close(wide[:, :n], plain)
    for found, exact in zip(kernels.swiglu_backward(grad, u), Swiglu().backward(grad, u, None)):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)
print("the same")
"""


STARTED = """
import torch
from mcore_swift.peft import kernels

class Kernel:
    def __init__(self):
        self.compiled = []

    def __getitem__(self, grid):
        return lambda *arguments, num_warps: self.compiled.append(arguments) or Compiled(arguments)

class Compiled:
    def __init__(self, first):
        self.first = first

    def __getitem__(self, grid):
        return lambda *arguments: started.append((grid, arguments, self.first))

started, kernel, room = [], Kernel(), torch.zeros(64)
for arguments, constants in (
    ((room, 4096, 0.5), (8,)),
    ((room[16:], 3200, 0.5), (8,)),
    ((room[1:], 4096, 0.5), (8,)),
    ((room.bfloat16(), 4096, 0.5), (8,)),
    ((room, 4097, 0.5), (8,)),
    ((room, 1, 0.5), (8,)),
    ((room, 4096, 0.25), (8,)),
    ((room, 4096, 0.5), (24,)),
):
    kernels._start(kernel, (7,), arguments, constants)
((grid, arguments, first),) = started
assert grid == (7, 1, 1) and arguments[1:] == (3200, 0.5, 8) and first[1:] == (4096, 0.5, 8)
assert len(kernel.compiled) == 7
print("the same")
"""


def test_a_kernel_is_compiled_for_each_kind_of_arguments() -> None:
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", STARTED], capture_output=True, text=True)
    assert done.stdout == "the same\n", done.stderr


@pytest.mark.slow
def test_kernels_in_tritons_interpreter() -> None:
    """Triton reads TRITON_INTERPRET when a kernel is defined, so this is a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.stdout == "the same\n", done.stderr
