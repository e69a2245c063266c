"""Queries, keys and values out of their product in one step of autograd: what Megatron makes of it in many."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn

from mcore_swift.models.layers import RMSNorm
from mcore_swift.peft import heads

GROUPS, QUERIES, SIZE = 3, 2, 8


class Attention(nn.Module):
    """What of Megatron's attention its own method reads, and ours; of one rank."""

    get_query_key_value_tensors = SelfAttention.get_query_key_value_tensors

    def __init__(
        self, *, zero_centered: bool = False, eps: tuple[float, float] = (1e-6, 1e-6), width: int = SIZE
    ) -> None:
        super().__init__()
        self.linear_qkv = nn.Identity()
        config: Any = SimpleNamespace(
            num_query_groups=GROUPS,
            fine_grained_activation_offloading=False,
            test_mode=False,
            layernorm_zero_centered_gamma=zero_centered,
            sequence_parallel=False,
        )
        self.config, self.world_size = config, 1
        self.num_attention_heads_per_partition, self.num_query_groups_per_partition = GROUPS * QUERIES, GROUPS
        self.hidden_size_per_attention_head = SIZE
        self.q_layernorm, self.k_layernorm = (RMSNorm(config, width, eps=own) for own in eps)
        for norm in (self.q_layernorm, self.k_layernorm):
            norm.weight = nn.Parameter(torch.rand(width, dtype=torch.float64) + 0.5, requires_grad=False)


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> Attention:
    torch.manual_seed(0)
    monkeypatch.setattr(
        "megatron.core.transformer.attention.apply_module",
        lambda module: lambda x: (x, None) if module is None else module(x),
    )
    made = Attention()
    made.linear_qkv.forward = lambda x: (x, None)  # type: ignore[method-assign]
    return made


def tensors(attention: Attention, product: Tensor) -> tuple[Tensor, ...]:
    return attention.get_query_key_value_tensors(product)  # type: ignore[call-arg, return-value]


def test_they_are_megatrons_and_so_is_the_gradient(attention: Attention) -> None:
    product = torch.randn(5, 2, GROUPS * (QUERIES + 2) * SIZE, dtype=torch.float64, requires_grad=True)
    expected = tensors(attention, product)
    heads.join_heads(attention)
    assert "get_query_key_value_tensors" in vars(attention)
    found = tensors(attention, product)
    slopes = [torch.randn_like(part) for part in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs) and ours.is_contiguous()
    ours, theirs = (torch.autograd.grad(parts, product, slopes)[0] for parts in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def test_a_norm_that_is_trained_gets_its_gradient(attention: Attention) -> None:
    heads.join_heads(attention)
    attention.k_layernorm.weight.requires_grad_(True)
    tensors(attention, torch.randn(5, 2, GROUPS * (QUERIES + 2) * SIZE, dtype=torch.float64))[1].sum().backward()
    assert attention.k_layernorm.weight.grad is not None


@pytest.mark.parametrize(
    "changes",
    [{"zero_centered": True}, {"eps": (1e-6, 1e-5)}, {"width": SIZE * QUERIES}],
    ids=lambda changes: str(changes),
)
def test_other_norms_are_left_alone(changes: dict[str, Any]) -> None:
    attention = Attention(**changes)
    heads.join_heads(attention)
    assert "get_query_key_value_tensors" not in vars(attention)


INTERPRETED = """
import torch
from mcore_swift.peft import kernels
from mcore_swift.peft.frozen import Norm
from mcore_swift.peft.heads import Heads

torch.manual_seed(0)
for groups, queries, n in ((5, 4, 24), (40, 1, 128), (7, 6, 80)):
    norms = [Norm(torch.rand(n) + 0.5, 1e-5) for _ in range(2)]
    plain = Heads(queries, n, *norms)
    product = torch.randn(groups, queries + 2, n)
    *expected, _ = plain.split(product)
    found = [torch.full_like(part, torch.nan) for part in expected]
    weights = [norm.weight for norm in norms]
    kept = kernels.heads(product, *weights, 1e-5, *found)
    slopes = [torch.randn_like(part) for part in expected]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    gradient = kernels.heads_backward(*slopes, product, *weights, kept)
    torch.testing.assert_close(gradient, plain.join(slopes, product, None), rtol=1e-5, atol=1e-6)
print("the same")
"""


def test_kernels_in_tritons_interpreter() -> None:
    """Triton reads TRITON_INTERPRET when a kernel is defined, so this is a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.stdout == "the same\n", done.stderr
