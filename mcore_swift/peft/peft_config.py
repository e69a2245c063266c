"""PEFT's adapter_config.json. What an adapter may ask for beyond what is honoured is refused by name: a feature that is
overlooked gives a model that is wrong and looks right.

Imports neither torch nor Megatron: merging works on files alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mcore_swift.errors import InputError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
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


def read_config(folder: Path, *, honoured: Sequence[str] = ()) -> dict[str, Any]:
    """adapter_config.json. `honoured`: further keys that the caller reads.

    Raises InputError naming the first key whose value can't be honoured.
    """
    path = folder / CONFIG
    config = read_json(path, "a PEFT adapter folder is needed")
    for key, value in config.items():
        if key in _ALLOWED and value not in _ALLOWED[key]:
            raise InputError(f"{path}: {key}: {value!r} is not supported; allowed: {list(_ALLOWED[key])}")
        if value and key not in {*_ALLOWED, *_READ, *_ANY, *honoured}:
            raise InputError(f"{path}: {key}: {value!r} is not supported; allowed: it is left out or off")
    for key, kind, what in (
        ("peft_type", str, "a text"),
        ("r", int, "a whole number, at least 1"),
        ("lora_alpha", int | float, "a number"),
        ("target_modules", str | list, "a regular expression or a list of module names"),
    ):
        value = config.get(key)
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
        *listed(config["target_modules"]),
        *listed(config.get("exclude_modules")),
        *listed(config.get("modules_to_save")),
    ]


def listed(value: Any) -> list[Any]:
    return list(value or []) if not isinstance(value, str) else [value]
