"""Queries, keys and values out of their product in one step of autograd: what Megatron makes of it in many."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd, _apply_rotary_pos_emb_thd
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


class Alone:
    """A context parallel group of one rank."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


@pytest.mark.parametrize("lengths", [None, [7, 1, 12]], ids=["rows", "packed"])
def test_they_are_turned_as_megatron_does(attention: Attention, lengths: list[int] | None) -> None:
    length, rows = (20, 2) if lengths is None else (20, 1)
    product = torch.randn(length, rows, GROUPS * (QUERIES + 2) * SIZE, dtype=torch.float64, requires_grad=True)
    half = torch.arange(length)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])
    table = torch.cat([half, half], dim=-1)[:, None, None].double()
    boundaries = None if lengths is None else torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
    query, key, value = tensors(attention, product)
    if boundaries is None:
        turned = [_apply_rotary_pos_emb_bshd(part, table, mscale=1.5) for part in (query, key)]
    else:
        group: Any = Alone()
        turned = [
            _apply_rotary_pos_emb_thd(part[:, 0], boundaries, table[:12], mscale=1.5, cp_group=group)[:, None]
            for part in (query, key)
        ]
    expected = [*turned, value]
    heads.join_heads(attention)
    ours: Any = attention.get_query_key_value_tensors
    ours.turning = table[:length] if boundaries is None else table[:12], boundaries, 1.5
    found = tensors(attention, product)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-13)
    slopes = [torch.randn_like(part) for part in expected]
    both = [torch.autograd.grad(parts, product, slopes)[0] for parts in (found, expected)]
    torch.testing.assert_close(*both, rtol=1e-13, atol=1e-13)
    assert ours.turning is None


def test_another_micro_batch_has_other_angles() -> None:
    """The table of angles may be the same tensor: Megatron keeps it for each length."""
    angles, table = heads._Angles(), torch.rand(8, 1, 1, 4)
    one, other = torch.tensor([0, 4, 8]), torch.tensor([0, 8])
    first = angles((table, one, 1.0), 8, 1)
    assert angles((table, one, 1.0), 8, 1) is first
    assert angles((table.detach(), one, 1.0), 8, 1) is first  # as a layer gets it that is computed again
    assert angles((table[:6], one[:1], 1.0), 1, 1) is not first
    first = angles((table, one, 1.0), 8, 1)
    assert torch.equal(first[0][4:], first[0][:4])
    assert torch.equal(angles((table, other, 1.0), 8, 1)[0], table[:, 0, 0, :2].cos())
    assert torch.equal(angles((table, other, 2.0), 8, 1)[1], 2 * table[:, 0, 0, :2].sin())
    assert len(angles((table, None, 1.0), 4, 3)[0]) == 12 and len(angles((table, None, 1.0), 4, 2)[0]) == 8


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
for groups, queries, n, tokens in ((5, 4, 24, 0), (40, 1, 128, 0), (7, 6, 80, 0), (6, 4, 24, 3), (40, 1, 128, 20)):
    norms = [Norm(torch.rand(n) + 0.5, 1e-5) for _ in range(2)]
    plain = Heads(queries, n, *norms)
    turns = torch.rand(tokens, n // 2)
    angles = (turns.cos(), turns.sin()) if tokens else None
    product = torch.randn(groups, queries + 2, n)
    *expected, _ = plain.split(product, angles)
    found = [torch.full_like(part, torch.nan) for part in expected]
    weights = [norm.weight for norm in norms]
    kept = kernels.heads(product, *weights, 1e-5, angles, *found)
    slopes = [torch.randn_like(part) for part in expected]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    gradient = kernels.heads_backward(*slopes, product, *weights, angles, kept)
    torch.testing.assert_close(gradient, plain.join(slopes, product, None, angles), rtol=1e-5, atol=1e-6)
print("the same")
"""


def test_kernels_in_tritons_interpreter() -> None:
    """Triton reads TRITON_INTERPRET when a kernel is defined, so this is a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.stdout == "the same\n", done.stderr
