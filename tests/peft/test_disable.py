"""Without its adapters a model is its base, bit for bit: what objectives with a reference model compare with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_swift import parallel
from mcore_swift.recipe import AdapterSection, ParallelSection, Recipe, RuntimeSection
from tests.distributed.harness import run_ranks
from tests.distributed.rank_model import micro_batches, model_logits, open_model, recipe_for
from tests.peft.test_lora import ALL, LAYOUTS, peft_folder

RECOMPUTED = RuntimeSection(device="cpu", recompute="full")


def disabled_rank(recipe: Recipe, folder: Path) -> tuple[list[torch.Tensor], ...]:
    """Logits of a model in training: before it has adapters, with them, disabled, and with them again."""
    from mcore_swift.peft import adapters, peft_folder

    model = open_model(recipe)
    batches = micro_batches(recipe, model.source.vocab_size, parallel.ranks())
    with torch.no_grad():
        base = model_logits(model, batches)
        settings, targets = peft_folder.read_settings(folder)
        adapters.attach(model.chunks, model.rules, targets, replace(settings, dropout=0.3))
        peft_folder.load(model.chunks, folder)
        state = torch.get_rng_state()
        adapted = model_logits(model, batches)
        with adapters.disabled(model.models):
            disabled = model_logits(model, batches)
            assert all(chunk.training for chunk in model.models)
        torch.set_rng_state(state)
        return base, adapted, disabled, model_logits(model, batches)


@pytest.mark.parametrize(
    ("method", "layout"),
    [
        pytest.param("lora", "TP2+SP", marks=pytest.mark.slow),
        pytest.param("dora", "PP2", marks=pytest.mark.nightly),
        pytest.param("lora", "one rank", marks=pytest.mark.nightly),
        pytest.param("dora", "TP2xPP2", marks=pytest.mark.nightly),
    ],
)
def test_disabled_adapters_leave_the_base(models: Any, method: str, layout: str) -> None:
    model = models("qwen3")
    folder = peft_folder(model, model.parent / f"qwen3-{method}", method, ALL)
    recipe = recipe_for(model, LAYOUTS[layout], runtime=RECOMPUTED)
    world = parallel.resolve(recipe.parallel, world_size=None).world_size
    base, adapted, disabled, _ = run_ranks(disabled_rank, world, recipe, folder)[-1]
    assert len(base) == 4
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(disabled, base, strict=True))
    assert not any(torch.allclose(ours, theirs, rtol=0.1) for ours, theirs in zip(adapted, base, strict=True))


@pytest.mark.slow
def test_enabled_again(models: Any) -> None:
    """Dropout draws nothing while adapters are off, and all is as it was behind the context."""
    model = models("qwen3")
    folder = peft_folder(model, model.parent / "qwen3-lora", "lora", ALL)
    base, adapted, disabled, again = run_ranks(disabled_rank, 1, recipe_for(model), folder)[0]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(disabled, base, strict=True))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, adapted, strict=True))


def pissa_rank(recipe: Recipe) -> tuple[list[torch.Tensor], ...]:
    from mcore_swift.peft import adapters, peft_folder

    model = open_model(recipe)
    batches = micro_batches(recipe, model.source.vocab_size, parallel.ranks())
    with torch.no_grad():
        for tensor in peft_folder.tensors_of(model.chunks):
            tensor.parameter.add_(0.1)
        trained = model_logits(model, batches)
        with adapters.disabled(model.models):
            disabled = model_logits(model, batches)
        return trained, disabled, model_logits(model, batches)


@pytest.mark.nightly
def test_pissa_goes_back_to_its_start(models: Any) -> None:
    model = models("qwen3")
    layout = ParallelSection(tp=2)
    adapter = AdapterSection(name="lora", rank=4, alpha=6, targets=["all-linear"], init="pissa")
    trained, disabled, again = run_ranks(pissa_rank, 2, recipe_for(model, layout, adapter=adapter))[0]
    base = run_ranks(_base_rank, 2, recipe_for(model, layout))[0]
    for number, logits in enumerate(base):
        assert (disabled[number] - logits).abs().max() <= 1e-5 * logits.abs().max()
        assert (trained[number] - logits).abs().max() > 1e-2 * logits.abs().max()
        assert torch.equal(again[number], trained[number])


def _base_rank(recipe: Recipe) -> list[torch.Tensor]:
    model = open_model(recipe)
    with torch.no_grad():
        return model_logits(model, micro_batches(recipe, model.source.vocab_size, parallel.ranks()))
