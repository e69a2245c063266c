"""What a rank of a checkpoint test does: trains, saves, loads, and shows what its model and optimizer hold."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mcore_swift import parallel
from mcore_swift.objectives.registry import OBJECTIVES
from mcore_swift.recipe import CheckpointSection, ParallelSection, Recipe
from mcore_swift.recipe_io import dump_recipe
from tests.distributed.harness import run_ranks
from tests.distributed.rank_model import micro_batches, open_model

CPU = torch.device("cpu")
VOCABULARY = 101  # odd: padded at TP2, not at TP1
LOADER = {"kind": "map", "fingerprint": "f", "global_batch_size": 8}
Global = dict[str, torch.Tensor]


def layout(text: str) -> ParallelSection:
    """`TP2 PP2 VPP2 DP2` → the section."""
    sizes: dict[str, Any] = {word[:-1].lower(): int(word[-1]) for word in text.split()}
    return ParallelSection(**sizes)


def with_checkpoints(recipe: Recipe, run: Path, **section: Any) -> Recipe:
    return replace(recipe, checkpoint=CheckpointSection(dir=str(run), **section))


# --- on a rank -------------------------------------------------------------------------------------------------


class Run:
    """A run on one rank: model, manager, steps."""

    def __init__(self, recipe: Recipe) -> None:
        from mcore_swift.training.checkpoint import CheckpointManager

        self.recipe, self.step = recipe, 0
        self.model = open_model(recipe)
        plan = parallel.resolve(recipe.parallel, world_size=int(os.environ["WORLD_SIZE"]))
        self.manager = CheckpointManager(
            recipe.checkpoint,
            run_dir=Path(recipe.checkpoint.dir or ""),
            source=self.model.source,
            recipe_text=dump_recipe(recipe),
            plan=plan,
        )

    def train(self, steps: int) -> list[tuple[float, float]]:
        """Steps, each with its own batches; (loss, gradient norm) of each."""
        from mcore_swift.training.optimizer import set_learning_rate
        from mcore_swift.training.step import train_step

        everything = micro_batches(self.recipe, self.model.source.vocab_size, parallel.ranks())
        results = []
        for _ in range(steps):
            set_learning_rate(self.model.optimizer, 1e-2 / (1 + self.step), 0.1)
            if self.model.sampling is not None:
                self.model.sampling.begin(self.step)
            first = self.step % len(everything)
            batches = everything[first:] + everything[:first]
            result = train_step(self.model.models, self.model.optimizer, batches, OBJECTIVES["sft"], CPU)
            results.append((result.loss, result.grad_norm))
            self.step += 1
        return results

    def save(self) -> None:
        from mcore_swift.training.checkpoint import TrainState

        state = TrainState(step=self.step, loader=dict(LOADER), samples=8 * self.step)
        self.manager.save(state, models=self.model.models, optimizer=self.model.optimizer)

    def load(self) -> Any:
        path = self.manager.newest()
        assert path is not None
        state = self.manager.load(path, models=self.model.models, optimizer=self.model.optimizer)
        self.step = state.step
        return state

    def shards(self) -> list[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]]:
        """(key, global shape, offset, copy) of all that this rank's model and optimizer hold."""
        from mcore_swift.training.optimizer_state import optimizer_items
        from mcore_swift.weights.dist_checkpoint import model_items

        model = model_items(self.model.models)
        items = [*model.tensors(), *optimizer_items(self.model.optimizer, model.parts)]
        found = []
        for item in items:
            shape, data = tuple(item.global_shape), item.data  # one expert has no axis for its place in the stack
            assert data is not None
            data = data.reshape([1] * (len(shape) - data.dim()) + list(data.shape)).clone()
            found.append((item.key, shape, tuple(item.global_offset), data))
        return found


def assemble(ranks: list[list[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]]]) -> Global:
    """Global tensors from the shards of all ranks; parts held twice must agree, vocabulary padding is cut off."""
    whole: Global = {}
    for key, shape, offset, data in (shard for rank in ranks for shard in rank):
        full = whole.setdefault(key, torch.full(shape, torch.nan, dtype=data.dtype))
        view = full[tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))]
        assert bool((view.isnan() | (view == data)).all()), f"replicas of {key} differ"
        view.copy_(data)
    for key, full in whole.items():
        assert not full.isnan().any(), f"{key} is not covered"
        if "word_embeddings" in key or "output_layer" in key:
            assert not full[VOCABULARY:].any()
            whole[key] = full[:VOCABULARY]
    return whole


def random_states() -> tuple[Any, ...]:
    """What each generator would give next, without moving it."""
    python, numpy = random.getstate(), np.random.get_state()
    values = (random.random(), float(np.random.random()), torch.get_rng_state().tolist())
    random.setstate(python)
    np.random.set_state(numpy)
    return values


def save_rank(recipe: Recipe, steps: int = 2, more: int = 2) -> Any:
    run = Run(recipe)
    run.train(steps)
    random.seed(int(os.environ["RANK"]))
    np.random.seed(17 + int(os.environ["RANK"]))
    torch.rand(5)
    run.save()
    states = random_states()
    shards = run.shards()
    committed = run.manager.finish()
    assert committed == run.manager.newest() and run.manager.poll() is None
    return shards, states, run.train(more)


def load_rank(recipe: Recipe, more: int = 2) -> Any:
    run = Run(recipe)
    run.train(1)  # what is filled is not what it was at the start
    state = run.load()
    return run.shards(), random_states(), run.train(more), state


def saved_and_loaded(saving: Recipe, loading: Recipe, *, steps: int = 2, more: int = 2) -> tuple[Any, Any]:
    def ranks(recipe: Recipe) -> int:
        return parallel.resolve(recipe.parallel, world_size=None).world_size

    return run_ranks(save_rank, ranks(saving), saving, steps, more), run_ranks(load_rank, ranks(loading), loading, more)
