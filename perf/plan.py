"""`mcore-swift plan`: what a recipe means on a number of GPUs, before any of them is booked.

By formula: ranks, batch arithmetic, pipeline stages with the time they stand idle, parameters and bytes of each stage's
ranks. With `build`, the real modules of a rank of each kind are built and held against the formula and the model.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mcore_swift import recipe_io
from mcore_swift.errors import EXIT_FAILED, InputError
from mcore_swift.models.build import ModelSource, check_layout
from mcore_swift.models.experts import EXPERT_RULES, check_experts
from mcore_swift.models.layout_rules import MODEL_RULES
from mcore_swift.models.lever_rules import LEVER_RULES, check_levers
from mcore_swift.models.stages import describe, loss_cost, pipeline_layout
from mcore_swift.parallel import ParallelPlan, resolve
from mcore_swift.peft.quantized_rules import QUANTIZED_RULES, check_quantization
from mcore_swift.pipeline import bubble_fraction, imbalance, written
from mcore_swift.recipe import Recipe
from mcore_swift.recipe_checks import RECIPE_RULES, check_recipe
from mcore_swift.recipe_checks.distill import LESSON
from mcore_swift.recipe_checks.job import BATCHES, JOB, Batches
from mcore_swift.recipe_checks.lisa import LISA_LAYERS
from mcore_swift.recipe_checks.nodes import NODES
from mcore_swift.recipe_checks.table import explained, refuse
from perf.adapters import adapted_bytes
from perf.parameters import Parameters, RankBytes, frozen_bytes, model_parameters, rank_bytes, stage_parameters

GIB = 2**30


@dataclass(frozen=True)
class Stage:
    """A pipeline stage, and what each of its ranks holds."""

    chunks: tuple[str, ...]
    parameters: Parameters
    bytes: RankBytes


@dataclass(frozen=True)
class Outline:
    """A recipe on `plan.world_size` ranks."""

    source: ModelSource
    recipe: Recipe
    plan: ParallelPlan
    chunks: tuple[str, ...]
    stages: tuple[Stage, ...]
    parameters: int  # of the whole model
    active_parameters: int  # that meet one token
    micro_batches: int  # of a rank in a step
    bubble: float
    imbalance: float

    @property
    def tokens(self) -> int:
        """Positions in a step."""
        return self.recipe.schedule.global_batch_size * self.recipe.data.sequence_length


def plan(
    recipe: Path | None, *, overrides: Sequence[str], gpus: int | None, build: bool, explain: bool, as_json: bool
) -> int:
    """Prints the plan of a recipe, or the rules that recipes are held to; returns the exit code.

    1: a built rank is not what it should be. Raises InputError for a recipe that can't be run.
    """
    if explain:
        _print_rules(as_json)
        return 0
    if recipe is None:
        raise InputError("plan needs a RECIPE, a YAML file, or --explain")
    outline = outlined(recipe_io.load_recipe(recipe, overrides), gpus=gpus)
    built = _built(outline) if build else None
    if as_json:
        print(json.dumps(as_dict(outline) | ({"built": built} if built else {}), indent=2))
    else:
        _print(outline, built)
    return 0 if built is None or built["good"] else EXIT_FAILED


def outlined(recipe: Recipe, *, gpus: int | None) -> Outline:
    """Computes the plan. `gpus` None: the recipe's runtime.ranks, or as many as the layout needs.

    Raises InputError for what a run of this recipe would refuse, too, as far as it needs neither data nor hardware.
    """
    from mcore_swift.training.run import model_source

    check_recipe(recipe)
    plan = resolve(recipe.parallel, world_size=gpus or recipe.runtime.ranks)
    source = model_source(recipe)
    on_cpu = recipe.runtime.device == "cpu"
    check_layout(source, plan)
    check_experts(source, plan, recipe.moe, device="cpu" if on_cpu else "cuda")
    check_levers(recipe, plan, source, on_cpu=on_cpu)
    check_quantization(recipe, source, on_cpu=on_cpu)
    batches = Batches(recipe, plan)
    refuse(BATCHES, batches)
    chunks = pipeline_layout(source, plan)
    held = stage_parameters(source, plan, chunks)
    if recipe.adapter.name == "lora":
        sizes = adapted_bytes(held, recipe, source, plan, chunks)
    else:
        sizes = [rank_bytes(each, plan, recipe) for each in held]
    others = frozen_bytes(recipe, source, plan)
    sizes = [replace(size, frozen=other) for size, other in zip(sizes, others, strict=True)]
    parameters, active = model_parameters(source)
    return Outline(
        source=source,
        recipe=recipe,
        plan=plan,
        chunks=chunks,
        stages=tuple(
            Stage(chunks[number :: plan.pp], each, size)
            for number, (each, size) in enumerate(zip(held, sizes, strict=True))
        ),
        parameters=parameters,
        active_parameters=active,
        micro_batches=batches.micro_batches,
        bubble=bubble_fraction(pp=plan.pp, vpp=plan.vpp, micro_batches=batches.micro_batches),
        imbalance=imbalance(chunks, pp=plan.pp, loss_cost=loss_cost(source)),
    )


def _built(outline: Outline) -> dict[str, Any]:
    """Builds a rank of each kind: which ranks, how long it took, and what was checked of them."""
    from mcore_swift.platform import select
    from mcore_swift.training.run import preload
    from perf import fake_world

    platform = select()
    preload(platform)
    start = time.monotonic()
    ranks = fake_world.kinds(outline.plan, outline.chunks)
    built = fake_world.build(outline.source, outline.plan, platform, ranks)
    checks = fake_world.checks(outline.source, outline.plan, outline.chunks, built, layers=platform.layers)
    return {
        "good": all(check.holds for check in checks),
        "layers": platform.layers,
        "seconds": round(time.monotonic() - start, 1),
        "ranks": [{"rank": each.rank, "stage": each.stage, **asdict(each.parameters)} for each in built],
        "checks": [{"what": check.what, "holds": check.holds, "wrong": list(check.wrong)} for check in checks],
    }


def as_dict(outline: Outline) -> dict[str, Any]:
    """The plan for a program: numbers in parameters, bytes and shares of 1."""
    plan, schedule = outline.plan, outline.recipe.schedule
    sizes = ("tp", "pp", "vpp", "cp", "ep", "etp", "dp", "sequence_parallel", "world_size")
    return {
        "model": outline.source.folder.resolve().name,
        "family": outline.source.family.name,
        "parameters": outline.parameters,
        "active_parameters": outline.active_parameters,
        "layout": {name: getattr(plan, name) for name in sizes},
        "batch": {
            "global_batch_size": schedule.global_batch_size,
            "micro_batch_size": schedule.micro_batch_size,
            "micro_batches": outline.micro_batches,
            "tokens": outline.tokens,
        },
        "pipeline": {"layout": written(outline.chunks), "bubble": outline.bubble, "imbalance": outline.imbalance},
        "stages": [
            {
                "chunks": list(stage.chunks),
                "parameters": asdict(stage.parameters),
                "bytes": asdict(stage.bytes) | {"total": stage.bytes.total},
            }
            for stage in outline.stages
        ],
    }


# --- for a reader -----------------------------------------------------------------------------------------------------


def _print(outline: Outline, built: dict[str, Any] | None) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for name, text in _facts(outline).items():
        console.print(f"{name:9} {text}", markup=False, soft_wrap=True)
    frozen = ["frozen"] if any(stage.bytes.frozen for stage in outline.stages) else []  # a teacher or a reference
    table = Table("stage", "layers", "M params", "of experts", "weights", "grads", "optimizer", *frozen, "GiB")
    for column in table.columns[2:]:
        column.justify = "right"
    for number, stage in _alike(outline.stages):
        sizes = [getattr(stage.bytes, name) for name in ("weights", "gradients", "optimizer", *frozen, "total")]
        counts = (stage.parameters.total, stage.parameters.experts)
        layers = written(stage.chunks).replace("|", " ")
        table.add_row(
            number, layers, *(f"{count / 1e6:,.1f}" for count in counts), *(f"{size / GIB:,.1f}" for size in sizes)
        )
    console.print(table)
    console.print("One rank's each; bytes in GiB, activations and workspaces come on top.", markup=False)
    for line in _built_lines(outline, built):
        console.print(line, markup=False, soft_wrap=True)


def _facts(outline: Outline) -> dict[str, str]:
    plan, schedule = outline.plan, outline.recipe.schedule
    experts = outline.source.fields().get("num_moe_experts")
    active = f", {outline.active_parameters / 1e9:,.1f} B of them active" if experts else ""
    return {
        "model": f"{outline.source.folder.resolve().name}: {outline.parameters / 1e9:,.2f} B parameters{active}",
        "layout": f"{plan} = {plan.world_size:,} ranks",
        "batch": f"{schedule.global_batch_size:,} samples a step: {outline.micro_batches} micro-batches of"
        f" {schedule.micro_batch_size} on each of {plan.dp} data parallel ranks; {outline.tokens:,} tokens",
        "pipeline": describe(outline.source, plan, micro_batches=outline.micro_batches) or "one stage",
    }


def _alike(stages: Sequence[Stage]) -> list[tuple[str, Stage]]:
    """Stages that follow one another and are the same in one row."""
    rows: list[tuple[int, int, Stage]] = []
    for number, stage in enumerate(stages):
        if rows and rows[-1][2] == stage:
            rows[-1] = (rows[-1][0], number, stage)
        else:
            rows.append((number, number, stage))
    return [(f"{first}" if first == last else f"{first}-{last}", stage) for first, last, stage in rows]


def _built_lines(outline: Outline, built: dict[str, Any] | None) -> list[str]:
    if built is None:
        return []
    ranks, layers = built["ranks"], built["layers"].replace("_", " ")
    lines = [f"built {len(ranks)} of {outline.plan.world_size:,} ranks ({layers} layers) in {built['seconds']} s"]
    for check in built["checks"]:
        lines.append(f"  {'✓' if check['holds'] else '✗'} {check['what']}")
        lines += [f"      {wrong}" for wrong in check["wrong"][:10]]
    return lines


def _print_rules(as_json: bool) -> None:
    of_recipe = [*RECIPE_RULES, *JOB, *BATCHES, *LISA_LAYERS, *LESSON]
    rules = explained([*of_recipe, *MODEL_RULES, *EXPERT_RULES, *LEVER_RULES, *QUANTIZED_RULES])
    rules += explained(NODES)
    if as_json:
        print(json.dumps(rules, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("key", "value", "why it is refused", "what to do", show_lines=True)
    for column in table.columns:
        column.overflow = "fold"
    table.columns[0].no_wrap = True
    for rule in rules:
        rule["keys"] = rule["keys"].replace(", ", "\n")
        table.add_row(*(Text(text) for text in rule.values()))
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)
