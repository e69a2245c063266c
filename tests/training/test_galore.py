"""GaLore against the paper's algorithm, written down in float64 on transformers' model."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_swift import parallel
from mcore_swift.errors import InputError
from mcore_swift.objectives.registry import OBJECTIVES
from mcore_swift.recipe import OptimizerSection, ParallelSection, Recipe
from mcore_swift.training.optimizer import set_learning_rate
from tests.distributed.harness import run_ranks
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
from tests.training.checkpoint_run import assemble, layout, saved_and_loaded, with_checkpoints

RANK, INTERVAL, SCALE = 5, 2, 0.5
STEPS, RATE, DECAY, BETAS, EPS = 3, 1e-3, 0.1, (0.9, 0.95), 1e-8
SECTION = OptimizerSection(
    name="galore", distributed=False, clip_grad=0.1, galore_rank=RANK, galore_interval=INTERVAL, galore_scale=SCALE
)


class Adam:
    """Moments of one tensor; `direction` is m̂ / (√v̂ + ε)."""

    def __init__(self) -> None:
        self.m: Any = 0.0
        self.v: Any = 0.0
        self.t = 0

    def direction(self, g: torch.Tensor) -> torch.Tensor:
        self.t += 1
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * g
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * g**2
        return self.m / (1 - BETAS[0] ** self.t) / ((self.v / (1 - BETAS[1] ** self.t)) ** 0.5 + EPS)


class GaLore(Adam):
    """The paper's algorithm for one matrix: singular vectors of the shorter side, renewed every INTERVAL updates."""

    def direction(self, g: torch.Tensor) -> torch.Tensor:
        if self.t % INTERVAL == 0:
            u, _, vh = torch.linalg.svd(g, full_matrices=False)
            self.p = vh[:RANK].T if g.size(0) >= g.size(1) else u[:, :RANK]
            # Either of a vector and its opposite may come: let the largest component be positive.
            self.p = torch.stack([v * v[v.abs().argmax()].sign() for v in self.p.T], dim=1)
        if g.size(0) >= g.size(1):
            return SCALE * super().direction(g @ self.p) @ self.p.T
        return SCALE * self.p @ super().direction(self.p.T @ g)


def _reference(folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    parameters = dict(model.named_parameters())
    rules = {name: GaLore() if "_proj.weight" in name else Adam() for name in parameters}
    texts = documents(model.config.vocab_size)
    count = sum(int(loss[1:].sum()) for _, loss in texts)
    losses = []
    for _ in range(STEPS):
        total = torch.zeros((), dtype=torch.float64)
        for tokens, loss in texts:
            inputs = torch.from_numpy(tokens).long()
            logps = model(inputs[None]).logits[0, :-1].log_softmax(-1)
            total = total - (logps.gather(1, inputs[1:, None])[:, 0] * torch.from_numpy(loss[1:])).sum()
        model.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        with torch.no_grad():
            for name, w in parameters.items():
                w *= 1 - RATE * DECAY * (w.dim() > 1)
                w -= RATE * rules[name].direction(w.grad)  # type: ignore[arg-type]
        losses.append(float(total / count))
    return losses, {name: w.detach() for name, w in parameters.items()}


@functools.cache
def reference(folder: Path) -> Any:
    return run_ranks(_reference, 1, folder)[0]


def galore_rank(recipe: Recipe) -> Any:
    from mcore_swift.training import step

    model = open_model(recipe)
    batches = micro_batches(recipe, model.source.vocab_size, parallel.ranks())
    set_learning_rate(model.optimizer, RATE, DECAY)
    losses = [
        step.train_step(model.models, model.optimizer, batches, OBJECTIVES["sft"], CPU).loss for _ in range(STEPS)
    ]
    return losses, dict(hf_copies(model, lambda parameter: parameter.data))


def trained(folder: Path, place: ParallelSection) -> tuple[list[float], dict[str, torch.Tensor]]:
    recipe = recipe_for(folder, place, optimizer=SECTION)
    ranks = run_ranks(galore_rank, parallel.resolve(place, world_size=None).world_size, recipe)
    return ranks[0][0], merge([rank[1] for rank in ranks])


LAYOUTS = {
    "one rank": ParallelSection(),
    "TP2": ParallelSection(tp=2, sequence_parallel=False),
    "TP2+SP": ParallelSection(tp=2),
    "PP2": ParallelSection(pp=2),
    "DP2": ParallelSection(dp=2),
    "CP2": ParallelSection(cp=2),
    "TP2xPP2": ParallelSection(tp=2, pp=2),
    "TP2xDP2": ParallelSection(tp=2, dp=2),
}


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(
            place,
            marks=pytest.mark.slow if place in ("TP2+SP", "DP2") else pytest.mark.nightly,
        )
        for place in LAYOUTS
    ],
)
def test_as_the_paper_says(models: Any, place: str) -> None:
    folder = models("qwen3")
    losses, parameters = reference(folder)
    found = trained(folder, LAYOUTS[place])
    assert found[0] == pytest.approx(losses, rel=1e-6)
    assert_close(found[1], parameters)


