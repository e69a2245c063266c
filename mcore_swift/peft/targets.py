"""Which linear layers an adapter hangs on, told in Hugging Face names.

Everything is decided from the weight rules of the whole model, so all ranks agree, and a target that matches nothing is
an error, whichever pipeline stage a rank holds.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence

from mcore_swift.errors import InputError, nearest
from mcore_swift.peft.fused import stacks_of
from mcore_swift.weights.rules import TensorRule

# Words that stand for a part of every layer, by Megatron's global key.
GROUPS: dict[str, Callable[[str], bool]] = {
    "attention": lambda key: ".self_attention." in key,
    "mlp": lambda key: ".mlp." in key and ".mlp.experts." not in key,
    "experts": lambda key: ".mlp.experts." in key,
    "all-linear": lambda key: True,
}


def is_linear(rule: TensorRule) -> bool:
    """Whether the tensor is a decoder layer's linear weight that is made of Hugging Face modules.

    Layers of multi-token prediction are none: transformers hasn't got them. Nor are experts that Hugging Face packs in
    one tensor, which is no module's.
    """
    decoder = rule.key.startswith("decoder.layers.") and ".linear_" in rule.key
    return decoder and rule.key.endswith(".weight") and not rule.packed


def linear_modules(rules: Mapping[str, TensorRule]) -> dict[str, str]:
    """Hugging Face names of the decoder layers' linear modules → global key of the tensor that they are part of."""
    found = {}
    for key, rule in rules.items():
        if is_linear(rule):
            found |= {name.removesuffix(".weight"): key for name in rule.hf}
    return found


def select(targets: Sequence[str], rules: Mapping[str, TensorRule], *, key: str = "adapter.targets") -> list[str]:
    """The modules that `targets` name, in model order.

    A target is a word of GROUPS, a module's last name (q_proj), or a glob on its whole name (model.layers.[0-3].*).
    The tensors that transformers holds all experts in (model.layers.0.mlp.experts.gate_up_proj) stand for the experts'
    modules. Raises InputError for one that matches nothing. `key`: the recipe's, for the message.
    """
    modules = linear_modules(rules)
    if not targets:
        raise InputError(f"{key} is empty; allowed: {_allowed(modules)}")
    stacks = stacks_of(modules)
    chosen: set[str] = set()
    for target in targets:
        if target in modules:  # a folder may name thousands
            chosen.add(target)
            continue
        matches = {name for name, key in modules.items() if _matches(target, name, key)}
        for stack in stacks.values():
            if _matches(target, stack.name, ""):
                matches |= {module for own in stack.modules for module in own}
        if not matches:
            words = [*GROUPS, *dict.fromkeys(name.rsplit(".", 1)[-1] for name in modules)]
            raise InputError(
                f"{key}: {target!r} matches no linear layer of this model;{nearest(target, words)}"
                f" allowed: {_allowed(modules)}"
            )
        chosen |= matches
    return [name for name in modules if name in chosen]


def _matches(target: str, name: str, key: str) -> bool:
    if target in GROUPS:
        return bool(key) and GROUPS[target](key)
    return name.rsplit(".", 1)[-1] == target or fnmatch.fnmatchcase(name, target)


def _allowed(modules: Mapping[str, str]) -> str:
    leaves = dict.fromkeys(name.rsplit(".", 1)[-1] for name in modules)
    return f"{', '.join(GROUPS)}, {', '.join(leaves)}, or a glob such as model.layers.0.*"
