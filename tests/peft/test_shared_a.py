"""One A for q, k and v, and one for gate and up: PEFT's mathematics with equal matrices, in PEFT's form."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcore_swift import parallel
from mcore_swift.errors import InputError
from mcore_swift.recipe import AdapterSection, Recipe
from tests.distributed.harness import run_ranks
from tests.distributed.rank_model import assert_close, merge, open_model, recipe_for
from tests.peft.method_run import adapter_rank
from tests.peft.test_lora import ALL, LAYOUTS, _logits, expected, peft_folder, pissa_rank

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
FILE = "adapter_model.safetensors"


def first_of(name: str) -> str:
    """The name of the tensor that `name`'s A is the same as."""
    group = next((group for group in GROUPS if "lora_A" in name and name.split(".")[-3] in group), None)
    return name if group is None else name.replace(name.split(".")[-3], group[0])


def folder_with_equal_a(model: Path, method: str) -> Path:
    source, folder = peft_folder(model, model.parent / f"qwen3-{method}", method, ALL), model.parent / f"equal-{method}"
    if not folder.exists():
        shutil.copytree(source, folder)
        tensors = load_file(source / FILE)
        save_file({name: tensors[first_of(name)].clone() for name in tensors}, folder / FILE)
    return folder


@pytest.mark.parametrize(
    ("method", "layout"),
    [
        pytest.param("lora", "TP2+SP", marks=pytest.mark.nightly),
        pytest.param("lora", "one rank", marks=pytest.mark.nightly),
        pytest.param("dora", "TP2xPP2", marks=pytest.mark.nightly),
    ],
)
def test_as_peft_with_equal_matrices(models: Any, method: str, layout: str) -> None:
    """PEFT trains each A by itself: the gradient of the shared one is the sum of theirs."""
    model = models("qwen3")
    folder = folder_with_equal_a(model, method)
    loss, theirs, _ = expected(model, folder)
    sums: dict[str, torch.Tensor] = {}
    for name, gradient in theirs.items():
        sums[first_of(name)] = sums.get(first_of(name), 0) + gradient
    recipe = recipe_for(
        model, LAYOUTS[layout], adapter=AdapterSection(name="lora", path=str(folder), share_a=True), learning_rate=1e-4
    )
    ranks = run_ranks(adapter_rank, parallel.resolve(recipe.parallel, world_size=None).world_size, recipe)
    assert ranks[0][0][0] == pytest.approx(loss, rel=1e-6)
    assert_close(merge([rank[1] for rank in ranks]), {name: sums[first_of(name)] for name in theirs})


@pytest.mark.nightly
def test_what_is_written_gives_the_same_logits(models: Any, tmp_path: Path) -> None:
    """Trained at TP2 x PP2; the same A three times in PEFT's folder, whose logits are the merged model's."""
    model = models("qwen3")
    adapter = AdapterSection(name="lora", rank=4, alpha=6, targets=["all-linear"], share_a=True)
    losses = run_ranks(pissa_rank, 4, recipe_for(model, LAYOUTS["TP2xPP2"], adapter=adapter), tmp_path)[0]
    assert losses[-1] < losses[0]
    tensors = load_file(tmp_path / "adapter" / FILE)
    assert all(torch.equal(tensors[name], tensors[first_of(name)]) for name in tensors)
    assert len({tensors[name].sum().item() for name in tensors if "lora_A" in name}) == 4 * 4  # layers, linears
    merged, adapted = run_ranks(_logits, 1, tmp_path / "hf", model, tmp_path / "adapter")[0]
    assert (merged - adapted).abs().max() <= 1e-5 * adapted.abs().max()


def refused_rank(recipe: Recipe) -> str:
    with pytest.raises(InputError) as caught:
        open_model(recipe)
    return str(caught.value)


@pytest.mark.slow
def test_a_folder_with_different_a_is_refused(models: Any) -> None:
    model = models("qwen3")
    folder = peft_folder(model, model.parent / "qwen3-lora", "lora", ALL)
    adapter = AdapterSection(name="lora", path=str(folder), share_a=True)
    said = run_ranks(refused_rank, 1, recipe_for(model, adapter=adapter))[0]
    assert "layers.0.self_attn.k_proj.lora_A.weight differs from" in said and "adapter.share_a" in said
