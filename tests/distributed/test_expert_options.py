"""The recipe's moe section in training: dispatchers, capacity, and the correction bias that moves by its own rule."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_swift.recipe import MoeSection, ParallelSection
from tests.distributed.harness import run_ranks
from tests.distributed.rank_model import STEPS, assert_close, documents, recipe_for, train
from tests.distributed.test_layouts import assert_same_run

RATE = 0.02
slow, nightly = pytest.mark.slow, pytest.mark.nightly
LAYOUTS = {
    "one rank": ParallelSection(),
    "EP2": ParallelSection(ep=2, dp=2),
    "EP2xTP2": ParallelSection(ep=2, tp=2, dp=2),
    "EP2xTP2xETP1": ParallelSection(ep=2, tp=2, etp=1),
    "EP2xTP2xPP2": ParallelSection(ep=2, tp=2, pp=2, etp=1),
}


@pytest.mark.parametrize(
    ("layout", "moe"),
    [
        pytest.param("EP2", MoeSection(dispatcher="allgather"), marks=slow, id="allgather"),
        pytest.param("EP2xTP2xETP1", MoeSection(dispatcher="allgather"), marks=nightly, id="allgather-TP2-ETP1"),
        pytest.param("EP2xTP2", MoeSection(dispatcher="allgather"), marks=nightly, id="allgather-TP2"),
        pytest.param("EP2", MoeSection(capacity_factor=8 / 3, pad_to_capacity=True), marks=slow, id="room-and-padding"),
        pytest.param("EP2", MoeSection(capacity_factor=8.0, drop_policy="position"), marks=nightly, id="room-for-all"),
        pytest.param("EP2", MoeSection(router_dtype="fp64"), marks=nightly, id="router-in-fp64"),
    ],
)
def test_what_changes_nothing(models: Any, layout: str, moe: MoeSection) -> None:
    """Of 8 experts, 3 a token, each has room for all tokens at 8 / 3 times an even load."""
    folder = models("qwen3-moe")
    assert_same_run(train(recipe_for(folder, LAYOUTS[layout], moe=moe)), train(recipe_for(folder)))


@slow
def test_capacity_bounds_the_load(models: Any) -> None:
    folder = models("qwen3-moe")
    free = train(recipe_for(folder))
    bounded = [
        train(recipe_for(folder, moe=MoeSection(capacity_factor=1.0, drop_policy=policy)))  # type: ignore[arg-type]
        for policy in ("probs", "position")
    ]
    assert free.metrics["expert_load"] > 1.2
    for run in bounded:
        assert run.metrics["expert_load"] < free.metrics["expert_load"]
        assert run.losses[0] != pytest.approx(free.losses[0], rel=1e-4)
    assert bounded[0].losses[0] != pytest.approx(bounded[1].losses[0], rel=1e-5)


# --- the correction bias ----------------------------------------------------------------------------------------------


def moved_biases(folder: Path) -> dict[str, torch.Tensor]:
    """What the biases are after STEPS steps: each up by RATE where an expert got less than an even share, down where
    more (arXiv 2408.15664, algorithm 1); by transformers' own choices, with weights that stay."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    gates = {
        f"model.layers.{i}.mlp.gate.e_score_correction_bias": layer.mlp.gate
        for i, layer in enumerate(model.model.layers)
        if hasattr(layer.mlp, "gate")
    }
    for _ in range(STEPS):
        counts = {name: torch.zeros(gate.num_experts) for name, gate in gates.items()}

        def count(name: str, module: Any, args: Any, output: Any, into: Any = counts) -> None:
            into[name] += output[2].flatten().bincount(minlength=module.num_experts)

        hooks = [gate.register_forward_hook(partial(count, name)) for name, gate in gates.items()]
        with torch.no_grad():
            for tokens, _ in documents(model.config.vocab_size):
                model(torch.from_numpy(tokens).long()[None])
            for name, gate in gates.items():
                gate.e_score_correction_bias += RATE * torch.sign(counts[name].mean() - counts[name])
        for hook in hooks:
            hook.remove()
    return {name: gate.e_score_correction_bias.clone() for name, gate in gates.items()}


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("one rank", marks=slow),
        pytest.param("EP2xTP2xPP2", marks=slow),
        *(pytest.param(name, marks=nightly) for name in ("EP2", "EP2xTP2")),
    ],
)
def test_the_correction_bias_moves(models: Any, layout: str) -> None:
    folder = models("glm4-moe")
    recipe = recipe_for(folder, LAYOUTS[layout], learning_rate=1e-12, moe=MoeSection(expert_bias_update_rate=RATE))
    found = {name: value for name, value in train(recipe).parameters.items() if name.endswith("correction_bias")}
    assert_close(found, run_ranks(moved_biases, 1, folder)[0], tolerance=1e-6)
