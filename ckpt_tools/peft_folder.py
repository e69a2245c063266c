"""A PEFT LoRA folder, checked against its base's headers: which tensors it changes, and how.

What an adapter may ask for beyond what is honoured is refused by name: a feature that is overlooked gives a model that
is wrong and looks right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_swift.errors import InputError, nearest
from mcore_swift.peft import fused
from mcore_swift.peft.peft_config import CONFIG, PREFIX, WEIGHTS, listed, read_config, scaling_of, stack_names
from mcore_swift.weights import safetensors_io as io

if TYPE_CHECKING:
    import torch

FLOATS = ("F32", "BF16", "F16")
# Tensor name → module and part. PEFT saves DoRA's magnitude with and without ".weight", by version.
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector|base_layer\.weight)(\.weight)?"
)


@dataclass(frozen=True)
class Target:
    """One LoRA'd module: names of its tensors in the adapter's file (of an expert's: its pieces of them), and s."""

    a: str | fused.Piece
    b: str | fused.Piece
    magnitude: str | None
    base: str | None  # PEFT saves the weight itself, too, of an output layer that is targeted
    scaling: float


@dataclass(frozen=True)
class Adapter:
    """A PEFT LoRA folder that fits its base: what becomes of the base's tensors, by their names."""

    weights: _OneFile
    targets: Mapping[str, Target]
    replaced: Mapping[str, str]  # modules_to_save: base tensor → tensor in the adapter's file

    def apply(self, name: str, base: torch.Tensor) -> torch.Tensor:
        """The merged tensor: float32 where LoRA changes it, else a tensor as it is saved."""
        if name in self.replaced:
            return self.weights.read(self.replaced[name])
        if name not in self.targets:
            return base
        target = self.targets[name]
        a, b = self.weights.read(target.a).float(), self.weights.read(target.b).float()
        weight = base if target.base is None else self.weights.read(target.base)
        merged = (b @ a).mul_(target.scaling).add_(weight)
        if target.magnitude is not None:
            magnitude = self.weights.read(target.magnitude).float()
            merged.mul_((magnitude / merged.norm(dim=1))[:, None])
        return merged


class _OneFile:
    """The tensors of one safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = io.read_header(path)
        self._handle: Any = None

        self._whole = lru_cache(maxsize=4)(self.read)  # A and B of a layer's experts: both stacks'

    def read(self, name: str | fused.Piece) -> torch.Tensor:
        from safetensors import safe_open

        if isinstance(name, fused.Piece):
            return name.of(self._whole(name.source))
        self._handle = self._handle or safe_open(self.path, framework="pt")
        return self._handle.get_tensor(name)


@dataclass
class _Misfits:
    """Everything about an adapter that doesn't fit, listed whole."""

    found: list[str] = field(default_factory=list)

    def add(self, problem: str) -> None:
        self.found.append(problem)

    def raise_if_any(self, adapter: Path, base: Path) -> None:
        if self.found:
            shown = "; ".join(self.found[:20]) + (f" and {len(self.found) - 20} more" if len(self.found) > 20 else "")
            raise InputError(f"{adapter}: this adapter does not fit {base}: {shown}")


def read_adapter(folder: Path, base: io.SafetensorsFolder, *, tied: bool) -> Adapter:
    """The adapter, checked against the base's headers. Raises InputError that lists everything that doesn't fit."""
    config = read_config(folder)
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        why = " (a pickled adapter_model.bin could execute code: save the adapter again as safetensors)"
        raise InputError(f"{folder}: there is no {WEIGHTS}{why if pickled else ''}")
    weights = _OneFile(folder / WEIGHTS)
    misfits = _Misfits()
    modules, replaced = _sort(weights, config, misfits)
    stacks = stack_names(folder, config, modules)
    single = {module: parts for module, parts in modules.items() if module not in stacks}
    targets = {
        f"{module}.weight": target
        for module, parts in single.items()
        if (target := _target(module, parts, config, weights, base, misfits))
    }
    every = fused.stacks_of(name.removesuffix(".weight") for name in base.entries if name.endswith(".weight"))
    for module, stack in stacks.items():
        if stack in every:
            targets |= dict(_of_stack(every[stack], module, modules[module], config, weights, base, misfits))
        else:
            misfits.add(f"{stack} is not in the base.{nearest(stack, list(every))}")
    _check_replaced(replaced, weights, base, misfits, tied=tied)
    _check_target_modules(config, single, base, misfits)
    _check_target_parameters(
        config, {*stacks.values(), *(f"{module}.weight" for module in single)}, every, base, misfits
    )
    misfits.raise_if_any(folder, base.folder)
    if not targets and not replaced:
        raise InputError(f"{weights.path}: it holds no tensors; there is nothing to merge")
    return Adapter(weights, targets, replaced)


def _sort(
    weights: _OneFile, config: Mapping[str, Any], misfits: _Misfits
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """The adapter's tensors by module and part, and those that replace a whole tensor of the base."""
    modules: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    saved = listed(config.get("modules_to_save"))
    for name, entry in weights.entries.items():
        plain = name.removeprefix(PREFIX)
        found = _PART.fullmatch(plain)
        if entry.dtype not in FLOATS:
            misfits.add(f"{name} is {entry.dtype}, allowed: {', '.join(FLOATS)}")
        elif found:
            part = found["part"].removeprefix("lora_").removesuffix(".weight")
            modules.setdefault(found["module"], {})[part] = name
        elif any(re.search(rf"{re.escape(module)}(\.|$)", plain) for module in saved):  # PEFT: the end of a name
            replaced[plain] = name
        else:
            misfits.add(f"{name} is no LoRA A or B of a linear layer, and modules_to_save does not name it")
    return modules, replaced


def _target(
    module: str,
    parts: Mapping[str, str],
    config: Mapping[str, Any],
    weights: _OneFile,
    base: io.SafetensorsFolder,
    misfits: _Misfits,
) -> Target | None:
    """One module's LoRA, or None when it doesn't fit."""
    needed = {"A", "B"} | ({"magnitude_vector"} if config.get("use_dora") else set())
    if set(parts) - {"base_layer"} != needed:
        misfits.add(f"{module} has {', '.join(sorted(parts))} where {', '.join(sorted(needed))} are needed")
        return None
    name, (rank, scaling) = f"{module}.weight", scaling_of(config, module)
    entry = base.entries.get(name)
    if entry is None:
        misfits.add(f"{module} is not in the base.{nearest(name, list(base.entries))}")
        return None
    if len(entry.shape) != 2 or entry.dtype not in FLOATS:
        misfits.add(f"{name} is {entry.dtype} {list(entry.shape)}; LoRA merges into F32, BF16 or F16 matrices")
        return None
    rows, columns = entry.shape
    expected = {"A": (rank, columns), "B": (rows, rank), "magnitude_vector": (rows,), "base_layer": entry.shape}
    wrong = [
        f"{parts[part]} has shape {list(weights.entries[parts[part]].shape)}, {list(expected[part])} is needed"
        for part in sorted(parts)
        if weights.entries[parts[part]].shape != expected[part]
    ]
    for problem in wrong:
        misfits.add(problem)
    if wrong:
        return None
    return Target(parts["A"], parts["B"], parts.get("magnitude_vector"), parts.get("base_layer"), scaling)


def _of_stack(
    stack: fused.Stack,
    module: str,
    parts: Mapping[str, str],
    config: Mapping[str, Any],
    weights: _OneFile,
    base: io.SafetensorsFolder,
    misfits: _Misfits,
) -> Iterator[tuple[str, Target]]:
    """The base tensors of a layer's experts that one pair of A and B changes, and how; none when it doesn't fit."""
    if set(parts) != {"A", "B"}:
        misfits.add(f"{module} has {', '.join(sorted(parts))} where A, B are needed; experts have no more")
        return
    rank, scaling = scaling_of(config, stack.name)
    entries = {f"{module}.lora_{which}.weight": weights.entries[parts[which]] for which in "AB"}
    try:
        found = fused.adapter_in_file(stack, module, rank, apart=False, entries=entries)
    except InputError as problem:
        misfits.add(str(problem))
        return
    names = {f"{module}.lora_{which}.weight": parts[which] for which in "AB"}
    pieces = {name: replace(piece, source=names[piece.source]) for name, piece in found.pieces()}
    for own in (own for expert in stack.modules for own in expert):
        a, b, entry = pieces[f"{own}.lora_A.weight"], pieces[f"{own}.lora_B.weight"], base.entries[f"{own}.weight"]
        if entry.shape != (b.shape[0], a.shape[1]) or entry.dtype not in FLOATS:
            misfits.add(f"{own}.weight is {entry.dtype} {list(entry.shape)}, the adapter's {[b.shape[0], a.shape[1]]}")
            return
        yield f"{own}.weight", Target(a, b, None, None, scaling)


def _check_replaced(
    replaced: Mapping[str, str], weights: _OneFile, base: io.SafetensorsFolder, misfits: _Misfits, *, tied: bool
) -> None:
    for name, saved in replaced.items():
        entry = base.entries.get(name)
        if tied and name.endswith(("embed_tokens.weight", "lm_head.weight")):
            misfits.add(f"{saved} is half of an embedding that the base ties to its head: replacing one would untie it")
        elif entry is None:
            misfits.add(f"{saved} is not in the base.{nearest(name, list(base.entries))}")
        elif entry.shape != weights.entries[saved].shape:
            misfits.add(f"{saved} has shape {list(weights.entries[saved].shape)}, the base's has {list(entry.shape)}")


def _check_target_modules(
    config: Mapping[str, Any], modules: Mapping[str, object], base: io.SafetensorsFolder, misfits: _Misfits
) -> None:
    """What adapter_config.json targets is what the file holds: an adapter that lost tensors must not pass as whole."""
    is_target, parameters = _matcher(config), config.get("target_parameters") or []
    for module in modules:
        if not is_target(module) and not fused.is_named(f"{module}.weight", parameters):
            misfits.add(f"{module} is not among {CONFIG}'s target_modules")
    if config.get("layers_to_transform") is not None:
        return  # then target_modules say less than what is there
    for name, entry in base.entries.items():
        module = name.removesuffix(".weight")
        if module != name and len(entry.shape) == 2 and is_target(module) and module not in modules:
            misfits.add(f"{module} is among target_modules, but the adapter has nothing for it")


def _check_target_parameters(
    config: Mapping[str, Any],
    adapted: Collection[str],
    stacks: Mapping[str, fused.Stack],
    base: io.SafetensorsFolder,
    misfits: _Misfits,
) -> None:
    """The same of parameters: `adapted` of what the base has as stacks of experts, or as tensors of its own."""
    targets = config.get("target_parameters") or []
    named = [name for name in (*stacks, *base.entries) if fused.is_named(name, targets)]
    for target in targets:
        if not any(fused.is_named(name, [target]) for name in named):
            misfits.add(f"target_parameters: {target} is not in the base")
    for name in named:
        if name not in adapted:
            misfits.add(f"{name} is among target_parameters, but the adapter has nothing for it")


def _matcher(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """PEFT's rule: a text is a regular expression for the whole name, a list holds names or ends of names."""

    def matches(patterns: str | list[str], module: str) -> bool:
        if isinstance(patterns, str):
            return re.fullmatch(patterns, module) is not None
        return any(module == pattern or module.endswith(f".{pattern}") for pattern in patterns)

    targets, excluded = config.get("target_modules") or [], config.get("exclude_modules") or []
    saved = listed(config.get("modules_to_save"))
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = r"(?!(.*\.)?(lm_head|embed_tokens)$).*"

    def is_target(module: str) -> bool:
        kept = any(re.match(rf"(.*\.)?{name}($|\..*)", module) for name in saved)
        return matches(targets, module) and not matches(excluded, module) and not kept

    return is_target
