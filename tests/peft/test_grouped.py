"""LoRA on grouped experts: what LoRA on each expert by itself gives, at every layout; one checkpoint, one folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mcore_swift import parallel
from mcore_swift.errors import InputError
from mcore_swift.recipe import AdapterSection, MoeSection, ParallelSection, Recipe, RuntimeSection
from tests.distributed.harness import RankFailure, run_ranks
from tests.distributed.rank_model import assert_close, merge, open_model, recipe_for
from tests.peft.method_run import RATE, adapter_rank, write_rank
from tests.peft.peft_run import LEARNING_RATE
from tests.peft.test_experts import LAYOUTS as EXPERT_LAYOUTS
from tests.peft.test_experts import expert_folder, trained_as_defined
from tests.training.checkpoint_run import assemble, layout, saved_and_loaded, with_checkpoints

slow, nightly = pytest.mark.slow, pytest.mark.nightly
GROUPED, ALONE = MoeSection(grouped=True), MoeSection(grouped=False)
FULL = RuntimeSection(device="cpu", recompute="full")


def adapter_run(model: Path, place: ParallelSection, adapter: AdapterSection, **fields: Any) -> Any:
    recipe = recipe_for(model, place, adapter=adapter, **fields)
    ranks = run_ranks(adapter_rank, parallel.resolve(place, world_size=None).world_size, recipe)
    return ranks[0][0], merge([rank[1] for rank in ranks]), merge([rank[2] for rank in ranks])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "place", "runtime"),
    [
        pytest.param("qwen3-moe", "EP2", None, id="qwen3-moe-EP2"),
        pytest.param("qwen3-moe", "EP2xTP2", None, marks=slow, id="qwen3-moe-EP2xTP2"),
        pytest.param("qwen3-moe", "EP2", FULL, marks=nightly, id="recomputed"),
        *(
            pytest.param(variant, place, None, marks=nightly, id=f"{variant}-{place}")
            for variant in ("qwen3-moe", "mixtral")
            for place in EXPERT_LAYOUTS
            if (variant, place) not in (("qwen3-moe", "EP2"), ("qwen3-moe", "EP2xTP2"))
        ),
    ],
)
def test_as_defined(models: Any, variant: str, place: str, runtime: RuntimeSection | None) -> None:
    """W + scaling · B A in transformers' model, float64: loss, every adapter's gradient, three steps."""
    model = models(variant)
    folder = expert_folder(model, model.parent / f"{variant}-experts-")
    loss, gradients, trained = trained_as_defined(model, folder)
    adapter = AdapterSection(name="lora", path=str(folder))
    fields: dict[str, Any] = {"moe": GROUPED, "learning_rate": LEARNING_RATE, "runtime": runtime}
    losses, found, then = adapter_run(model, EXPERT_LAYOUTS[place], adapter, **fields)
    assert losses[0] == pytest.approx(loss, rel=1e-6)
    assert_close(found, gradients)
    assert_close(then, trained)


VARIANTS: dict[str, dict[str, Any]] = {
    "rank 5, which is padded": {"rank": 5, "targets": ["all-linear"]},
    "rsLoRA, LoRA+": {"rank": 4, "targets": ["experts"], "rslora": True, "learning_rate_ratio": 8.0},
    "up alone": {"rank": 4, "targets": ["up_proj"]},
    "one A": {"rank": 4, "targets": ["experts"], "share_a": True},
    "PiSSA": {"rank": 4, "targets": ["experts"], "init": "pissa"},
}


@pytest.mark.parametrize(
    ("kind", "place"),
    [pytest.param(kind, place, marks=nightly) for kind in VARIANTS for place in ("one rank", "EP2", "EP2xTP2")],
)
def test_as_one_by_one(models: Any, kind: str, place: str) -> None:
    """Losses, first gradients and three steps of the optimizer."""
    adapter, where = AdapterSection(name="lora", **VARIANTS[kind]), EXPERT_LAYOUTS[place]
    expected = adapter_run(models("qwen3-moe"), where, adapter, moe=ALONE, learning_rate=RATE)
    losses, gradients, trained = adapter_run(models("qwen3-moe"), where, adapter, moe=GROUPED, learning_rate=RATE)
    assert losses == pytest.approx(expected[0], rel=1e-6)
    nothing = {name for name, value in expected[1].items() if not value.any()}  # A's, before B has left 0
    assert all(not gradients[name].any() for name in nothing)
    assert_close(*({k: v for k, v in each.items() if k not in nothing} for each in (gradients, expected[1])))
    assert_close(trained, expected[2])


@nightly
def test_dropout_is_the_same_when_computed_again(models: Any) -> None:
    adapter = AdapterSection(name="lora", rank=4, targets=["experts"], dropout=0.3)
    runs = [
        adapter_run(models("qwen3-moe"), EXPERT_LAYOUTS["EP2"], adapter, moe=GROUPED, runtime=runtime)
        for runtime in (None, FULL)
    ]
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])
    without = adapter_run(models("qwen3-moe"), EXPERT_LAYOUTS["EP2"], replace(adapter, dropout=0.0), moe=GROUPED)
    assert without[0][1:] != runs[0][0][1:]


# --- in and out -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", [pytest.param("default", marks=slow), pytest.param("pissa", marks=nightly)])
def test_one_folder(models: Any, tmp_path: Path, init: str) -> None:
    """The adapter's folder and the merged model are what experts one by one give, to the last bit."""
    adapter = AdapterSection(name="lora", rank=4, targets=["all-linear"], init=init)  # type: ignore[arg-type]
    for name, moe, place in (("grouped", GROUPED, "EP2xTP2"), ("alone", ALONE, "one rank")):
        recipe = recipe_for(models("qwen3-moe"), EXPERT_LAYOUTS[place], adapter=adapter, moe=moe)
        run_ranks(write_rank, parallel.resolve(recipe.parallel, world_size=None).world_size, recipe, tmp_path / name)
    for file in ("adapter/adapter_model.safetensors", "hf/model.safetensors"):
        found, expected = (load_file(tmp_path / name / file) for name in ("grouped", "alone"))
        assert found.keys() == expected.keys()
        nothing = {name for name, tensor in expected.items() if not tensor.any()}  # B
        assert not any(found[name].any() for name in nothing)
        found, expected = ({k: v for k, v in each.items() if k not in nothing} for each in (found, expected))
        assert_close(found, expected, tolerance=1e-6)
    configs = [(tmp_path / name / "adapter/adapter_config.json").read_text() for name in ("grouped", "alone")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    ("saving", "loading"),
    [
        pytest.param(("EP2 DP2", GROUPED), ("EP2 TP2 ETP1", ALONE), marks=nightly),
        pytest.param(("EP2 TP2 DP2", ALONE), ("EP2 DP2", GROUPED), marks=nightly),
        pytest.param(("EP2 DP2", GROUPED), ("EP2 DP2", GROUPED), marks=nightly),
    ],
)
def test_one_checkpoint(models: Any, tmp_path: Path, saving: Any, loading: Any) -> None:
    """Adapters and their optimizer states go from grouped experts to experts one by one, and back."""
    adapter = AdapterSection(name="lora", rank=4, targets=["all-linear"])
    recipes = [
        with_checkpoints(recipe_for(models("qwen3-moe"), layout(place), moe=moe, adapter=adapter), tmp_path)
        for place, moe in (saving, loading)
    ]
    saved, loaded = saved_and_loaded(*recipes)
    before, after = assemble([rank[0] for rank in saved]), assemble([rank[0] for rank in loaded])
    assert before.keys() == after.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert any("experts.3.up_proj.lora_B.weight" in key for key in before)
    np.testing.assert_allclose(loaded[0][2], saved[0][2], rtol=1e-5)
    if saving == loading:
        assert loaded[0][2] == saved[0][2]


