"""How two tensors differ, bit for bit, and what the difference looks like: swapped, permuted, off by one.

Tensors are compared in blocks of fixed size, so that memory is that of the pair and little more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mcore_swift.errors import InputError

if TYPE_CHECKING:
    import torch

    from ckpt_tools.source import TensorSource

BLOCK = 4 << 20  # elements compared at a time
PRECISION = {"BF16": 8, "F16": 11, "F32": 24}  # bits of the significand
CANDIDATES = 8  # tensors looked at to find where one went; a fused tensor may stack hundreds of experts
OFF_BY_ONE = 2e-2  # a bf16 weight near 1 or 2 that was moved by 1 may have been rounded by 2⁻⁷ on the way


@dataclass(frozen=True)
class Difference:
    """One thing that differs. `elements` of `total` have other bits, the worst by `ulp` units of the coarser dtype."""

    name: str
    kind: str  # missing, extra, shape, dtype, values, non-finite, config
    message: str
    elements: int = 0
    total: int = 0
    ulp: int = 0
    worst_index: tuple[int, ...] = ()
    hint: str = ""  # what the difference looks like

    def __str__(self) -> str:
        return f"{self.name}: {self.message}{f' — {self.hint}' if self.hint else ''}"


@dataclass(frozen=True)
class Distance:
    """Elements whose bits differ, the largest distance in ulp, where it is, non-finite elements of each side."""

    elements: int
    ulp: int
    worst: int
    bad_a: int
    bad_b: int


def distance(a: torch.Tensor, b: torch.Tensor) -> Distance:
    """Of two tensors of one shape, bf16, fp16 or fp32; of different dtypes in the coarser. −0 and 0 are 1 ulp apart."""
    import torch

    elements = ulp = worst = bad_a = bad_b = 0
    flat_a, flat_b = a.flatten(), b.flatten()
    for start in range(0, len(flat_a), BLOCK):
        x, y = flat_a[start : start + BLOCK], flat_b[start : start + BLOCK]
        bad_a += _bad(x)
        bad_b += _bad(y)
        if x.dtype == y.dtype:
            if torch.equal(_bits(x), _bits(y)):  # by far the fastest way through models that are the same
                continue
            apart = (_ordinal(x) - _ordinal(y)).abs()
            elements += int((apart != 0).sum())
        else:
            elements += int((x.float() != y.float()).sum())
            coarse = x.dtype if _precision(x) < _precision(y) else y.dtype
            apart = (_ordinal(x.to(coarse)) - _ordinal(y.to(coarse))).abs()
        most = int(apart.max())
        if most > ulp:
            ulp, worst = most, start + int(apart.argmax())
    return Distance(elements, ulp, worst, bad_a, bad_b)


def _bad(values: torch.Tensor) -> int:
    """How many are NaN or infinite; the extremes, which show whether there are any, come ten times faster."""
    if all(math.isfinite(extreme) for extreme in values.aminmax()):
        return 0
    return int((~values.isfinite()).sum())


def _bits(values: torch.Tensor) -> torch.Tensor:
    import torch

    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)


def _ordinal(values: torch.Tensor) -> torch.Tensor:
    """int64 numbers in the order of the values: neighbours are 1 apart, through zero as well."""
    import torch

    bits = _bits(values).long()
    low = 0x7FFFFFFF if values.dtype == torch.float32 else 0x7FFF
    return torch.where(bits < 0, bits ^ low, bits)


def _precision(values: torch.Tensor) -> int:
    import torch

    return {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}[values.dtype]


# --- what a difference looks like -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pair:
    """A tensor that differs, the sources it is in, and tensors that Megatron fuses with it, which differ as well."""

    name: str
    a: TensorSource
    b: TensorSource
    partners: tuple[str, ...]
    heads: int  # of this projection; 0: not q or k


def explain(
    difference: Difference,
    a: TensorSource,
    b: TensorSource,
    *,
    fused: Mapping[str, tuple[str, ...]],
    differing: Collection[str],
) -> Difference:
    """The difference with a hint, where its cause shows in the tensors. `fused`: name → tensors of its fused weight."""
    name = difference.name
    if name not in a.specs or name not in b.specs:
        return difference
    config = a.model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    kind = next((heads[word] for word in name.split(".") if word in heads), 0)
    pair = _Pair(name, a, b, _partners(name, fused.get(name, ()), differing), kind)
    for look in _HINTS:
        hint = look(pair)
        if hint:
            return replace(difference, hint=hint)
    return difference


def _partners(name: str, fused: tuple[str, ...], differing: Collection[str]) -> tuple[str, ...]:
    """What the tensor may be confused with: those next to it among the fused ones, the last being next to the first."""
    if name not in fused:
        return ()
    own, count = fused.index(name), len(fused)
    near = sorted(range(count), key=lambda i: min((i - own) % count, (own - i) % count))
    return tuple(fused[i] for i in near if i != own and fused[i] in differing)[:CANDIDATES]


def _swapped(pair: _Pair) -> str:
    for other in pair.partners:
        if _same(pair, pair.name, other):
            return f"{'swapped' if _same(pair, other, pair.name) else 'moved'}: it is {other} in B"
    return ""


def _same(pair: _Pair, name_a: str, name_b: str) -> bool:
    """Whether a tensor of A has the values of a tensor of B."""
    import torch

    if name_a not in pair.a.specs or name_b not in pair.b.specs:
        return False
    if pair.a.specs[name_a].shape != pair.b.specs[name_b].shape:
        return False
    return torch.equal(pair.a.read(name_a), pair.b.read(name_b))


def _rope_order(pair: _Pair) -> str:
    """llama.cpp and Meta pair neighbouring rows for RoPE, Hugging Face the two halves of a head."""
    import torch

    if not pair.heads or pair.a.specs[pair.name].shape != pair.b.specs[pair.name].shape:
        return ""
    a, b = pair.a.read(pair.name), pair.b.read(pair.name)
    if a.size(0) % (2 * pair.heads):
        return ""
    for which, one, other in (("B", a, b), ("A", b, a)):
        if torch.equal(one, _pairs_to_halves(other, pair.heads)):
            return f"wrong RoPE permutation: its rows are in llama.cpp's order in {which}"
    return ""


def _pairs_to_halves(values: torch.Tensor, heads: int) -> torch.Tensor:
    half = values.size(0) // heads // 2
    return values.view(heads, half, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)


def _off_by_one(pair: _Pair) -> str:
    if len(pair.a.specs[pair.name].shape) != 1 or pair.a.specs[pair.name].shape != pair.b.specs[pair.name].shape:
        return ""
    apart = pair.b.read(pair.name).float() - pair.a.read(pair.name).float()
    for which, sign in (("larger", 1), ("smaller", -1)):
        if bool(((apart - sign).abs() <= OFF_BY_ONE).all()):
            return f"off by one: each element is 1 {which} in B (a zero-centred norm stores weight − 1)"
    return ""


_HINTS: tuple[Callable[[_Pair], str], ...] = (_swapped, _rope_order, _off_by_one)


def check_dtypes(source: TensorSource, name: str) -> None:
    """Raises InputError for a tensor whose dtype has no ulp here."""
    dtype = source.specs[name].dtype
    if dtype not in PRECISION:
        raise InputError(f"{source.path}: {name} is {dtype}; tensors are compared in {', '.join(PRECISION)}")


def index_of(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The index of the flat element number `flat`."""

    def digits() -> Iterator[int]:
        rest = flat
        for size in reversed(shape):
            rest, digit = divmod(rest, size)
            yield digit

    return tuple(reversed(list(digits())))
