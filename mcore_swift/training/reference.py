"""The policy that an objective compares with: what it thinks of a step's answers, before the step is taken.

A reference is a function of this rank's parts of a step's micro-batches; it returns them with `Sequences.ref_logps` on
the last pipeline stage. It runs the pipeline forward only, so the reference's activations and the policy's are never
there at once, and nothing but one number an answer is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from mcore_swift import parallel
from mcore_swift.data.batch import MicroBatch
from mcore_swift.recipe import Recipe
from mcore_swift.recipe_checks.objective import filled, reference_of
from mcore_swift.training import setup, step, teacher
from mcore_swift.training.frozen import frozen_model

if TYPE_CHECKING:
    from torch import Tensor

    from mcore_swift.models.build import ModelSource
    from mcore_swift.platform import Platform

Reference = Callable[[list[MicroBatch]], list[MicroBatch]]


def build(recipe: Recipe, source: ModelSource, models: Sequence[Any], platform: Platform) -> Reference | None:
    """The reference that the recipe asks for, or its teacher; None where there is neither, or where the data brings the
    reference's log-probabilities.

    `source` and `models` are the policy's. Collective over the job.
    """
    if recipe.objective.teacher is not None:
        return teacher.teaching(build_frozen(recipe, source, platform), filled(recipe.objective))
    name = reference_of(recipe)
    if name == "adapter_off":
        return adapter_off(models)
    if name == "model":
        return frozen(build_frozen(recipe, source, platform))
    return None


def keep(
    recipe: Recipe, source: ModelSource, models: Sequence[Any], platform: Platform, loaders: Sequence[Any]
) -> None:
    """Puts the reference's log-probabilities into the loaders' micro-batches: from the cache, or computed now and kept.

    The reference is the model without its LoRA, or, where there is none or a path is given, a frozen model that is
    gone afterwards. Loaders may be None. Collective over the job.
    """
    from mcore_swift.data.cache import default_cache_dir
    from mcore_swift.data.ref_cache import add_ref_logps, model_key
    from mcore_swift.peft.adapters import disabled

    off = recipe.adapter.name == "lora" and recipe.objective.reference_path is None
    folder = Path(recipe.objective.reference_path or recipe.model.path)
    precision = setup.dtype_name(recipe, platform), recipe.precision.fp8, *(as_held(recipe) if off else ())
    found: list[Any] = []  # the frozen model, built for the first data set that isn't in the cache

    def compute(batches: list[MicroBatch]) -> list[Tensor]:
        if off:
            mine = step.parts(batches, platform.current_device(), models)
            with disabled(models):
                return step.answer_logps(models, mine)
        if not found:
            found.extend(build_frozen(recipe, source, platform))
        return step.answer_logps(found, step.parts(batches, platform.current_device(), found))

    def merge(values: np.ndarray) -> np.ndarray:
        merged = torch.from_numpy(values).to(platform.current_device())
        dist.all_reduce(merged, op=dist.ReduceOp.MAX)
        return merged.cpu().numpy()

    for loader in loaders:
        if loader is not None:
            cache = default_cache_dir(recipe.data.cache_dir)
            add_ref_logps(
                loader.samples, model=model_key(folder, precision), compute=compute, merge=merge, cache_dir=cache
            )


def as_held(recipe: Recipe) -> list[object]:
    """What makes the policy without its LoRA another one than its folder's, if anything does."""
    adapter, model = recipe.adapter, recipe.model
    found: list[object] = []
    if adapter.quantization != "none":
        found += [adapter.quantization, adapter.double_quantization]
    if model.init == "random":
        found += ["random", recipe.runtime.seed, model.overrides]
    return found


def build_frozen(recipe: Recipe, source: ModelSource, platform: Platform) -> list[Any]:
    """This rank's chunks of the reference or teacher, without gradients or optimizer. `source`: the trained model's.

    Raises InputError when its folder doesn't fit the layout, or has another vocabulary.
    """
    from mcore_swift.models.build import build_chunks, tensor_rules

    plan = parallel.resolve(recipe.parallel, world_size=dist.get_world_size())
    own = frozen_model(recipe, source, plan)
    config = setup.model_config(own.recipe, own.source, own.plan, platform, overlap=False)
    chunks = build_chunks(own.source, config, own.plan, platform)
    setup.load_weights(own.recipe, own.source, chunks, tensor_rules(own.source, config))
    for chunk in chunks:
        chunk.requires_grad_(False)
    return chunks


def frozen(chunks: Sequence[Any]) -> Reference:
    """A model of its own beside the policy."""

    def reference(batches: list[MicroBatch]) -> list[MicroBatch]:
        return _with_ref_logps(batches, step.answer_logps(chunks, batches))

    return reference


def adapter_off(models: Sequence[Any]) -> Reference:
    """The policy itself without its adapters: no second model."""
    from mcore_swift.peft.adapters import disabled

    def reference(batches: list[MicroBatch]) -> list[MicroBatch]:
        with disabled(models):
            return _with_ref_logps(batches, step.answer_logps(models, batches))

    return reference


def _with_ref_logps(batches: list[MicroBatch], found: list[Tensor]) -> list[MicroBatch]:
    """The batches with the log-probabilities of their answers, where this rank has them."""
    if not found:
        return batches
    return [
        replace(batch, sequences=replace(batch.sequences, ref_logps=logps))  # type: ignore[type-var]
        for batch, logps in zip(batches, found, strict=True)
    ]
