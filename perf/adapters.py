"""What a run of adapters holds on each pipeline stage's ranks: a frozen model, perhaps quantized, and few trained
parameters. By formula; the tests hold it against real modules.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import TYPE_CHECKING, Literal

from mcore_swift.models.build import ModelSource
from mcore_swift.models.keys import global_shapes, weight_rules
from mcore_swift.parallel import ParallelPlan
from mcore_swift.peft.quantized_rules import BLOCK
from mcore_swift.peft.targets import is_linear, select
from mcore_swift.recipe import Recipe
from mcore_swift.weights.rules import TensorRule
from perf.parameters import EXPERTS, LATENT, Parameters, RankBytes, layer_stages, rank_bytes, rank_share, uses_bf16

if TYPE_CHECKING:
    from mcore_swift.peft.lora import LoraSettings

# Bytes a number beside its four bits: a float32 scale a block, or an 8-bit one with a float32 scale for 256 of them.
SCALE_BYTES = {False: 4 / BLOCK, True: (1 + 4 / 256) / BLOCK}


@dataclass(frozen=True)
class Adapted:
    """Of one rank. `linear`: numbers of its decoder layers' linear weights; `trained`: parameters of its adapters."""

    linear: int
    trained: Parameters

    def __add__(self, other: Adapted) -> Adapted:
        return Adapted(self.linear + other.linear, self.trained + other.trained)


def adapted_stages(
    source: ModelSource,
    plan: ParallelPlan,
    chunks: Sequence[str],
    settings: LoraSettings,
    targets: Sequence[str],
    *,
    layers: str = "transformer_engine",
) -> list[Adapted]:
    """For a rank of each pipeline stage. Experts are taken to be adapted alike on all ranks."""
    from mcore_swift.peft.saved import select_saved

    rules, shapes = weight_rules(source), global_shapes(source)
    chosen = set(select(targets, rules))
    saved = select_saved(settings.modules_to_save, rules, adapted=chosen)
    stages = [Adapted(0, Parameters(0))] * plan.pp
    for key, rule in rules.items():
        place = _stage_of(key, plan, chunks)
        if key in saved:
            stages[place] += Adapted(0, rank_share(key, shapes[key], plan, layers))
        if is_linear(rule):
            stages[place] += _of_layer(rule, shapes[key], plan, settings, chosen, layers)
    return stages


def _stage_of(key: str, plan: ParallelPlan, chunks: Sequence[str]) -> int:
    layer = re.match(r"decoder\.layers\.(\d+)\.", key)
    if layer is not None:
        return layer_stages(plan, chunks)[int(layer[1])]
    return 0 if key.startswith("embedding.") else plan.pp - 1


def _of_layer(
    rule: TensorRule,
    shape: tuple[int, ...],
    plan: ParallelPlan,
    settings: LoraSettings,
    chosen: Collection[str],
    layers: str,
) -> Adapted:
    expert, split = EXPERTS in rule.key, split_of(rule.key, layers)
    size, copies = (plan.etp, plan.ep) if expert else (plan.tp, 1)
    trained, with_a = 0, set()
    for name, (rows, columns) in zip(rule.hf, rule.hf_shapes(shape), strict=True):
        module = name.removesuffix(".weight")
        if module in chosen:
            own_rows = rows // size if split == "rows" else rows
            trained += own_rows * (settings.rank + settings.dora)
            place = module.rsplit(".", 1)[0] if settings.share_a or (expert and settings.share_experts_a) else module
            if place not in with_a:
                trained += settings.rank * (columns // size if split == "columns" else columns)
            with_a.add(place)
    held = prod(shape) // (copies * (1 if split == "none" else size))
    own_groups = expert and (plan.ep > 1 or plan.etp != plan.tp)
    return Adapted(held, Parameters(0, trained // copies) if own_groups else Parameters(trained // copies))


def split_of(key: str, layers: str) -> Literal["rows", "columns", "none"]:
    """The axis of a linear weight that tensor parallel ranks share out, for Platform.layers `layers`."""
    if key.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return "columns"
    return "none" if layers == "transformer_engine" and LATENT.search(key) else "rows"


def adapted_bytes(
    model: Sequence[Parameters], recipe: Recipe, source: ModelSource, plan: ParallelPlan, chunks: Sequence[str]
) -> list[RankBytes]:
    """What the ranks of each stage hold of LoRA's adapters and of the frozen model, whose parameters are `model`.

    A frozen weight takes 2 bytes (4 in fp32; in FP8 1, and 1 transposed), in four bits 0.5 and its share of a scale; no
    gradient, no state. Modules
    that are saved whole are counted as trained beside the frozen ones: their first values are kept.
    """
    from mcore_swift.training.adapters import adapters_of, settings_of

    stages = [Adapted(0, Parameters(0))] * plan.pp
    for section in adapters_of(recipe.adapter).values():
        found = adapted_stages(source, plan, chunks, *settings_of(section, seed=0, scored=source.scored))
        stages = [Adapted(new.linear, old.trained + new.trained) for old, new in zip(stages, found, strict=True)]
    whole = 2 if uses_bf16(recipe) else 4
    four_bits = 0.5 + SCALE_BYTES[recipe.adapter.double_quantization]
    each = {"none": whole, "fp8": 2}.get(recipe.adapter.quantization, four_bits)
    sizes = []
    for parameters, adapted in zip(model, stages, strict=True):
        frozen = ceil((parameters.total - adapted.linear) * whole + adapted.linear * each)
        trained = rank_bytes(adapted.trained, plan, recipe)
        sizes.append(replace(trained, weights=trained.weights + frozen))
    return sizes
