"""PEFT's adapter_config.json. What an adapter may ask for beyond what is honoured is refused by name: a feature that is
overlooked gives a model that is wrong and looks right.

Imports neither torch nor Megatron: merging works on files alone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mcore_swift.errors import InputError
from mcore_swift.peft import fused

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OWN_CONFIG, OWN_WEIGHTS = "adapter.json", "adapter.safetensors"  # of methods that PEFT has no format for
PREFIX = "base_model.model."
DEFAULT = "default"  # the name of an adapter that is given none
SCORE = "score"  # the module of a reward model that is always trained in full

# adapter_config.json of peft 0.21. Keys that don't change what the merged weights are …
_ANY = {
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
    "task_type",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "runtime_config",
    "qalora_group_size",
    "layers_pattern",
    "ensure_weight_tying",
    "velora_config",
}
# … those that every reader honours, or that only say which modules the file has tensors of …
_READ = {
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "target_parameters",
}
# … and those of which only these values can be honoured. Any other key must be off (null, false, empty).
_ALLOWED: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # PiSSA & co. change the base as well
}


def is_scored(tensors: Collection[str]) -> bool:
    """Whether a model with these tensors has a score in place of its output layer."""
    return f"{SCORE}.weight" in tensors


def read_json(path: Path, needed: str) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError; `needed` says what its folder should have been."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path.parent}: there is no {path.name}; {needed}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: found a {type(found).__name__}, needed is a JSON object")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json.

    Raises InputError naming the first key whose value can't be honoured.
    """
    path = folder / CONFIG
    config = read_json(path, "a PEFT adapter folder is needed")
    for key, value in config.items():
        if key in _ALLOWED and value not in _ALLOWED[key]:
            raise InputError(f"{path}: {key}: {value!r} is not supported; allowed: {list(_ALLOWED[key])}")
        if value and key not in {*_ALLOWED, *_READ, *_ANY}:
            raise InputError(f"{path}: {key}: {value!r} is not supported; allowed: it is left out or off")
    for key, kind, what in (
        ("peft_type", str, "a text"),
        ("r", int, "a whole number, at least 1"),
        ("lora_alpha", int | float, "a number"),
        ("target_modules", str | list, "a regular expression or a list of module names"),
        ("target_parameters", list, "a list of parameter names"),
    ):
        value = config.get(key)
        if value is None and (
            key == "target_parameters" or (config.get("target_parameters") and key == "target_modules")
        ):
            continue
        if not isinstance(value, kind) or isinstance(value, bool) or (key == "r" and value < 1):  # type: ignore[operator]
            raise InputError(f"{path}: {key}: found {value!r}; it must be {what}")
    for key in ("rank_pattern", "alpha_pattern"):
        table = config.get(key) or {}
        if not isinstance(table, dict) or not all(isinstance(value, int | float) for value in table.values()):
            raise InputError(f"{path}: {key}: found {table!r}; it must be a table of patterns and numbers")
    for pattern in _patterns(config):
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise InputError(f"{path}: {pattern!r} is not a pattern of module names: {error}") from None
    return config


def _patterns(config: Mapping[str, Any]) -> list[Any]:
    return [
        *(config.get("rank_pattern") or {}),
        *(config.get("alpha_pattern") or {}),
        *listed(config.get("target_modules")),
        *listed(config.get("target_parameters")),
        *listed(config.get("exclude_modules")),
        *listed(config.get("modules_to_save")),
    ]


def stack_names(folder: Path, config: Mapping[str, Any], modules: Collection[str]) -> dict[str, str]:
    """`fused.stack_names` of a folder's modules. Raises InputError that names its config."""
    try:
        return fused.stack_names(modules, config.get("target_parameters") or [])
    except InputError as problem:
        raise InputError(f"{folder / CONFIG}: {problem}") from None


def by_pattern(config: Mapping[str, Any], key: str, name: str, default: Any) -> Any:
    """The value of the first pattern of config[key] that matches a module's or parameter's name, or the end of it."""
    for pattern, value in (config.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def scaling_of(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    """The rank and the scaling that a module's or parameter's adapter has."""
    rank = by_pattern(config, "rank_pattern", name, config["r"])
    alpha = by_pattern(config, "alpha_pattern", name, config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def listed(value: Any) -> list[Any]:
    return list(value or []) if not isinstance(value, str) else [value]
