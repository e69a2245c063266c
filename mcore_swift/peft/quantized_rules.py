"""Rules about a quantized base model, for this model on this platform: checked before a rank is started."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mcore_swift.models.keys import global_shapes, weight_rules
from mcore_swift.peft.targets import is_linear
from mcore_swift.recipe import Recipe
from mcore_swift.recipe_checks.table import Row, refuse

if TYPE_CHECKING:
    from mcore_swift.models.build import ModelSource

BLOCK = 64  # weights that share a scale


@dataclass(frozen=True)
class QuantizedFit:
    """A recipe with adapter.quantization for a model.

    `packed`: the first tensor that holds all experts, `narrow`: the first layer whose rows can't be cut into blocks; ""
    where there is none.
    """

    recipe: Recipe
    on_cpu: bool
    family: str
    installed: bool
    packed: str
    narrow: str
    has_experts: bool


QUANTIZED_RULES: list[Row[QuantizedFit]] = [
    Row(
        "adapter.quantization",
        "nf4 or fp4, without the package bitsandbytes",
        lambda r: r.recipe.adapter.quantization != "fp8" and not r.installed,
        "{r.recipe.adapter.quantization} needs the package bitsandbytes, which is not installed here",
        "install mcore-swift[qlora]",
    ),
    Row(
        "adapter.quantization",
        "nf4, fp4 or fp8, for a model whose experts are packed in one tensor",
        lambda r: r.packed,
        "{r.packed} holds all experts, and such experts are not quantized here yet",
        "leave it out for {r.family}",
    ),
    Row(
        "adapter.quantization",
        f"nf4, fp4 or fp8, for a linear layer whose number of columns is no multiple of {BLOCK}",
        lambda r: r.narrow,
        f"{{r.narrow}}, which can't be cut into blocks of {BLOCK}",
        "leave it out for this model",
    ),
    Row(
        "moe.grouped adapter.quantization",
        "true, its default on GPUs, with adapter.quantization: nf4, fp4 or fp8",
        lambda r: r.has_experts and (not r.on_cpu if r.recipe.moe.grouped is None else r.recipe.moe.grouped),
        "grouped experts are not quantized here yet",
        "set moe.grouped: false",
    ),
]


def check_quantization(recipe: Recipe, source: ModelSource, *, on_cpu: bool) -> None:
    """Raises InputError when the recipe wants the frozen model quantized and this model can't be held so."""
    if recipe.adapter.quantization == "none":
        return
    rules, shapes = weight_rules(source), global_shapes(source)
    packed = [rule.hf[0] for rule in rules.values() if rule.packed]
    widths = {rule.hf[0]: shapes[key][-1] for key, rule in rules.items() if is_linear(rule)}
    narrow = [f"{name} has {columns} columns" for name, columns in widths.items() if columns % BLOCK]
    fit = QuantizedFit(
        recipe=recipe,
        on_cpu=on_cpu,
        family=source.family.name,
        installed=importlib.util.find_spec("bitsandbytes") is not None,
        packed=packed[0] if packed else "",
        narrow=narrow[0] if narrow else "",
        has_experts=bool(source.family.read_config(source.config).get("num_moe_experts")),
    )
    refuse(QUANTIZED_RULES, fit)
