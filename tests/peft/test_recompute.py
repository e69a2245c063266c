"""Adapters inside layers that are computed again in the backward pass: the same dropout, and the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mcore_swift import parallel
from mcore_swift.recipe import AdapterSection, RuntimeSection
from tests.distributed.harness import run_ranks
from tests.distributed.rank_model import merge, recipe_for
from tests.peft.method_run import adapter_rank
from tests.peft.test_lora import LAYOUTS

PLAIN = RuntimeSection(device="cpu")
AGAIN = {
    "full": RuntimeSection(device="cpu", recompute="full"),
    "selective": RuntimeSection(device="cpu", recompute="selective", recompute_modules=["core_attn", "mlp"]),
}


def trained(model: Any, layout: str, runtime: RuntimeSection, dropout: float) -> Any:
    adapter = AdapterSection(name="lora", rank=4, targets=["all-linear"], dropout=dropout)
    recipe = recipe_for(model, LAYOUTS[layout], adapter=adapter, runtime=runtime)
    ranks = run_ranks(adapter_rank, parallel.resolve(recipe.parallel, world_size=None).world_size, recipe)
    return ranks[0][0], merge([rank[1] for rank in ranks]), merge([rank[2] for rank in ranks])


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        pytest.param("TP2+SP", "full", marks=pytest.mark.nightly),
        pytest.param("one rank", "selective", marks=pytest.mark.nightly),
        pytest.param("TP2+SP", "selective", marks=pytest.mark.nightly),
        pytest.param("PP2", "full", marks=pytest.mark.nightly),
        pytest.param("TP2", "full", marks=pytest.mark.nightly),
        pytest.param("CP2", "full", marks=pytest.mark.nightly),
    ],
)
def test_dropout_is_the_same_when_computed_again(models: Any, layout: str, kind: str) -> None:
    """Losses, gradients and three steps, bit for bit; without dropout they would be others."""
    model = models("qwen3")
    losses, gradients, parameters = trained(model, layout, PLAIN, 0.3)
    again = trained(model, layout, AGAIN[kind], 0.3)
    assert again[0] == losses
    for found, expected in ((again[1], gradients), (again[2], parameters)):
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    _, without, _ = trained(model, layout, PLAIN, 0.0)
    assert not any(torch.allclose(without[name], gradients[name], rtol=1e-2) for name in gradients if "lora_B" in name)
