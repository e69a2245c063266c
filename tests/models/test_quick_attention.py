"""Transformer Engine's fused attention started without its module: here a fake of both, the kernel in plain torch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from mcore_swift.models import quick_attention
from mcore_swift.models.attention import TorchAttention

HEADS, GROUPS, SIZE, SCALE = 4, 2, 8, 0.3
LENGTHS = [5, 1, 10]
ARBITRARY = "F16_arbitrary_seqlen"


def attention(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor) -> Tensor:
    """[t, heads, size]: the CPU platform's, each document by itself."""
    core = TorchAttention.__new__(TorchAttention)
    torch.nn.Module.__init__(core)
    core.window, core.dropout, core.scale, core.cp_group = None, 0.0, SCALE, None
    packed: Any = SimpleNamespace(cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries)
    return core(query, key, value, None, packed_seq_params=packed).view(query.shape)


class Kernels:
    """Transformer Engine's two functions: what they are called with, and what they compute."""

    FusedAttnBackend: ClassVar[dict[str, int]] = {ARBITRARY: 1, "FP8": 2}

    def __init__(self) -> None:
        self.calls: list[str] = []

    def fused_attn_fwd(
        self, trained: bool, longest_q: int, longest_kv: int, cu_q: Tensor, cu_kv: Tensor, *tensors: Any, **words: Any
    ) -> tuple[Tensor, list[Tensor]]:
        query, key, value, dtype, backend = tensors
        assert (longest_q, longest_kv, dtype, backend) == (10, 10, torch.float64, 1)
        assert words["attn_scale"] == SCALE and words["attn_mask_type"] == "padding_causal"
        assert words["cu_seqlens_q_padded"] is cu_q and words["cu_seqlens_kv_padded"] is cu_kv
        self.calls.append("trained" if trained else "read")
        return attention(query, key, value, cu_q), [torch.ones(3), torch.ones(2)] if trained else []

    def fused_attn_bwd(self, *args: Any, **words: Any) -> tuple[Tensor, ...]:
        longest_q, longest_kv, cu_q, _, query, key, value, out, grad, dtype, kept, backend = args
        assert (longest_q, longest_kv, dtype, backend) == (10, 10, torch.float64, 1)
        assert [len(part) for part in kept] == [3, 2] and grad.is_contiguous() and not words["deterministic"]
        assert words["do_format"] == "thd" and words["dqkv_layout"] == words["qkv_layout"] == "thd_thd_thd"
        self.calls.append("back")
        with torch.enable_grad():
            inputs = [part.detach().requires_grad_() for part in (query, key, value)]
            again = attention(inputs[0], inputs[1], inputs[2], cu_q)
            torch.testing.assert_close(again, out)
            return *torch.autograd.grad(again, inputs, grad), torch.empty(0), torch.empty(0)


class Module:
    """TEDotProductAttention, as far as it is asked."""

    training, softmax_scale, deterministic = True, SCALE, False

    def __init__(self) -> None:
        self.calls = 0

    def own(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, kind: Any, bias: Any, packed: Any) -> Tensor:
        self.calls += 1
        return attention(query, key, value, packed.cu_seqlens_q).flatten(1)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    torch.manual_seed(0)
    made = Kernels()
    monkeypatch.setattr(quick_attention, "kernels", lambda: made)
    monkeypatch.setattr(quick_attention, "_chosen", lambda: 1)
    return made


def packed(**changes: Any) -> Any:
    boundaries = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0).int()
    fields = {"cu_seqlens_q_padded": None, "cu_seqlens_kv_padded": None, "max_seqlen_q": 10, "max_seqlen_kv": 10}
    return SimpleNamespace(cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries, **(fields | changes))


def inputs() -> list[Tensor]:
    shapes = (HEADS, GROUPS, GROUPS)
    return [torch.randn(sum(LENGTHS), heads, SIZE, dtype=torch.float64, requires_grad=True) for heads in shapes]


