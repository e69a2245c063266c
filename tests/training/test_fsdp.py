"""Fully sharded data parallelism gives what DP2 gives: losses, gradients, their norms, parameters after three steps.

Megatron-Core asks for meshes of GPUs: on the CPU it gets meshes of CPUs (`fake_devices`), the rest is its own code.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_swift import parallel
from mcore_swift.objectives.registry import OBJECTIVES
from mcore_swift.recipe import OptimizerSection, ParallelSection, Recipe, RuntimeSection
from tests.distributed.harness import run_ranks
from tests.distributed.rank_model import (
    CPU,
    assert_close,
    gather_gradient_shards,
    micro_batches,
    open_model,
    recipe_for,
)

STEPS = 3
SECTIONS = {
    "ddp": OptimizerSection(clip_grad=0.1),
    "megatron": OptimizerSection(clip_grad=0.1, fsdp="megatron"),
    "torch": OptimizerSection(clip_grad=0.1, fsdp="torch", distributed=False),
}
Tensors = dict[str, torch.Tensor]


def whole(part: Any, shape: torch.Size) -> torch.Tensor:
    """The tensor of which each rank holds a part: both kinds of shards are consecutive elements, some may be none."""
    import torch.distributed as dist

    local: Any = torch.empty(0) if part is None else part.detach()
    local = local.to_local() if hasattr(local, "to_local") else local
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, local.flatten().clone())
    return torch.cat(parts).view(shape)


def named(model: Any) -> dict[str, Any]:
    """What the optimizer updates, by Megatron's names."""
    wrapped = getattr(model.models[0].module, "param_and_grad_buffer", None)
    pairs = wrapped.optimizer_named_parameters if wrapped else model.chunks[0].named_parameters()
    return {name.removeprefix("module."): parameter for name, parameter in pairs}


def three_steps(recipe: Recipe) -> tuple[list[float], list[float], Tensors, Tensors]:
    from mcore_swift.training import step
    from mcore_swift.training.optimizer import set_learning_rate

    if recipe.optimizer.fsdp:
        from tests.training.fake_devices import meshes_of_cpus

        meshes_of_cpus()
    model = open_model(recipe)
    batches = micro_batches(recipe, model.source.vocab_size, parallel.ranks())
    set_learning_rate(model.optimizer, recipe.schedule.learning_rate, recipe.optimizer.weight_decay)
    gradients: Tensors = {}
    take_step = model.optimizer.step

    def look_and_step() -> Any:
        if recipe.optimizer.fsdp:
            gradients.update({name: whole(p.grad, p.shape) for name, p in named(model).items()})
        else:
            gather_gradient_shards(model.models)
            gradients.update({name: p.main_grad.clone() for name, p in named(model).items()})
        model.optimizer.step = take_step
        return take_step()

    model.optimizer.step = look_and_step
    results = [step.train_step(model.models, model.optimizer, batches, OBJECTIVES["sft"], CPU) for _ in range(STEPS)]
    model.sync_parameters()
    if recipe.optimizer.fsdp:
        parameters = {name: whole(p, p.shape) for name, p in named(model).items()}
    else:
        parameters = {name: p.detach().clone() for name, p in named(model).items()}
    return [r.loss for r in results], [r.grad_norm for r in results], gradients, parameters


@functools.cache
def at(folder: Path, kind: str, recompute: Any = "none") -> Any:
    runtime = RuntimeSection(device="cpu", recompute=recompute)
    recipe = recipe_for(folder, ParallelSection(dp=2), optimizer=SECTIONS[kind], runtime=runtime)
    results = run_ranks(three_steps, 2, recipe)
    assert results[0][:2] == results[1][:2]
    return results[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "kind", "recompute"),
    [
        ("qwen3", "megatron", "none"),
        ("qwen3", "torch", "none"),
        pytest.param("qwen2-tied", "megatron", "none", marks=pytest.mark.nightly),
        pytest.param("qwen3", "torch", "full", marks=pytest.mark.nightly),
        pytest.param("qwen3", "megatron", "full", marks=pytest.mark.nightly),
    ],
)
def test_shards_change_nothing(models: Any, variant: str, kind: str, recompute: str) -> None:
    losses, norms, gradients, parameters = at(models(variant), kind, recompute)
    expected = at(models(variant), "ddp")
    assert losses == pytest.approx(expected[0], rel=1e-6)
    assert norms == pytest.approx(expected[1], rel=1e-5)
    assert_close(gradients, expected[2])
    assert_close(parameters, expected[3])
