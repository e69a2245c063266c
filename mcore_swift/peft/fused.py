"""Adapters on experts as PEFT stores them: one A and one B for all experts of a layer.

transformers (since 5) holds a layer's experts in two tensors,

    mlp.experts.gate_up_proj [experts, 2 · ffn, hidden]        mlp.experts.down_proj [experts, hidden, ffn]

and PEFT (`target_parameters`, its ParamWrapper) gives each one pair of matrices of a rank R:

    A [experts · R, in]      row e · R + k is row k of expert e's A
    B [out, R · experts]     column k · experts + e is column k of expert e's B

so gate and up have one A. Modules that have their own, of rank r each, are written at R = 2 r, which is exact:
A = [A_gate; A_up], B = [[B_gate, 0], [0, B_up]]; PEFT does the same to adapters that were made with transformers 4.

The two wrappers lie one in the other: gate_up_proj's tensors are called `experts.base_layer.lora_A.weight` where
down_proj, whose are `experts.lora_A.weight`, is adapted, too.

Imports neither torch nor Megatron: merging works on files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mcore_swift.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_EXPERT = re.compile(r"(?P<layer>.+\.layers\.\d+)\.(mlp|block_sparse_moe)\.experts\.(?P<expert>\d+)\.(?P<leaf>\w+)")
# The last word of an expert's module → the tensor that transformers holds it in, and which of its parts it is.
_PLACES = {
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "down_proj": ("down_proj", 0),
    "w1": ("gate_up_proj", 0),  # Mixtral's names
    "w3": ("gate_up_proj", 1),
    "w2": ("down_proj", 0),
}
# Last words that PEFT 0.21 takes for an expert's or its router's in a model with experts, wherever the module is.
# Others of that name (a dense layer's, a shared expert's) are named as parameters, which it leaves alone.
MISTAKEN = {*_PLACES, "gate"}


@dataclass(frozen=True)
class Stack:
    """One of transformers' tensors of all experts. modules[e][p]: the module that is part p of expert e."""

    name: str
    modules: tuple[tuple[str, ...], ...]

    @property
    def parts(self) -> int:
        return len(self.modules[0])


def stacks_of(modules: Iterable[str]) -> dict[str, Stack]:
    """The stacks that modules of single experts are part of, by name, in the modules' order."""
    found: dict[str, dict[tuple[int, int], str]] = {}
    for module in modules:
        match = _EXPERT.fullmatch(module)
        if match and match["leaf"] in _PLACES:
            tensor, part = _PLACES[match["leaf"]]
            found.setdefault(f"{match['layer']}.mlp.experts.{tensor}", {})[int(match["expert"]), part] = module
    stacks = {}
    for name, places in found.items():
        parts = sorted({part for _, part in places})
        experts = range(1 + max(expert for expert, _ in places))
        if all((e, part) in places for e in experts for part in parts):
            stacks[name] = Stack(name, tuple(tuple(places[e, part] for part in parts) for e in experts))
    return stacks


def stack_names(modules: Collection[str], target_parameters: Sequence[str]) -> dict[str, str]:
    """Those of a PEFT file's modules that are stacks: its name for it → the stack's.

    Raises InputError where target_parameters doesn't say which of its two tensors a layer's only pair is for.
    """
    found = {}
    for module in modules:
        if module.endswith(".experts.base_layer"):
            found[module] = f"{module.removesuffix('.base_layer')}.gate_up_proj"
        elif module.endswith(".experts"):
            both = [f"{module}.{leaf}" for leaf in ("gate_up_proj", "down_proj")]
            named = [name for name in both if is_named(name, target_parameters)]
            if f"{module}.base_layer" in modules:
                named = both[1:]
            if len(named) != 1:
                raise InputError(
                    f"{module} has one A and one B, but target_parameters ({list(target_parameters)}) names"
                    f" {'both' if named else 'none'} of its gate_up_proj and down_proj"
                )
            found[module] = named[0]
    return found


def is_named(parameter: str, target_parameters: Sequence[str]) -> bool:
    """PEFT's rule: a name, or the end of one."""
    return any(parameter == target or parameter.endswith(f".{target}") for target in target_parameters)