def frozen_rank(recipe: Recipe) -> tuple[bool, bool]:
    """Whether the model without its adapters is the base model, and then again with them."""
    from mcore_swift.peft.adapters import disabled
    from tests.distributed.rank_model import micro_batches, model_logits

    model = open_model(recipe)
    batches = micro_batches(recipe, model.source.vocab_size, parallel.ranks())[:1]
    with torch.no_grad():
        (on,) = model_logits(model, batches)
        with disabled(model.models):
            (off,) = model_logits(model, batches)
        (again,) = model_logits(model, batches)
    return bool((off - on).abs().max() > 1e-3), torch.equal(again, on)


@nightly
def test_disabled(models: Any) -> None:
    model = models("qwen3-moe")
    folder = expert_folder(model, model.parent / "qwen3-moe-experts-")
    recipe = recipe_for(model, adapter=AdapterSection(name="lora", path=str(folder)), moe=GROUPED)
    assert run_ranks(frozen_rank, 1, recipe)[0] == (True, True)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"targets": ["*.experts.1.*"]}, "not all of the layer's experts are alike"),
        ({"targets": ["experts"], "dora": True}, "adapter.dora: .* is one of grouped experts, which have no DoRA here"),
    ],
)
@nightly
def test_what_is_refused(models: Any, section: dict[str, Any], message: str) -> None:
    adapter = AdapterSection(name="lora", rank=4, **section)
    recipe = recipe_for(models("qwen3-moe"), EXPERT_LAYOUTS["EP2"], adapter=adapter, moe=GROUPED)
    with pytest.raises(RankFailure, match=message) as failure:
        run_ranks(open_model, 2, recipe)
    assert InputError.__name__ in str(failure.value).splitlines()[-1]  # on the other rank too
