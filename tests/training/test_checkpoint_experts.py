"""Checkpoints of models with experts: their weights, the states of their sharded optimizer, the correction bias."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mcore_swift.recipe import MoeSection, OptimizerSection
from tests.distributed.rank_model import recipe_for
from tests.distributed.tiny_models import tiny_folder
from tests.training.checkpoint_run import assemble, layout, saved_and_loaded, with_checkpoints

BIAS = "decoder.layers.3.mlp.router.expert_bias"
EXPERT = "decoder.layers.3.mlp.experts.experts.linear_fc1.weight"


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "glm4-moe", "glm4-moe")


@pytest.mark.parametrize(
    ("place", "then", "dtype", "distributed"),
    [
        slow("EP2 DP2", "EP2 DP2", "fp32", True),
        slow("EP2 DP4", "EP4 DP4", "fp32", True),
        pytest.param("EP2 DP2", "DP1", "fp32", True, marks=pytest.mark.nightly),
        pytest.param("EP2 DP2", "EP2 DP2", "bf16", True, marks=pytest.mark.nightly),
        pytest.param("EP2 DP4", "EP2 DP4", "bf16", True, marks=pytest.mark.nightly),
        pytest.param("TP2 EP2 ETP1", "PP2 EP2 DP2", "fp32", True, marks=pytest.mark.nightly),
        pytest.param("EP2 DP2", "EP2 DP2", "fp32", False, marks=pytest.mark.nightly),
    ],
)
def test_what_was_saved_is_loaded(
    folder: Path, tmp_path: Path, place: str, then: str, dtype: Any, distributed: bool
) -> None:
    """The same numbers at any layout; at the same one the next steps are the same, bit for bit."""
    options: dict[str, Any] = {
        "optimizer": OptimizerSection(distributed=distributed),
        "moe": MoeSection(expert_bias_update_rate=0.01),
        "dtype": dtype,
    }
    saving, loading = (
        with_checkpoints(recipe_for(folder, layout(where), **options), tmp_path) for where in (place, then)
    )
    saved, loaded = saved_and_loaded(saving, loading)
    before, after = assemble([rank[0] for rank in saved]), assemble([rank[0] for rank in loaded])
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(after[key], value), key
    assert before[BIAS].dtype == torch.float32 and before[EXPERT].shape[0] == 8
    assert {f"optimizer.state.{name}.{EXPERT}" for name in ("exp_avg", "exp_avg_sq")} <= before.keys()
    if place == then:
        assert [rank[2] for rank in loaded] == [rank[2] for rank in saved]
    else:
        np.testing.assert_allclose(loaded[0][2], saved[0][2], rtol=1e-5)
