"""Gemma 2 and 3 at every layout: norms after each half, soft-capping, RoPE by layer type, scaled embeddings.

Few cases run in `make check` and `make test`; the rest is nightly.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_swift.models.build import read_source
from mcore_swift.recipe import ParallelSection, RuntimeSection
from tests.distributed.harness import run_ranks
from tests.distributed.rank_model import Trained, open_model, recipe_for, train
from tests.distributed.test_layouts import assert_same_run
from tests.distributed.tiny_models import tiny_folder
from tests.training.test_generate import run, transformers_tokens
from tests.weights.test_live import assert_same_tensors, load_and_export

LAYOUTS = {
    "one rank": ParallelSection(),
    "TP2": ParallelSection(tp=2, sequence_parallel=False),
    "TP2+SP": ParallelSection(tp=2),
    "PP2": ParallelSection(pp=2),
    "PP2xVPP2": ParallelSection(pp=2, vpp=2),
    "DP2": ParallelSection(dp=2),
    "TP2xPP2": ParallelSection(tp=2, pp=2),
    "TP2xPP2xDP2": ParallelSection(tp=2, pp=2, dp=2),
    "CP2": ParallelSection(cp=2),
    "CP2xTP2": ParallelSection(cp=2, tp=2),
    "CP2xPP2": ParallelSection(cp=2, pp=2),
}
QUICK: set[tuple[str, str, str]] = set()
SLOW = {
    ("gemma2", "TP2+SP", "packed"),
    ("gemma3", "PP2xVPP2", "packed"),
    ("gemma2", "TP2xPP2xDP2", "packed"),
}


def nightly(variant: str) -> Any:
    return pytest.param(variant, marks=pytest.mark.nightly)


def case(variant: str, layout: str, form: str) -> Any:
    key = (variant, layout, form)
    marks = () if key in QUICK else pytest.mark.slow if key in SLOW else pytest.mark.nightly
    return pytest.param(variant, layout, form, marks=marks, id="-".join(key))


CASES = [
    case(variant, layout, form)
    for variant in ("gemma2", "gemma3")
    for layout in LAYOUTS
    for form in ("packed", "rows")
    if (layout, form) != ("one rank", "packed") and not (form == "rows" and "VPP" in layout)  # refused
]


@functools.cache
def at_layout(folder: Path, layout: str, form: str) -> Trained:
    return train(recipe_for(folder, LAYOUTS[layout], packing=form == "packed"))


@pytest.mark.parametrize(("variant", "layout", "form"), CASES)
def test_layout(models: Any, variant: str, layout: str, form: str) -> None:
    folder = models(variant)
    assert_same_run(at_layout(folder, layout, form), at_layout(folder, "one rank", "packed"))


@pytest.mark.parametrize("variant", [pytest.param("gemma2", marks=pytest.mark.slow), nightly("gemma3")])
def test_round_trip_of_a_running_model_is_byte_equal(models: Any, tmp_path: Path, variant: str) -> None:
    layout = LAYOUTS["TP2xPP2"]
    run_ranks(load_and_export, 4, models(variant), tmp_path / "out", layout, torch.float32, 10**9)
    assert_same_tensors(tmp_path / "out", models(variant))


@pytest.mark.nightly
@pytest.mark.parametrize("variant", ["gemma2", "gemma3"])
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation(models: Any, variant: str, recompute: Any) -> None:
    folder = models(variant)
    found = train(recipe_for(folder, runtime=RuntimeSection(device="cpu", recompute=recompute)))
    assert_same_run(found, at_layout(folder, "one rank", "packed"))


@pytest.mark.nightly
@pytest.mark.parametrize("variant", ["gemma2", "gemma3"])
def test_greedy_tokens_are_transformers_own(models: Any, variant: str) -> None:
    """Keys are cached; the window and, for Gemma 3, the angles of its layers follow the position."""
    expected = transformers_tokens(models(variant))
    for layout in (None, ParallelSection(pp=2)):
        assert run(models(variant), layout) == expected


def embeddings_in_bf16(folder: Path) -> torch.Tensor:
    assert os.environ["WORLD_SIZE"] == "1"
    (chunk,) = open_model(recipe_for(folder, dtype="bf16")).chunks
    tokens = torch.arange(read_source(folder).vocab_size)[None]
    return chunk.embedding(tokens, torch.zeros_like(tokens)).detach().transpose(0, 1)


@pytest.mark.slow
def test_embeddings_are_scaled_as_transformers_does_it_in_bf16(tmp_path: Path) -> None:
    """√72 is 8.4853, in bf16 8.5: embeddings are multiplied by the latter."""
    from transformers import AutoModelForCausalLM

    folder = tiny_folder(tmp_path / "model", "gemma3", hidden_size=72)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    (found,) = run_ranks(embeddings_in_bf16, 1, folder)
    expected = model.get_input_embeddings()(torch.arange(101)[None]).detach()
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
