"""Layouts don't change the result: loss, every gradient, their norm, and the parameters after three steps.

Float32. The global batch has documents of different lengths, a loss mask that is uneven over the ranks, and several
micro-batches a rank; the families' models have tied embeddings and vocabularies that TP has to pad.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_swift.recipe import OptimizerSection, ParallelSection, RuntimeSection
from tests.distributed.rank_model import Trained, assert_close, recipe_for, train
from tests.distributed.tiny_models import REPRESENTATIVES

LAYOUTS = {
    "one rank": ParallelSection(),
    "TP2": ParallelSection(tp=2, sequence_parallel=False),
    "TP2+SP": ParallelSection(tp=2),
    "PP2": ParallelSection(pp=2),
    "PP2xVPP2": ParallelSection(pp=2, vpp=2),
    "DP2": ParallelSection(dp=2),
    "TP2xPP2": ParallelSection(tp=2, pp=2),
    "TP2xPP2xDP2": ParallelSection(tp=2, pp=2, dp=2),
}
QUICK = {("qwen2-tied", "TP2+SP"), ("qwen2-tied", "PP2xVPP2")}
SLOW = {"PP2xVPP2", "TP2xPP2xDP2"}  # for every variant, as nearly all that the others are made of; those for one


def case(variant: str, layout: str) -> Any:
    slow = layout in SLOW or variant == "qwen3" or (variant, layout) == ("qwen2-tied", "DP2")
    marks = () if (variant, layout) in QUICK else pytest.mark.slow if slow else pytest.mark.nightly
    return pytest.param(variant, layout, marks=marks, id=f"{variant}-{layout}")


CASES = [case(variant, layout) for variant in REPRESENTATIVES for layout in LAYOUTS if layout != "one rank"]
CASES += [case("llama-biases", layout) for layout in ("TP2", "TP2+SP", "TP2xPP2xDP2")]


@functools.cache
def at_layout(folder: Path, layout: str) -> Trained:
    return train(recipe_for(folder, LAYOUTS[layout]))


def one_rank(folder: Path) -> Trained:
    """What every layout is compared with."""
    return at_layout(folder, "one rank")


def assert_same_run(found: Trained, expected: Trained) -> None:
    assert found.loss_tokens == expected.loss_tokens
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)
    assert_close(found.gradients, expected.gradients)
    # 1e-4 a step moves a weight of 0.15 by 7e-4 of itself: a step in the wrong direction shows 70 times over.
    assert_close(found.parameters, expected.parameters)


@pytest.mark.parametrize(("variant", "layout"), CASES)
def test_layout(models: Any, variant: str, layout: str) -> None:
    folder = models(variant)
    found = at_layout(folder, layout)
    assert_same_run(found, one_rank(folder))
    if LAYOUTS[layout].dp == 2:  # or the global normalization would not be tested
        assert found.rank_tokens[0] > 4 * found.rank_tokens[1] > 0
    assert min(found.grad_norms) > 1  # the recipe's clip_grad is 0.1: clipping was at work


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=pytest.mark.slow if v == "qwen3" else pytest.mark.nightly) for v in REPRESENTATIVES],
)
def test_packing_and_micro_batch_size(models: Any, variant: str) -> None:
    folder = models(variant)
    for packing, micro_batch_size in itertools.product((True, False), (1, 4)):
        recipe = recipe_for(folder, packing=packing, micro_batch_size=micro_batch_size)
        assert_same_run(train(recipe), one_rank(folder))


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("TP2+SP", marks=pytest.mark.nightly),
        pytest.param("PP2", marks=pytest.mark.nightly),
        pytest.param("TP2xPP2xDP2", marks=pytest.mark.slow),
    ],
)
def test_unpacked_rows_at_other_layouts(models: Any, layout: str) -> None:
    folder = models("qwen2-tied")
    assert_same_run(train(recipe_for(folder, LAYOUTS[layout], packing=False)), one_rank(folder))


@pytest.mark.slow
def test_tp3_with_three_key_value_heads(models: Any) -> None:
    folder = models("llama-9-heads")
    assert_same_run(train(recipe_for(folder, ParallelSection(tp=3))), one_rank(folder))


@pytest.mark.parametrize(
    "layout", [pytest.param("DP2", marks=pytest.mark.slow), pytest.param("TP2xPP2xDP2", marks=pytest.mark.nightly)]
)
def test_sgd_whose_steps_are_as_large_as_the_clipped_gradients(models: Any, layout: str) -> None:
    folder = models("qwen3")  # Adam would hide a wrong scale of all gradients, SGD doesn't
    sgd = {"optimizer": OptimizerSection(name="sgd", clip_grad=0.1, distributed=False), "learning_rate": 1e-2}
    assert_same_run(train(recipe_for(folder, LAYOUTS[layout], **sgd)), train(recipe_for(folder, **sgd)))


def test_optimizer_states_not_distributed(models: Any) -> None:
    folder = models("qwen3")
    plain = OptimizerSection(clip_grad=0.1, distributed=False)
    assert_same_run(train(recipe_for(folder, LAYOUTS["DP2"], optimizer=plain)), one_rank(folder))


RECOMPUTE = {
    "full": RuntimeSection(device="cpu", recompute="full"),
    "full-2-layers": RuntimeSection(device="cpu", recompute="full", recompute_layers=2),
    "core-attention": RuntimeSection(device="cpu", recompute="selective"),
    "mlp": RuntimeSection(device="cpu", recompute="selective", recompute_modules=["mlp"]),
}


@pytest.mark.parametrize(
    ("layout", "runtime"),
    [
        ("one rank", "full"),
        ("one rank", "core-attention"),
        ("one rank", "mlp"),
        pytest.param("TP2+SP", "full", marks=pytest.mark.nightly),
        pytest.param("TP2+SP", "core-attention", marks=pytest.mark.nightly),
        pytest.param("TP2+SP", "mlp", marks=pytest.mark.slow),
        pytest.param("PP2xVPP2", "full", marks=pytest.mark.slow),
        pytest.param("PP2", "full-2-layers", marks=pytest.mark.nightly),
    ],
)
def test_recomputation_changes_no_bit(models: Any, layout: str, runtime: str) -> None:
    folder = models("qwen3")
    found = train(recipe_for(folder, LAYOUTS[layout], runtime=RECOMPUTE[runtime]))
    assert_identical(found, at_layout(folder, layout))


@pytest.mark.parametrize(
    ("variant", "layout", "packing"),
    [
        ("qwen3", "one rank", True),
        pytest.param("qwen3", "TP2+SP", True, marks=pytest.mark.slow),
        *(pytest.param("qwen3", layout, True, marks=pytest.mark.nightly) for layout in ("TP2", "PP2xVPP2", "DP2")),
        *(pytest.param("qwen3", layout, False, marks=pytest.mark.nightly) for layout in ("one rank", "TP2+SP")),
        pytest.param("llama-tied-odd-vocabulary", "TP2xPP2", True, marks=pytest.mark.nightly),
        pytest.param("gemma2", "TP2+SP", True, marks=pytest.mark.nightly),  # logits are capped
    ],
)
def test_logits_in_chunks(models: Any, variant: str, layout: str, packing: bool) -> None:
    folder, section = models(variant), LAYOUTS[layout]
    runtime = RuntimeSection(device="cpu", loss_chunk=16 * section.tp)
    found = train(recipe_for(folder, section, packing=packing, runtime=runtime))
    assert_same_run(found, at_layout(folder, "one rank"))


def assert_identical(found: Trained, expected: Trained) -> None:
    assert found.losses == expected.losses
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert torch.equal(found.gradients[name], gradient), name