def call(module: Module, known: dict[Any, Any], tensors: list[Tensor], params: Any, **more: Any) -> Tensor:
    query, key, value = tensors
    own: Any = module.own
    return quick_attention.attend(
        module, own, known, query, key, value, None, AttnMaskType.causal, packed_seq_params=params, **more
    )


def test_the_first_call_is_the_modules_and_the_next_are_the_same(fake: Kernels) -> None:
    module, known, tensors = Module(), {}, inputs()
    first = call(module, known, tensors, packed())
    assert module.calls == 1 and not fake.calls
    second = call(module, known, tensors, packed())
    assert module.calls == 1 and fake.calls == ["trained"] and torch.equal(first, second)
    slope = torch.randn_like(first)
    theirs, ours = (torch.autograd.grad(out, tensors, slope) for out in (first, second))
    assert fake.calls == ["trained", "back"]
    for expected, found in zip(theirs, ours, strict=True):
        torch.testing.assert_close(found, expected)


def test_nothing_is_kept_where_there_is_no_pass_backward(fake: Kernels) -> None:
    module, known, tensors = Module(), {}, inputs()
    with torch.no_grad():
        expected = call(module, known, tensors, packed())
        assert torch.equal(call(module, known, tensors, packed()), expected)
    assert fake.calls == ["read"]


def test_another_kind_is_the_modules_first(fake: Kernels) -> None:
    module, known, tensors = Module(), {}, inputs()
    call(module, known, tensors, packed())
    call(module, known, tensors, packed(max_seqlen_q=16))
    module.training = False
    call(module, known, tensors, packed())
    assert module.calls == 3 and len(known) == 3 and not fake.calls


def test_other_kernels_stay_the_modules(fake: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick_attention, "_chosen", lambda: None)
    module, known, tensors = Module(), {}, inputs()
    for _ in range(3):
        call(module, known, tensors, packed())
    assert module.calls == 3 and not fake.calls


@pytest.mark.parametrize("how", ["padded", "strided"])
def test_other_inputs_stay_the_modules(fake: Kernels, how: str) -> None:
    module, known, tensors = Module(), {}, inputs()
    params = packed()
    if how == "padded":
        params.cu_seqlens_q_padded = params.cu_seqlens_q
    else:
        tensors[0] = torch.randn(HEADS, sum(LENGTHS), SIZE, dtype=torch.float64).transpose(0, 1)
    for _ in range(2):
        call(module, known, tensors, params)
    assert module.calls == 2 and not fake.calls and not known


PLAIN = {
    "fp8_dot_product_attention": False,
    "fp8_multi_head_attention": False,
    "cpu_offloading": False,
    "fine_grained_activation_offloading": False,
    "fp8": "hybrid",
    "fp8_recipe": "tensorwise",
    "recompute_granularity": None,
    "qk_clip": False,
    "log_max_attention_logit": False,
    "context_parallel_size": 1,
    "softmax_type": "vanilla",
}


def is_plain(module: dict[str, Any], config: dict[str, Any]) -> bool:
    own = {"attention_dropout": 0.0, "attn_mask_type": "causal", "window_size": (-1, 0)}
    fused = SimpleNamespace(use_FAv2_bwd=False)
    made = SimpleNamespace(**(own | module), fused_attention=fused, config=SimpleNamespace(**(PLAIN | config)))
    return quick_attention.is_plain(made)


def test_what_is_plain() -> None:
    assert is_plain({}, {})
    other = {"context_parallel_size": 2, "softmax_type": "learnable", "recompute_granularity": "full"}
    other["fp8_recipe"] = "delayed"
    for name, value in PLAIN.items():
        if name != "fp8":
            assert not is_plain({}, {name: other.get(name, not value)}), name
    assert is_plain({}, {"fp8": None, "recompute_granularity": "full", "fp8_recipe": "delayed"})
    for name, value in (("attention_dropout", 0.1), ("attn_mask_type", "no_mask"), ("window_size", (128, 0))):
        assert not is_plain({name: value}, {}), name