@dataclass(frozen=True)
class Piece:
    """One module's A or B inside a stack's, `source`, of shape `whole`: every `step`-th of its `columns`.

    `zero`: further columns, where the module's rows must be 0: those of the part that it has its A beside.
    """

    source: str
    dtype: str
    whole: tuple[int, int]
    rows: slice
    columns: slice
    zero: slice | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(range(size)[part]) for size, part in zip(self.whole, (self.rows, self.columns), strict=True))

    def of(self, whole: Tensor) -> Tensor:
        """A view of the module's tensor in the stack's."""
        return whole[self.rows, self.columns]

    def read(self, read: Callable[..., Tensor], *place: slice) -> Tensor:
        """The module's tensor, or the rows and columns `place` of it, read from the stack's by `read(name, rows)`.

        Raises InputError where there should be zeros and aren't.
        """
        inside, across = place or (slice(None), slice(None))
        rows = range(self.whole[0])[self.rows][inside]
        found = read(self.source, slice(rows.start, rows.stop))
        if self.zero is not None and bool(found[:, self.zero].any()):
            raise InputError(
                f"{self.source} mixes what gate and up have of A, which adapters of single modules can't: its rank is"
                " twice the adapter's, so each of the two must have a half of A alone, and 0 in B for the other's"
            )
        return found[:, self.columns][:, across]


@dataclass(frozen=True)
class StackAdapter:
    """A stack's A and B in a file. `rank`: R. `apart`: gate and up have a half of it each."""

    stack: Stack
    module: str  # what the file calls it
    dtype: str
    rank: int
    columns: int
    rows: int  # of all parts
    apart: bool

    def shapes(self) -> dict[str, tuple[int, int]]:
        experts = len(self.stack.modules)
        return {
            f"{self.module}.lora_A.weight": (experts * self.rank, self.columns),
            f"{self.module}.lora_B.weight": (self.rows, self.rank * experts),
        }

    def pieces(self) -> Iterator[tuple[str, Piece]]:
        """Each module's A and B, by PEFT's names of single modules' tensors."""
        experts, own_rows = len(self.stack.modules), self.rows // self.stack.parts
        own = self.rank // self.stack.parts if self.apart else self.rank
        (a, a_shape), (b, b_shape) = self.shapes().items()

        def columns(first: int, expert: int) -> slice:
            return slice(first * experts + expert, (first + own) * experts, experts)

        for expert, modules in enumerate(self.stack.modules):
            for part, module in enumerate(modules):
                first = part * own if self.apart else 0
                zero = columns(own - first, expert) if self.apart else None
                rows = slice(expert * self.rank + first, expert * self.rank + first + own)
                yield f"{module}.lora_A.weight", Piece(a, self.dtype, a_shape, rows, slice(None))
                rows = slice(part * own_rows, (part + 1) * own_rows)
                yield f"{module}.lora_B.weight", Piece(b, self.dtype, b_shape, rows, columns(first, expert), zero)


def adapters_to_write(
    shapes: Mapping[str, tuple[str, tuple[int, ...]]], modules: Iterable[str], rank: int, *, share_a: bool
) -> list[StackAdapter]:
    """How single experts' tensors (dtype and shape, by name) are written as stacks'. `modules`: all of the model."""
    every = stacks_of(modules)
    adapted = {name.rsplit(".lora_", 1)[0] for name in shapes}
    chosen = {name: [m for own in stack.modules for m in own if m in adapted] for name, stack in every.items()}
    found = []
    for name, own in chosen.items():
        if not own:
            continue
        stack, module = every[name], name.rsplit(".", 1)[0]
        inner = name.endswith("gate_up_proj") and bool(chosen.get(f"{module}.down_proj"))
        apart = stack.parts > 1 and not share_a
        dtype, (_, columns) = shapes[f"{own[0]}.lora_A.weight"]
        rows = shapes[f"{own[0]}.lora_B.weight"][1][0] * stack.parts
        rank_of_all = rank * stack.parts if apart else rank
        file_name = f"{module}.base_layer" if inner else module
        found.append(StackAdapter(stack, file_name, dtype, rank_of_all, columns, rows, apart))
    return found


def adapter_in_file(
    stack: Stack, module: str, rank: int, *, apart: bool, entries: Mapping[str, object]
) -> StackAdapter:
    """A stack's adapter, checked against the shapes of a file's tensors. Raises InputError for others."""
    a, b = (entries.get(f"{module}.lora_{which}.weight") for which in "AB")
    if a is None or b is None:
        raise InputError(f"{module} has lora_{'B' if a is None else 'A'} alone")
    found = StackAdapter(stack, module, a.dtype, rank, a.shape[-1], b.shape[0], apart)  # type: ignore[attr-defined]
    for (name, shape), entry in zip(found.shapes().items(), (a, b), strict=True):
        if entry.shape != shape:  # type: ignore[attr-defined]
            raise InputError(
                f"{name} has shape {list(entry.shape)}; {len(stack.modules)} experts at rank {rank} give {list(shape)}"  # type: ignore[attr-defined]
            )
    return found
