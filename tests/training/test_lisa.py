"""LISA against its rule in float64: transformers' model, torch's AdamW, layers switched as the authors' code does."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_swift import parallel
from mcore_swift.objectives.registry import OBJECTIVES
from mcore_swift.recipe import OptimizerSection, ParallelSection, Recipe
from mcore_swift.training.optimizer import set_learning_rate
from tests.distributed.harness import prepared, run_ranks
from tests.distributed.rank_model import (
    CPU,
    assert_close,
    documents,
    hf_copies,
    merge,
    micro_batches,
    open_model,
    recipe_for,
)
from tests.training.checkpoint_run import layout, saved_and_loaded, with_checkpoints

LAYERS, COUNT, INTERVAL, SEED = 4, 2, 2, 1234
STEPS, RATE, DECAY = 7, 2e-4, 0.1
SECTION = OptimizerSection(clip_grad=0.1, lisa_layers=COUNT, lisa_interval=INTERVAL)
SECTIONS = [
    pytest.param(SECTION, id="distributed", marks=pytest.mark.slow),
    pytest.param(replace(SECTION, distributed=False), id="replicated", marks=pytest.mark.nightly),
]


def drawn(period: int, *, seed: int = SEED, count: int = COUNT) -> frozenset[int]:
    prepared()
    from mcore_swift.training.lisa import draw

    return draw(seed=seed, period=period, num_layers=LAYERS, count=count)


def test_layers_are_drawn_evenly() -> None:
    periods = [drawn(period) for period in range(3000)]
    assert {len(layers) for layers in periods} == {COUNT}
    counts = Counter(layer for layers in periods for layer in layers)
    assert sorted(counts) == list(range(LAYERS))
    assert all(abs(count - 1500) < 5 * (3000 * 0.25) ** 0.5 for count in counts.values())
    pairs = Counter(periods)
    assert len(pairs) == 6 and all(abs(count - 500) < 5 * (3000 * 5 / 36) ** 0.5 for count in pairs.values())
    assert periods[:20] == [drawn(period) for period in range(20)]
    assert periods[:20] != [drawn(period, seed=SEED + 1) for period in range(20)]


def test_the_steps_below_switch_layers_off_and_on() -> None:
    seen: set[int] = set()
    returned = False
    for before, after in pairwise([drawn(period) for period in range(-(-STEPS // INTERVAL))]):
        seen |= before
        returned = returned or bool((after - before) & seen)
    assert returned  # with moments of its own, and a count of updates that isn't the embedding's


def _reference(folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    groups = [
        {"params": [p for p in model.parameters() if (p.dim() > 1) == decayed], "weight_decay": DECAY * decayed}
        for decayed in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    texts = documents(model.config.vocab_size)
    count = sum(int(loss[1:].sum()) for _, loss in texts)
    losses = []
    for step in range(STEPS):
        if step % INTERVAL == 0:
            for layer in model.model.layers:
                layer.requires_grad_(False)
            for number in drawn(step // INTERVAL):
                model.model.layers[number].requires_grad_(True)
        total = torch.zeros((), dtype=torch.float64)
        for tokens, loss in texts:
            inputs = torch.from_numpy(tokens).long()
            logps = model(inputs[None]).logits[0, :-1].log_softmax(-1)
            total = total - (logps.gather(1, inputs[1:, None])[:, 0] * torch.from_numpy(loss[1:])).sum()
        optimizer.zero_grad(set_to_none=True)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        losses.append(float(total / count))
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


@functools.cache
def reference(folder: Path) -> Any:
    return run_ranks(_reference, 1, folder)[0]


def lisa_rank(recipe: Recipe, stand_in: bool) -> Any:
    if stand_in:  # counts updates in its groups, as Transformer Engine's does
        from tests.training.fake_devices import install_lean_adam

        install_lean_adam()
    from mcore_swift.training import step

    model = open_model(recipe)
    batches = micro_batches(recipe, model.source.vocab_size, parallel.ranks())
    set_learning_rate(model.optimizer, RATE, DECAY)
    losses = []
    for number in range(STEPS):
        model.sampling.begin(number)
        losses.append(step.train_step(model.models, model.optimizer, batches, OBJECTIVES["sft"], CPU).loss)
        for layer in (layer for chunk in model.chunks for layer in chunk.decoder.layers):
            wanted = layer.layer_number - 1 in drawn(number // INTERVAL)
            assert all(parameter.requires_grad == wanted for parameter in layer.parameters())
            assert wanted or not any(parameter.main_grad.any() for parameter in layer.parameters())
    model.sync_parameters()
    return losses, dict(hf_copies(model, lambda parameter: parameter.data))


LAYOUTS = {
    "one rank": ParallelSection(),
    "TP2+SP": ParallelSection(tp=2),
    "PP2": ParallelSection(pp=2),
    "VPP2": ParallelSection(pp=2, vpp=2),
    "DP2": ParallelSection(dp=2),
    "CP2": ParallelSection(cp=2),
}


def check(folder: Path, place: ParallelSection, section: OptimizerSection, *, stand_in: bool = False) -> None:
    recipe = recipe_for(folder, place, optimizer=section)
    ranks = run_ranks(lisa_rank, parallel.resolve(place, world_size=None).world_size, recipe, stand_in)
    losses, parameters = reference(folder)
    assert ranks[0][0] == pytest.approx(losses, rel=1e-6)
    assert_close(merge([rank[1] for rank in ranks]), parameters)


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(
            place,
            marks=pytest.mark.slow if place in ("PP2", "DP2") else pytest.mark.nightly,
        )
        for place in LAYOUTS
    ],
)
def test_as_the_authors_code(models: Any, place: str) -> None:
    check(models("qwen3"), LAYOUTS[place], SECTION)


@pytest.mark.parametrize("section", SECTIONS)
def test_with_counts_in_groups(models: Any, section: OptimizerSection) -> None:
    check(models("qwen3"), LAYOUTS["DP2"], section, stand_in=True)


def moved_rank(recipe: Recipe) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    from mcore_swift.training import step

    model = open_model(recipe)
    batches = micro_batches(recipe, model.source.vocab_size, parallel.ranks())
    set_learning_rate(model.optimizer, 1e-2, DECAY)
    before = dict(hf_copies(model, lambda parameter: parameter.data))
    for number in range(INTERVAL):
        model.sampling.begin(number)
        step.train_step(model.models, model.optimizer, batches, OBJECTIVES["sft"], CPU)
    model.sync_parameters()
    return before, dict(hf_copies(model, lambda parameter: parameter.data))


@pytest.mark.parametrize("section", SECTIONS)
def test_in_bf16_other_layers_stay_bit_for_bit(models: Any, section: OptimizerSection) -> None:
    ranks = run_ranks(moved_rank, 2, recipe_for(models("qwen3"), LAYOUTS["DP2"], optimizer=section, dtype="bf16"))
    before, after = (merge([rank[number] for rank in ranks]) for number in range(2))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    drawn_now = tuple(f"model.layers.{layer}." for layer in drawn(0))
    assert moved == {name for name in before if name.startswith(drawn_now) or ".layers." not in name}


@pytest.mark.nightly  # test_resume.py kills and resumes it, too
@pytest.mark.parametrize("other", ["TP2 PP2", "DP1"])
def test_resumed(models: Any, tmp_path: Path, other: str) -> None:
    """A layer that is drawn after the resume has its own moments and count; bit for bit at the same layout."""
    saving, loading = (
        with_checkpoints(recipe_for(models("qwen3"), layout(place), optimizer=SECTION), tmp_path)
        for place in ("TP2 PP2", other)
    )
    saved, loaded = saved_and_loaded(saving, loading, steps=3, more=4)
    if other == "TP2 PP2":
        assert [rank[2] for rank in loaded] == [rank[2] for rank in saved]
    else:
        assert torch.tensor(loaded[0][2]).allclose(torch.tensor(saved[0][2]), rtol=1e-5)
