"""Log-probabilities of the reference that come with the data: the same loss; and rows that spoil it are named."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from mcore_swift import parallel
from mcore_swift.data.batch import MicroBatch
from mcore_swift.recipe import (
    AdapterSection,
    DataSection,
    ModelSection,
    ObjectiveSection,
    ParallelSection,
    Recipe,
    RuntimeSection,
)
from tests.distributed.harness import prepared, run_ranks
from tests.distributed.rank_model import CPU, open_model, recipe_for
from tests.objectives import rows
from tests.objectives.here import micro_batches


def losses(recipe: Recipe) -> tuple[float, float, tuple[int, ...]]:
    """Of a step with the model itself as reference; with its log-probabilities kept in the batches; rows of the second,
    one of whose numbers is spoilt afterwards."""
    from mcore_swift.objectives.registry import build_objective
    from mcore_swift.training import reference, step

    model = open_model(recipe)
    batches = micro_batches(recipe, model.source.vocab_size)
    objective = build_objective(recipe.objective)
    policy = reference.build(recipe, model.source, model.models, prepared())
    assert policy is not None
    kept = on_every_stage(policy(batches))
    model.optimizer.step = lambda: (True, 0.0, None)

    def loss(batches: list[MicroBatch], policy: Any) -> Any:
        return step.train_step(model.models, model.optimizer, batches, objective, CPU, policy)

    spoilt = [replace(batch, sequences=spoil(batch.sequences, row=6)) for batch in kept]
    return loss(batches, policy).loss, loss(kept, None).loss, loss(spoilt, None).bad_rows


def on_every_stage(batches: list[MicroBatch]) -> list[MicroBatch]:
    """The batches as the data brings them: the last stage's log-probabilities on all."""
    import torch.distributed as dist

    found = []
    for batch in batches:
        assert batch.sequences is not None
        logps = batch.sequences.ref_logps
        logps = torch.zeros(batch.sequences.n) if logps is None else logps
        group = parallel.pp_group()
        dist.broadcast(logps, group=group, group_src=dist.get_world_size(group) - 1)
        found.append(replace(batch, sequences=replace(batch.sequences, ref_logps=logps)))
    return found


def spoil(sequences: Any, *, row: int) -> Any:
    return replace(sequences, ref_logps=torch.where(sequences.row == row, float("nan"), sequences.ref_logps))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [ParallelSection(), ParallelSection(pp=2, dp=2)], ids=["one rank", "PP2xDP2"])
def test_precomputed(models: Any, layout: ParallelSection) -> None:
    recipe = recipe_for(models("qwen3"), layout, micro_batch_size=1)
    recipe = replace(
        recipe,
        data=replace(recipe.data, sequence_length=rows.PACK_LENGTH),
        objective=ObjectiveSection(name="dpo", reference="model"),
    )
    world_size = parallel.resolve(layout, world_size=None).world_size
    for computed, kept, bad in run_ranks(losses, world_size, recipe):
        assert kept == computed
        assert bad == (6,)


def test_weights_that_are_held_otherwise_are_another_policy() -> None:
    """Four bits, and random weights of another seed or shape: each under a key of its own in the cache."""
    from mcore_swift.training.reference import as_held

    recipe = Recipe(model=ModelSection(path="m"), data=DataSection(train=[]))
    random = replace(recipe, model=ModelSection(path="m", init="random"))
    held = [
        recipe,
        *(replace(recipe, adapter=AdapterSection(name="lora", quantization=name)) for name in ("nf4", "fp4")),
        replace(recipe, adapter=AdapterSection(name="lora", quantization="nf4", double_quantization=False)),
        random,
        replace(random, runtime=RuntimeSection(seed=7)),
        replace(random, model=ModelSection(path="m", init="random", overrides={"num_hidden_layers": 2})),
    ]
    keys = [json.dumps(as_held(one)) for one in held]
    assert len(set(keys)) == len(held)
    assert as_held(replace(recipe, runtime=RuntimeSection(seed=7))) == as_held(recipe) == []
