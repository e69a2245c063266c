"""Uneven pipelines don't change the result: balanced, given and counted stages, packed through middle stages too.

Five layers, which no number of stages here divides. Windows and experts differ from layer to layer in some variants: a
stage that took its layers for others would show.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_swift.parallel import resolve
from mcore_swift.recipe import ParallelSection
from tests.distributed.harness import run_ranks
from tests.distributed.rank_model import Trained, recipe_for, train
from tests.distributed.test_layouts import assert_same_run
from tests.distributed.tiny_models import tiny_folder
from tests.training.checkpoint_run import assemble, saved_and_loaded, with_checkpoints
from tests.weights.test_live import assert_same_tensors, load_and_export

LAYERS = 5
LAYOUTS = {
    "one rank": ParallelSection(),
    "PP2": ParallelSection(pp=2),
    "PP3": ParallelSection(pp=3),
    "PP4": ParallelSection(pp=4),
    "PP2xVPP2": ParallelSection(pp=2, vpp=2),
    "Et|t*4L": ParallelSection(pp=2, pipeline_layout="Et|t*4L"),
    "E|t*3|ttL": ParallelSection(pp=3, pipeline_layout="E|t*3|ttL"),
    "Ett|t*3|L": ParallelSection(pp=3, pipeline_layout="Ett|t*3|L"),
    "Ett|t|t|tL": ParallelSection(pp=2, vpp=2, pipeline_layout="Ett|t|t|tL"),
    "first 1 of PP2": ParallelSection(pp=2, first_stage_layers=1),
    "first 1, last 1 of PP3": ParallelSection(pp=3, first_stage_layers=1, last_stage_layers=1),
    "loss as a layer at PP3": ParallelSection(pp=3, account_loss=True),
    "embedding and loss as layers at PP4": ParallelSection(pp=4, account_embedding=True, account_loss=True),
    "TP2xPP3": ParallelSection(tp=2, pp=3),
    "PP3xDP2": ParallelSection(pp=3, dp=2),
    "EP2xPP3": ParallelSection(ep=2, pp=3, dp=2),
}
VARIANTS = ("qwen2-tied", "qwen2-window", "qwen3-moe")
QUICK: set[tuple[str, str]] = set()
SLOW = {
    ("qwen2-tied", "PP3"),
    ("qwen2-tied", "PP4"),
    ("qwen2-tied", "E|t*3|ttL"),
    ("qwen2-window", "Ett|t|t|tL"),
    ("qwen3-moe", "embedding and loss as layers at PP4"),
}
Models = Callable[..., Path]


def case(variant: str, layout: str) -> Any:
    key = (variant, layout)
    marks = () if key in QUICK else pytest.mark.slow if key in SLOW else pytest.mark.nightly
    return pytest.param(variant, layout, marks=marks, id=f"{variant}-{layout}")


def cases() -> list[Any]:
    return [
        case(variant, layout)
        for variant in VARIANTS
        for layout, section in LAYOUTS.items()
        if layout != "one rank" and (section.ep == 1 or "moe" in variant)
    ]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    return lambda variant: tiny_folder(folder / variant, variant, num_hidden_layers=LAYERS)


@functools.cache
def at_layout(folder: Path, layout: str) -> Trained:
    return train(recipe_for(folder, LAYOUTS[layout]))


@pytest.mark.parametrize(("variant", "layout"), cases())
def test_layout(models: Models, variant: str, layout: str) -> None:
    folder = models(variant)
    assert_same_run(at_layout(folder, layout), at_layout(folder, "one rank"))


@pytest.mark.parametrize(
    "layout", [pytest.param("PP3", marks=pytest.mark.nightly), pytest.param("Ett|t|t|tL", marks=pytest.mark.slow)]
)
def test_round_trip_is_byte_equal(models: Models, tmp_path: Path, layout: str) -> None:
    folder, section = models("qwen2-window"), LAYOUTS[layout]
    ranks = resolve(section, world_size=None).world_size
    run_ranks(load_and_export, ranks, folder, tmp_path / "out", section, torch.float32, 10**9)
    assert_same_tensors(tmp_path / "out", folder)


@pytest.mark.parametrize(
    ("layout", "other"),
    [
        pytest.param("PP3", "Et|t*4L", marks=pytest.mark.slow),
        pytest.param("first 1 of PP2", "one rank", marks=pytest.mark.nightly),
        pytest.param("PP2xVPP2", "E|t*3|ttL", marks=pytest.mark.nightly),
    ],
)
def test_resumed_at_another_layout(models: Models, tmp_path: Path, layout: str, other: str) -> None:
    folder = models("qwen2-tied")
    saving, loading = (with_checkpoints(recipe_for(folder, LAYOUTS[name]), tmp_path) for name in (layout, other))
    saved, loaded = saved_and_loaded(saving, loading)
    before, after = assemble([rank[0] for rank in saved]), assemble([rank[0] for rank in loaded])
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert [value for pair in loaded[0][2] for value in pair] == pytest.approx(
        [value for pair in saved[0][2] for value in pair], rel=1e-5
    )
