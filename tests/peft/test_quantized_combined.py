"""QLoRA together with one A for several modules, modules in full, several adapters: what the dequantized model gives.

Each of these is compared with PEFT without quantization elsewhere, so the reference is our own run on a folder that
holds bitsandbytes' dequantized weights.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mcore_swift.recipe import ModelSection, Recipe
from tests.distributed.harness import prepared, run_ranks
from tests.distributed.rank_model import assert_close, merge, recipe_for
from tests.distributed.tiny_models import tiny_folder
from tests.peft.test_quantized import LAYOUTS, SIZES, adapter, bitsandbytes_weights, ranks_of, train
from tests.peft.test_several import mixed_rank, recipe_with


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and the same with what four bits make of its linear weights."""
    prepared()
    import bitsandbytes.functional  # noqa: F401  (once, before the forks)

    model = tiny_folder(tmp_path_factory.mktemp("combined") / "qwen3", "qwen3", **SIZES)
    whole = model.with_name("dequantized")
    shutil.copytree(model, whole)
    weights = load_file(model / "model.safetensors") | run_ranks(bitsandbytes_weights, 1, model, "nf4", True)[0]
    save_file(weights, whole / "model.safetensors", metadata={"format": "pt"})
    return model, whole


COMBINED: dict[str, dict[str, Any]] = {
    "share_a": {"share_a": True},
    "share_a of dora": {"share_a": True, "dora": True, "dropout": 0.0},
    "modules_to_save": {"modules_to_save": ["norm", "lm_head", "input_layernorm"], "targets": ["q_proj", "mlp"]},
}
PLACES = ("one rank", "TP2+SP", "TP2xPP2")
SLOW = {("modules_to_save", "TP2+SP")}


def on_whole(recipe: Recipe, whole: Path) -> Recipe:
    """The same without quantization, at one rank."""
    bare = replace(recipe.adapter, quantization="none")
    return replace(recipe, adapter=bare, parallel=LAYOUTS["one rank"], model=ModelSection(path=str(whole)))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=pytest.mark.slow if (name, layout) in SLOW else pytest.mark.nightly)
        for name in COMBINED
        for layout in PLACES
    ],
)
def test_one_adapter(folders: tuple[Path, Path], name: str, layout: str) -> None:
    model, whole = folders
    recipe = recipe_for(model, LAYOUTS[layout], adapter=adapter(**COMBINED[name]), learning_rate=1e-3)
    losses, found, then = train(recipe)
    wanted, gradients, trained = train(on_whole(recipe, whole))
    assert losses == pytest.approx(wanted, rel=1e-6) and losses[-1] < losses[0]
    moving = {key: tensor for key, tensor in gradients.items() if bool(tensor.any())}  # B starts at 0
    assert_close({key: found[key] for key in moving}, moving)
    assert_close(then, trained, tolerance=1e-4)


@pytest.mark.nightly
@pytest.mark.parametrize("layout", PLACES)
def test_several_adapters(folders: tuple[Path, Path], layout: str) -> None:
    model, whole = folders
    recipe = recipe_with(model, layout)
    recipe = replace(recipe, adapter=replace(recipe.adapter, quantization="nf4"))
    ranks = run_ranks(mixed_rank, ranks_of(recipe), recipe)
    loss, gradients = run_ranks(mixed_rank, 1, on_whole(recipe, whole))[0]
    assert ranks[0][0] == pytest.approx(loss, rel=1e-6)
    assert_close(merge([rank[1] for rank in ranks]), gradients)
