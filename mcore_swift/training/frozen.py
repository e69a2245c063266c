"""The frozen model beside the one that is trained: a policy's reference, or a student's teacher."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mcore_swift.errors import InputError
from mcore_swift.models.build import check_layout
from mcore_swift.models.lever_rules import check_sharing
from mcore_swift.parallel import ParallelPlan
from mcore_swift.pipeline import PipelineWish
from mcore_swift.recipe import ModelSection, MoeSection, Recipe, RuntimeSection
from mcore_swift.recipe_checks.distill import LESSON, Lesson
from mcore_swift.recipe_checks.objective import reference_of
from mcore_swift.recipe_checks.table import refuse

if TYPE_CHECKING:
    from mcore_swift.models.build import ModelSource


@dataclass(frozen=True)
class FrozenModel:
    """`recipe`: what it is built from, without what only belongs to training; `plan`: its part of the job's layout."""

    recipe: Recipe
    source: ModelSource
    plan: ParallelPlan


def stays(recipe: Recipe) -> bool:
    """Whether there is such a model throughout the run."""
    return recipe.objective.teacher is not None or reference_of(recipe) == "model"


def frozen_model(recipe: Recipe, source: ModelSource, plan: ParallelPlan) -> FrozenModel:
    """The teacher, or the reference from its own folder or from the run's start. `source`, `plan`: of the trained one.

    Raises InputError when its folder doesn't fit the layout, or has another vocabulary.
    """
    from mcore_swift.training.run import model_source

    section = recipe.objective
    key = "objective.teacher" if section.teacher is not None else "objective.reference_path"
    path = section.teacher or section.reference_path or recipe.model.path
    # Memory is saved for a backward pass, and experts' exchange is hidden behind one: there is none here.
    runtime = RuntimeSection(device=recipe.runtime.device)
    plain = replace(recipe, model=ModelSection(path=path), runtime=runtime, moe=_exact(recipe))
    try:
        own = model_source(plain)
    except InputError as error:
        raise InputError(str(error).replace("model.path", key, 1)) from None
    refuse(LESSON, Lesson(recipe, key, own.folder, own.vocab_size, source.folder, source.vocab_size))
    plan = _fitted(plan, own, source)
    check_layout(own, plan)
    check_sharing(plain, plan, own)
    return FrozenModel(plain, own, plan)


def _fitted(plan: ParallelPlan, own: ModelSource, source: ModelSource) -> ParallelPlan:
    """The layout without what it says of experts and of the stages' layers, if that can only be said of the trained."""
    if own.config.num_hidden_layers != source.config.num_hidden_layers:
        plan = replace(plan, pipeline=PipelineWish())
    if own.fields().get("num_moe_experts") is None:
        plan = replace(plan, ep=1, etp=plan.tp)
    return plan


def _exact(recipe: Recipe) -> MoeSection:
    """How experts are computed, without what only belongs to training them."""
    return replace(recipe.moe, aux_loss="none", aux_loss_coeff=0.0, z_loss_coeff=0.0, expert_bias_update_rate=0.0)
