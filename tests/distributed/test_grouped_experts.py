"""Grouped experts don't change the result: Megatron's TEGroupedMLP beside its experts one by one.

On the CPU its linear layers are plain torch; all else (dispatch, biases, sharding, checkpoints) is what runs on GPUs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mcore_swift.recipe import MoeSection
from tests.distributed.rank_model import recipe_for, train
from tests.distributed.test_experts import LAYOUTS, at_layout, fits
from tests.distributed.test_layouts import assert_same_run
from tests.training.checkpoint_run import assemble, layout, saved_and_loaded, with_checkpoints

GROUPED = MoeSection(grouped=True)
FAMILIES = ("qwen3-moe", "mixtral", "qwen2-moe", "gpt-oss")
PLACES = ("one rank", "TP2", "EP2", "EP2xTP2", "EP2xTP2xETP1", "EP2xPP2xVPP2")
QUICK = ("qwen3-moe", "EP2")
SLOW = (("gpt-oss", "EP2"),)


def case(variant: str, place: str) -> Any:
    key = (variant, place)
    marks = () if key == QUICK else pytest.mark.slow if key in SLOW else pytest.mark.nightly
    return pytest.param(*key, marks=marks, id=f"{variant}-{place}")


@pytest.mark.parametrize(("variant", "place"), [case(v, p) for v in FAMILIES for p in PLACES if fits(v, p)])
def test_as_one_by_one(models: Any, variant: str, place: str) -> None:
    folder = models(variant)
    assert_same_run(train(recipe_for(folder, LAYOUTS[place], moe=GROUPED)), at_layout(folder, "one rank"))


@pytest.mark.parametrize(
    ("saving", "loading"),
    [
        pytest.param(("EP2 TP2 DP2", True), ("EP2 TP2 ETP1", False), marks=pytest.mark.nightly),
        pytest.param(("EP2 TP2 ETP1", False), ("EP2 TP2 DP2", True), marks=pytest.mark.nightly),
        pytest.param(("EP2 DP2", True), ("DP2", True), marks=pytest.mark.nightly),
    ],
)
def test_checkpoints_are_the_same(models: Any, tmp_path: Path, saving: Any, loading: Any) -> None:
    """Weights and optimizer states that grouped experts save are loaded by experts one by one, and back."""
    recipes = [
        with_checkpoints(recipe_for(models("qwen3-moe"), layout(place), moe=MoeSection(grouped=grouped)), tmp_path)
        for place, grouped in (saving, loading)
    ]
    saved, loaded = saved_and_loaded(*recipes)
    before, after = assemble([rank[0] for rank in saved]), assemble([rank[0] for rank in loaded])
    assert before.keys() == after.keys() and all(torch.equal(after[key], before[key]) for key in before)
    np.testing.assert_allclose(loaded[0][2], saved[0][2], rtol=1e-5)
