"""Modules that are trained in full beside the adapters: PEFT's modules_to_save.

They are trained where they are, in the model; what they were before is kept beside them, for passes without adapters.
Which ones is decided from the weight rules of the whole model, so all ranks agree.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mcore_swift.errors import InputError, nearest
from mcore_swift.peft.peft_config import is_scored
from mcore_swift.weights.live import sharded_state
from mcore_swift.weights.rules import TensorRule

FIELD = "adapter.modules_to_save"
_EMBEDDINGS = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class SavedTensor:
    """This rank's shard of a tensor that is trained in full. `base`: its values before."""

    parameter: Tensor
    base: Tensor


def select_saved(
    wanted: Sequence[str], rules: Mapping[str, TensorRule], *, adapted: Collection[str]
) -> dict[str, TensorRule]:
    """The rules, by global key, of the modules that `wanted` names: by their last names, or by globs on the whole name.

    `adapted`: modules that have adapters. Raises InputError for a name that matches nothing, and for a module that
    can't be trained by itself.
    """
    modules: dict[str, list[str]] = {}
    for key, rule in rules.items():
        for name in rule.hf:
            modules.setdefault(name.rsplit(".", 1)[0], []).append(key)
    if "output_layer.weight" not in rules and not is_scored(rules):  # the embedding is the output layer, too
        for name in wanted:
            if name.rsplit(".", 1)[-1] in _EMBEDDINGS:
                raise InputError(
                    f"{FIELD}: {name}: this model's output layer is its embedding, and a PEFT folder can't say that"
                    " both are trained as one; leave it out, or train the whole model (adapter.name: none)"
                )
    chosen: dict[str, TensorRule] = {}
    for name in wanted:
        matches = [
            module for module in modules if module.rsplit(".", 1)[-1] == name or fnmatch.fnmatchcase(module, name)
        ]
        if not matches:
            leaves = list(dict.fromkeys(module.rsplit(".", 1)[-1] for module in modules))
            raise InputError(
                f"{FIELD}: {name!r} matches no module of this model;{nearest(name, leaves)}"
                f" allowed: {', '.join(leaves)}, or a glob such as model.layers.0.*norm"
            )
        for module in matches:
            _check_alone(module, [rules[key] for key in modules[module]], adapted)
            chosen |= {key: rules[key] for key in modules[module]}
    return chosen


def _check_alone(module: str, rules: Sequence[TensorRule], adapted: Collection[str]) -> None:
    if module in adapted:
        raise InputError(f"{FIELD}: {module} has an adapter already (adapter.targets); name it in one of the two")
    for rule in rules:
        if len(rule.hf) > 1 or rule.packed:
            raise InputError(
                f"{FIELD}: {module} is a part of one tensor in Megatron-Core ({rule.key}), which can't be trained by"
                " itself; give it an adapter instead (adapter.targets)"
            )
        if rule.copies:
            raise InputError(
                f"{FIELD}: {module} is shared with the layers of multi-token prediction ({rule.copies[0]}), which a"
                " PEFT folder has no place for; leave it out"
            )


def modules_of(rules: Mapping[str, TensorRule]) -> list[str]:
    """Hugging Face names of the modules that the rules' tensors are in."""
    return list(dict.fromkeys(rule.hf[0].rsplit(".", 1)[0] for rule in rules.values()))


def train(chunk: Any, rules: Mapping[str, TensorRule]) -> list[SavedTensor]:
    """Has these tensors of a frozen model chunk trained, as far as they are on this rank."""
    found = []
    for item in sharded_state(chunk).values():
        if item.key in rules:
            data: Any = item.data
            if isinstance(data, nn.Parameter):
                data.requires_grad_(True)
            found.append(SavedTensor(data, data.detach().clone()))
    return found
