"""Whether a set of tensors is what the rules ask for, seen from headers alone, before anything large is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from mcore_swift.errors import nearest
from mcore_swift.weights.rules import TensorRule


class Spec(Protocol):
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass
class Misfits:
    """What does not fit: names that are missing, names nobody asked for, and descriptions of wrong ones."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.wrong)

    def text(self, *, limit: int | None = None) -> str:
        """One line; at most `limit` of each kind, all of them without it."""
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("wrong", self.wrong))
        found = [
            f"{len(names)} {word}: {'; '.join(names[:limit])}{' …' if limit and len(names) > limit else ''}"
            for word, names in kinds
            if names
        ]
        hint = nearest(self.missing[0], self.unexpected) if self.missing and self.unexpected else ""
        return " | ".join(found) + hint


def hf_misfits(
    rules: Mapping[str, TensorRule],
    found: Mapping[str, Spec],
    *,
    dtypes: Collection[str],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    ignored: Collection[str] = (),
) -> Misfits:
    """Compares tensors under Hugging Face names with what the rules consume.

    `shapes`: global key → unpadded shape that the config asks for; without it only the rows of fused tensors are
    checked. `dtypes`: those that can be read. `ignored`: names that may be there for nothing.
    """
    wanted = {name: (rule, part) for rule in rules.values() for part, name in rule.parts()}
    misfits = Misfits(
        missing=[name for name in wanted if name not in found],
        unexpected=[name for name in found if name not in wanted and name not in ignored],
    )
    for name, (rule, part) in wanted.items():
        if name in found:
            whole = (shapes or {}).get(rule.key)
            misfits.wrong += _wrong(name, found[name], rule, part, whole, dtypes)
    return misfits


def _wrong(
    name: str, spec: Spec, rule: TensorRule, part: int, whole: tuple[int, ...] | None, dtypes: Collection[str]
) -> list[str]:
    wrong = []
    if rule.rows and not rule.packed and spec.shape[:1] != (rule.rows[part],):
        rows = spec.shape[0] if spec.shape else 0
        wrong.append(f"{name} has {rows} rows, the config says {rule.rows[part]}")
    elif whole is not None:
        shape = rule.hf_shapes(whole)[part]
        if tuple(spec.shape) != shape:
            wrong.append(f"{name} has shape {list(spec.shape)}, the config says {list(shape)}")
    if spec.dtype not in dtypes:
        wrong.append(f"{name} is {spec.dtype}; allowed: {', '.join(dtypes)}")
    return wrong


def megatron_misfits(
    rules: Mapping[str, TensorRule],
    found: Mapping[str, Spec],
    *,
    dtypes: Collection[str],
    shapes: Mapping[str, tuple[int, ...]],
    ignored: Collection[str] = (),
) -> Misfits:
    """The same for global tensors under Megatron's keys, whose vocabulary may be padded."""
    misfits = Misfits(
        missing=[key for key in rules if key not in found],
        unexpected=[key for key in found if key not in rules and key not in ignored],
    )
    for key, rule in rules.items():
        if key not in found:
            continue
        spec, shape = found[key], shapes.get(key, found[key].shape)
        padded = rule.vocabulary and spec.shape[:1] >= shape[:1]
        if tuple(spec.shape[padded:]) != tuple(shape[padded:]):
            misfits.wrong.append(f"{key} has shape {list(spec.shape)}, the config says {list(shape)}")
        if spec.dtype not in dtypes:
            misfits.wrong.append(f"{key} is {spec.dtype}; allowed: {', '.join(dtypes)}")
    return misfits