@pytest.mark.nightly
def test_in_bf16_the_fp32_parameters_are_projected(models: Any) -> None:
    recipe = recipe_for(models("qwen3"), LAYOUTS["TP2+SP"], optimizer=SECTION, dtype="bf16")
    losses = run_ranks(galore_rank, 2, recipe)[0][0]
    assert losses == pytest.approx(reference(models("qwen3"))[0], rel=1e-2)
    assert losses[0] - losses[-1] > 0.5 * (reference(models("qwen3"))[0][0] - reference(models("qwen3"))[0][-1]) > 0


@pytest.mark.nightly
@pytest.mark.parametrize("place", [ParallelSection(ep=2, dp=2), ParallelSection(ep=2, tp=2, dp=2)])
def test_experts_at_every_layout(models: Any, place: ParallelSection) -> None:
    folder = models("qwen3-moe")
    one, found = trained(folder, ParallelSection()), trained(folder, place)
    assert found[0] == pytest.approx(one[0], rel=1e-6)
    assert_close(found[1], one[1])


@pytest.mark.nightly
@pytest.mark.parametrize("other", ["TP2 PP2", "DP2"])
def test_resumed(models: Any, tmp_path: Path, other: str) -> None:
    """Saved between two renewals: the basis is needed. Bit for bit at the same layout; the same states at another."""
    saving, loading = (
        with_checkpoints(recipe_for(models("qwen2-tied"), layout(place), optimizer=SECTION), tmp_path)
        for place in ("TP2 PP2", other)
    )
    saved, loaded = saved_and_loaded(saving, loading, steps=3, more=2)
    before, after = assemble([rank[0] for rank in saved]), assemble([rank[0] for rank in loaded])
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    name = "model.layers.0.mlp.down_proj"
    assert before[f"optimizer.galore.basis.{name}"].shape == (64, RANK)
    assert before[f"optimizer.galore.exp_avg.{name}"].shape == (RANK, 96)
    assert before["optimizer.galore.exp_avg_sq.model.layers.3.mlp.up_proj"].shape == (96, RANK)
    assert "optimizer.state.exp_avg.decoder.layers.0.mlp.linear_fc2.weight" not in before
    if other == "TP2 PP2":
        assert [rank[2] for rank in loaded] == [rank[2] for rank in saved]
    else:
        assert torch.tensor(loaded[0][2]).allclose(torch.tensor(saved[0][2]), rtol=1e-5)


def refused_rank(recipe: Recipe) -> str:
    with pytest.raises(InputError) as caught:
        open_model(recipe)
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"galore_rank": 65}, "optimizer.galore_rank: 65 is larger than model.layers.0.self_attn."),
        ({"galore_targets": ["q_proj"]}, "q_proj is one of them and model.layers.0.self_attn.k_proj isn't"),
        ({"galore_targets": ["w1"]}, "optimizer.galore_targets: 'w1' matches no linear layer"),
    ],
)
def test_what_is_refused(models: Any, changes: dict[str, Any], message: str) -> None:
    from dataclasses import replace

    recipe = recipe_for(models("qwen3"), LAYOUTS["PP2"], optimizer=replace(SECTION, **changes))
    assert all(message in said for said in run_ranks(refused_rank, 2, recipe))
