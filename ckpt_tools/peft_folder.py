"""A PEFT LoRA folder, checked against its base's headers: which tensors it changes, and how.

What an adapter may ask for beyond what is honoured is refused by name: a feature that is overlooked gives a model that
is wrong and looks right.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_swift.errors import InputError, nearest
from mcore_swift.peft.peft_config import CONFIG, PREFIX, WEIGHTS, listed, read_config
from mcore_swift.weights import safetensors_io as io

if TYPE_CHECKING:
    import torch

# Keys that may ask for something here, beside those that any reader honours.
HONOURED = ("rank_pattern", "alpha_pattern", "modules_to_save")
FLOATS = ("F32", "BF16", "F16")
# Tensor name → module and part. PEFT saves DoRA's magnitude with and without ".weight", by version.
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector|base_layer\.weight)(\.weight)?"
)


@dataclass(frozen=True)
class Target:
    """One LoRA'd module: names of its tensors in the adapter's file, and s."""

    a: str
    b: str
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

    def read(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

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
    config = read_config(folder, honoured=HONOURED)
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        why = " (a pickled adapter_model.bin could execute code: save the adapter again as safetensors)"
        raise InputError(f"{folder}: there is no {WEIGHTS}{why if pickled else ''}")
    weights = _OneFile(folder / WEIGHTS)
    misfits = _Misfits()
    modules, replaced = _sort(weights, config, misfits)
    targets = {
        f"{module}.weight": target
        for module, parts in modules.items()
        if (target := _target(module, parts, config, weights, base, misfits))
    }
    _check_replaced(replaced, weights, base, misfits, tied=tied)
    _check_target_modules(config, modules, base, misfits)
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
    name, rank = f"{module}.weight", _by_pattern(config, "rank_pattern", module, config["r"])
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
    alpha = _by_pattern(config, "alpha_pattern", module, config["lora_alpha"])
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if wrong:
        return None
    return Target(parts["A"], parts["B"], parts.get("magnitude_vector"), parts.get("base_layer"), scaling)


def _by_pattern(config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the module's name, or the end of it."""
    for pattern, value in (config.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


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
    is_target = _matcher(config)
    for module in modules:
        if not is_target(module):
            misfits.add(f"{module} is not among {CONFIG}'s target_modules")
    if config.get("layers_to_transform") is not None:
        return  # then target_modules say less than what is there
    for name, entry in base.entries.items():
        module = name.removesuffix(".weight")
        if module != name and len(entry.shape) == 2 and is_target(module) and module not in modules:
            misfits.add(f"{module} is among target_modules, but the adapter has nothing for it")


def _matcher(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """PEFT's rule: a text is a regular expression for the whole name, a list holds names or ends of names."""

    def matches(patterns: str | list[str], module: str) -> bool:
        if isinstance(patterns, str):
            return re.fullmatch(patterns, module) is not None
        return any(module == pattern or module.endswith(f".{pattern}") for pattern in patterns)

    targets, excluded = config["target_modules"], config.get("exclude_modules") or []
    saved = listed(config.get("modules_to_save"))
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = r"(?!(.*\.)?(lm_head|embed_tokens)$).*"

    def is_target(module: str) -> bool:
        kept = any(re.match(rf"(.*\.)?{name}($|\..*)", module) for name in saved)
        return matches(targets, module) and not matches(excluded, module) and not kept

    return is_target
