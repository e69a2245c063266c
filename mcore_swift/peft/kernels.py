"""Triton kernels for what a frozen linear layer does to its input first, RMSNorm or SwiGLU, and for heads of attention.

Numbers are loaded in their own dtype, computed in float32 and rounded once. A backward kernel gives the prepared input
again beside the gradient, for that costs one write more, and keeping it would cost its memory until then.
"""

# Launching a kernel adds arguments, and makes constants of numbers; only within kernels may one be called:
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 4096  # of a program, about
GATES = 2048
WARPS = 8


@triton.jit
def _norm(x, weight, y, reciprocal, rows, n, x_stride, y_stride, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    numbers = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, column = numbers[:, None].to(tl.int64), tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < n)
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    root = tl.rsqrt(tl.sum(value * value, 1) / n + eps)
    scale = tl.load(weight + column, mask=column < n, other=0.0).to(tl.float32)
    tl.store(y + row * y_stride + column, (value * root[:, None] * scale).to(y.dtype.element_ty), mask=inside)
    tl.store(reciprocal + numbers, root, mask=numbers < rows)


@triton.jit
def _norm_backward(
    grad, x, weight, reciprocal, dx, y, rows, n, ROWS: tl.constexpr, BLOCK: tl.constexpr, AGAIN: tl.constexpr
):
    numbers = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, column = numbers[:, None].to(tl.int64), tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < n)
    place = row * n + column
    root = tl.load(reciprocal + numbers, mask=numbers < rows, other=0.0)[:, None]
    unit = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * root
    scale = tl.load(weight + column, mask=column < n, other=0.0).to(tl.float32)
    scaled = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32) * scale
    mean = tl.sum(scaled * unit, 1)[:, None] / n
    tl.store(dx + place, (root * (scaled - unit * mean)).to(dx.dtype.element_ty), mask=inside)
    if AGAIN:
        tl.store(y + place, (unit * scale).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu(u, h, width, h_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(u + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(u + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(h + row * h_stride + column, (gate * tl.sigmoid(gate) * up).to(h.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(grad, u, du, h, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    first, second = row * 2 * width + column, row * 2 * width + width + column
    gate = tl.load(u + first, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(u + second, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(grad + row * width + column, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    silu = gate * share
    tl.store(du + first, (slope * up * (share + silu * (1 - share))).to(du.dtype.element_ty), mask=inside)
    tl.store(du + second, (slope * silu).to(du.dtype.element_ty), mask=inside)
    tl.store(h + row * width + column, (silu * up).to(h.dtype.element_ty), mask=inside)


@triton.jit
def _head_rows(
    q_weight,
    k_weight,
    cosines,
    sines,
    rows,
    n,
    QUERIES: tl.constexpr,
    TURNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> Any:
    """Of a program's rows: their numbers, group and place in it, where their first halves lie; the columns of a half,
    and which of all that there is; the norm's weights of both halves, and the angles' cosines and sines (none for
    values).

    TURNS: groups of a token; 0: nothing is turned.
    """
    numbers = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, column = numbers[:, None].to(tl.int64), tl.arange(0, BLOCK)[None, :]
    group, head = row // (QUERIES + 2), row % (QUERIES + 2)
    inside = (row < rows) & (column < n // 2)
    first = tl.load(q_weight + column, mask=column < n // 2, other=0.0).to(tl.float32)
    second = tl.load(q_weight + n // 2 + column, mask=column < n // 2, other=0.0).to(tl.float32)
    key_first = tl.load(k_weight + column, mask=column < n // 2, other=0.0).to(tl.float32)
    key_second = tl.load(k_weight + n // 2 + column, mask=column < n // 2, other=0.0).to(tl.float32)
    first = tl.where(head < QUERIES, first, key_first)
    second = tl.where(head < QUERIES, second, key_second)
    cosine = tl.full((ROWS, BLOCK), 1.0, tl.float32)
    sine = tl.full((ROWS, BLOCK), 0.0, tl.float32)
    if TURNS > 0:
        angle = group // TURNS * (n // 2) + column
        cosine = tl.load(cosines + angle, mask=inside & (head <= QUERIES), other=1.0)
        sine = tl.load(sines + angle, mask=inside & (head <= QUERIES), other=0.0)
    return numbers, group, head, row * n + column, column, inside, first, second, cosine, sine


@triton.jit
def _heads(
    x,
    q_weight,
    k_weight,
    cosines,
    sines,
    q,
    k,
    v,
    reciprocal,
    rows,
    n,
    eps,
    QUERIES: tl.constexpr,
    TURNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    numbers, group, head, place, column, inside, first, second, cosine, sine = _head_rows(
        q_weight, k_weight, cosines, sines, rows, n, QUERIES, TURNS, ROWS, BLOCK
    )
    low = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x + place + n // 2, mask=inside, other=0.0).to(tl.float32)
    root = tl.rsqrt(tl.sum(low * low + high * high, 1) / n + eps)
    value = inside & (head == QUERIES + 1)
    tl.store(v + group * n + column, low.to(v.dtype.element_ty), mask=value)
    tl.store(v + group * n + n // 2 + column, high.to(v.dtype.element_ty), mask=value)
    low, high = low * root[:, None] * first, high * root[:, None] * second
    found, other = low * cosine - high * sine, high * cosine + low * sine
    query, key = inside & (head < QUERIES), inside & (head == QUERIES)
    tl.store(q + (group * QUERIES + head) * n + column, found.to(q.dtype.element_ty), mask=query)
    tl.store(q + (group * QUERIES + head) * n + n // 2 + column, other.to(q.dtype.element_ty), mask=query)
    tl.store(k + group * n + column, found.to(k.dtype.element_ty), mask=key)
    tl.store(k + group * n + n // 2 + column, other.to(k.dtype.element_ty), mask=key)
    tl.store(reciprocal + numbers, root, mask=numbers < rows)


@triton.jit
def _heads_backward(
    dq,
    dk,
    dv,
    x,
    q_weight,
    k_weight,
    cosines,
    sines,
    reciprocal,
    dx,
    rows,
    n,
    QUERIES: tl.constexpr,
    TURNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    numbers, group, head, place, column, inside, first, second, cosine, sine = _head_rows(
        q_weight, k_weight, cosines, sines, rows, n, QUERIES, TURNS, ROWS, BLOCK
    )
    root = tl.load(reciprocal + numbers, mask=numbers < rows, other=0.0)[:, None]
    low = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * root
    high = tl.load(x + place + n // 2, mask=inside, other=0.0).to(tl.float32) * root
    query, key, value = inside & (head < QUERIES), inside & (head == QUERIES), inside & (head == QUERIES + 1)
    of_query, of_group = (group * QUERIES + head) * n + column, group * n + column
    # A row belongs to one of the three; the others' loads give 0.
    grad = tl.load(dq + of_query, mask=query, other=0.0).to(tl.float32)
    grad += tl.load(dk + of_group, mask=key, other=0.0).to(tl.float32)
    other = tl.load(dq + of_query + n // 2, mask=query, other=0.0).to(tl.float32)
    other += tl.load(dk + of_group + n // 2, mask=key, other=0.0).to(tl.float32)
    grad, other = (grad * cosine + other * sine) * first, (other * cosine - grad * sine) * second
    mean = tl.sum(grad * low + other * high, 1)[:, None] / n
    of_values = tl.load(dv + of_group, mask=value, other=0.0).to(tl.float32)
    other_values = tl.load(dv + of_group + n // 2, mask=value, other=0.0).to(tl.float32)
    grad = tl.where(head == QUERIES + 1, of_values, root * (grad - low * mean))
    other = tl.where(head == QUERIES + 1, other_values, root * (other - high * mean))
    tl.store(dx + place, grad.to(dx.dtype.element_ty), mask=inside)
    tl.store(dx + place + n // 2, other.to(dx.dtype.element_ty), mask=inside)


@cache
def _rows_a_program(n: int) -> tuple[int, int]:
    """ROWS and BLOCK."""
    block: Any = triton.next_power_of_2(n)
    return max(1, NUMBERS // block), block


_compiled: dict[tuple[Any, ...], Any] = {}  # what Triton made of a kernel for arguments of a kind


def _start(kernel: Any, programs: tuple[Any, ...], arguments: Sequence[Any], constants: Sequence[Any]) -> None:
    """kernel[programs](*arguments, *constants).

    Triton looks anew at each argument and at its own settings, which takes longer than starting the kernel. It compiles
    for dtypes, and for pointers and integers that are multiples of 16, or 1: arguments that agree in these take what it
    compiled before.
    """
    kind = (kernel, *constants, *map(_kind, arguments))
    grid = (*programs, 1, 1)[:3]
    found = _compiled.get(kind)
    if found is None:
        _compiled[kind] = kernel[grid](*arguments, *constants, num_warps=WARPS)
    else:
        found[grid](*arguments, *constants)


def _kind(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, float) or argument < 16:
        return argument
    return "a multiple" if argument % 16 == 0 else "another"


def norm(x: Tensor, weight: Tensor, eps: float, y: Tensor) -> Tensor:
    """x [rows, n] → y [rows, n], its rows' RMSNorm times `weight`; returns 1 / root mean square, float32 [rows, 1].

    Both have rows of neighbouring numbers; y's rows may be further apart.
    """
    rows, n = x.shape
    reciprocal = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    count, block = _rows_a_program(n)
    arguments = (x, weight, y, reciprocal, rows, n, x.stride(0), y.stride(0), eps)
    _start(_norm, (triton.cdiv(rows, count),), arguments, (count, block))
    return reciprocal


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, reciprocal: Tensor, *, again: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradient of x, and y again if asked for; all contiguous [rows, n]."""
    rows, n = x.shape
    dx = torch.empty_like(x)
    y = torch.empty_like(x) if again else None
    count, block = _rows_a_program(n)
    arguments = (grad, x, weight, reciprocal, dx, dx if y is None else y, rows, n)
    _start(_norm_backward, (triton.cdiv(rows, count),), arguments, (count, block, again))
    return dx, y


def swiglu(u: Tensor, h: Tensor) -> None:
    """u [rows, 2 · width], gate and up → h [rows, width]; h's rows may be further apart than its width."""
    rows, width = h.shape
    _start(_swiglu, (rows, triton.cdiv(width, GATES)), (u, h, width, h.stride(0)), (GATES,))


def swiglu_backward(grad: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of u, and h again, from that of h; all contiguous."""
    rows, width = grad.shape
    du, h = torch.empty_like(u), torch.empty_like(grad)
    _start(_swiglu_backward, (rows, triton.cdiv(width, GATES)), (grad, u, du, h, width), (GATES,))
    return du, h


Angles = tuple[Tensor, Tensor]  # cosines and sines, float32 [tokens, n / 2], contiguous


def heads(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, angles: Angles | None, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """x [groups, queries + 2, n] → q [groups, queries, n] and k [groups, 1, n], normed and turned, and v; contiguous.

    Groups: of all tokens, in order. None: nothing is turned. Returns 1 / root mean square of all rows of x, float32
    [groups, queries + 2, 1].
    """
    groups, both, _ = x.shape
    reciprocal = torch.empty(groups, both, 1, dtype=torch.float32, device=x.device)
    turned = (x, x) if angles is None else angles
    arguments = (x, q_weight, k_weight, *turned, q, k, v, reciprocal, groups * both, x.size(2), eps)
    _start_heads(_heads, x, angles, arguments)
    return reciprocal


def heads_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    x: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    angles: Angles | None,
    reciprocal: Tensor,
) -> Tensor:
    """The gradient of x from those of q, k and v; all contiguous."""
    groups, both, n = x.shape
    dx = torch.empty_like(x)
    turned = (x, x) if angles is None else angles
    arguments = (dq, dk, dv, x, q_weight, k_weight, *turned, reciprocal, dx, groups * both, n)
    _start_heads(_heads_backward, x, angles, arguments)
    return dx


def _start_heads(kernel: Any, x: Tensor, angles: Angles | None, arguments: Sequence[Any]) -> None:
    groups, both, n = x.shape
    count, block = _rows_a_program(n // 2)
    count = max(1, count // 2)
    turns = 0 if angles is None else groups // len(angles[0])
    _start(kernel, (triton.cdiv(groups * both, count),), arguments, (both - 2, turns, count, block))
