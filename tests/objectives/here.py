"""What the ranks of a test compute of the same rows: loss, metrics and gradients of each case, without a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from mcore_swift import parallel
from mcore_swift.data.batch import MicroBatch
from mcore_swift.recipe import AdapterSection, MoeSection, ObjectiveSection, ParallelSection, Recipe
from tests.distributed import rank_model
from tests.distributed.harness import prepared, run_ranks
from tests.distributed.rank_model import (
    CPU,
    SEQUENCE_LENGTH,
    gather_gradient_shards,
    hf_copies,
    merge,
    open_model,
    recipe_for,
)
from tests.objectives import rows

SFT_WEIGHTS = (1.0, 2.5, 0.3, 0.0, 1.0)  # of documents in turn
Copies = Callable[[Any], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Found:
    """The same on every rank, but for the gradients: each tensor comes from one."""

    loss: float
    metrics: dict[str, float]
    evaluated: dict[str, float]
    gradients: dict[str, torch.Tensor]


def compute(
    folder: Path,
    layout: ParallelSection,
    cases: Mapping[str, ObjectiveSection],
    *,
    packing: bool = True,
    adapter: AdapterSection | None = None,
    moe: MoeSection | None = None,
    margins: bool = False,
    share_prompts: bool = False,
    recompute: str = "none",
) -> dict[str, Found]:
    """Each case by name, at the layout. The reference of those that need one is built once, from the first's path.

    `margins`: pairs that are scored have them.
    """
    recipe = recipe_for(folder, layout, packing=packing, micro_batch_size=1, adapter=adapter, moe=moe)
    first = next(iter(cases.values()))  # decides whether the model has a score
    data = replace(recipe.data, sequence_length=rows.PACK_LENGTH, share_prompts=share_prompts)
    runtime: Any = replace(recipe.runtime, recompute=recompute)
    recipe = replace(recipe, data=data, objective=first, runtime=runtime)
    world_size = parallel.resolve(layout, world_size=None).world_size
    ranks = run_ranks(_rank, world_size, recipe, dict(cases), margins, timeout=300)
    for other in ranks[1:]:
        for name, found in other.items():
            assert (found.loss, found.metrics) == (ranks[0][name].loss, ranks[0][name].metrics), name
    return {
        name: replace(found, gradients=merge([rank[name].gradients for rank in ranks]))
        for name, found in ranks[0].items()
    }


def _rank(recipe: Recipe, cases: dict[str, ObjectiveSection], margins: bool) -> dict[str, Found]:
    from mcore_swift.objectives.registry import build_objective
    from mcore_swift.recipe_checks.objective import reference_of
    from mcore_swift.training import reference, step
    from mcore_swift.training.sums import Means

    model = open_model(recipe)
    references: dict[Any, Any] = {}
    found = {}
    for name, section in cases.items():
        wanted = replace(recipe, objective=section)
        key = (reference_of(wanted), section.reference_path, section.teacher and name)  # a teacher knows the options
        if key not in references:
            references[key] = reference.build(wanted, model.source, model.models, prepared())
        batches = micro_batches(wanted, model.source.vocab_size, margins=margins)
        gradients: dict[str, torch.Tensor] = {}

        def look(gradients: dict[str, torch.Tensor] = gradients) -> Any:
            gather_gradient_shards(model.models)
            gradients.update(copies(recipe, model))
            return True, 0.0, None

        for chunk in model.chunks:
            chunk.label_smoothing = section.label_smoothing if section.name == "sft" else 0.0
        model.optimizer.step = look
        work = (batches, build_objective(section), CPU, references[key])
        taken = step.train_step(model.models, model.optimizer, *work)
        means = Means()
        means.add(step.eval_step(model.models, *work))
        found[name] = Found(taken.loss, taken.metrics, means.values(), gradients)
    return found


def micro_batches(recipe: Recipe, vocab_size: int, *, margins: bool = False) -> list[MicroBatch]:
    place = parallel.ranks()
    if recipe.objective.name == "sft":
        shorter = replace(recipe, data=replace(recipe.data, sequence_length=SEQUENCE_LENGTH))
        return rank_model.micro_batches(shorter, vocab_size, place, weights=SFT_WEIGHTS)
    if recipe.objective.name == "rm":
        return rows.scored(recipe, vocab_size, place, margins=margins)
    if recipe.objective.name == "distill":
        return rank_model.micro_batches(recipe, vocab_size, place)
    if recipe.objective.name == "kto":
        return rows.judged(recipe, vocab_size, place)
    return rows.pairs(recipe, vocab_size, place, short=recipe.objective.name == "orpo")


def copies(recipe: Recipe, model: Any) -> dict[str, torch.Tensor]:
    """The gradients of what is trained: of the adapters in PEFT's names, or of all parameters in Hugging Face's."""
    if recipe.adapter.name == "none":
        return dict(hf_copies(model, lambda parameter: getattr(parameter, "main_grad", None)))
    from mcore_swift.peft.peft_folder import whole_tensors

    found = whole_tensors(model.chunks, value=attrgetter("main_grad"))
    return {name: tensor.clone() for name, tensor in found}
