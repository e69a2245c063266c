"""Context parallelism doesn't change the result: families at CP and its combinations, packed and unpacked.

Documents are of different lengths, none of which fits the cut in 2·cp chunks, and the mask of the loss is uneven.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from mcore_swift import parallel
from mcore_swift.objectives.registry import OBJECTIVES
from mcore_swift.recipe import ParallelSection, Recipe
from tests.distributed.harness import run_ranks
from tests.distributed.rank_model import CPU, Trained, micro_batches, open_model, recipe_for, train
from tests.distributed.test_layouts import assert_same_run
from tests.distributed.tiny_models import REPRESENTATIVES

LAYOUTS = {
    "one rank": ParallelSection(),
    "CP2": ParallelSection(cp=2),
    "CP4": ParallelSection(cp=4),
    "CP2xTP2": ParallelSection(cp=2, tp=2),
    "CP2xPP2": ParallelSection(cp=2, pp=2),
    "CP2xPP2xVPP2": ParallelSection(cp=2, pp=2, vpp=2),
    "CP2xDP2": ParallelSection(cp=2, dp=2),
    "CP2xTP2xPP2": ParallelSection(cp=2, tp=2, pp=2),
    "CP2xEP2": ParallelSection(cp=2, ep=2),
    "CP2xEP2xDP2": ParallelSection(cp=2, ep=2, dp=2),
}
EXPERTS = {"CP2xEP2", "CP2xEP2xDP2"}
QUICK = {("llama-rope-llama3", "CP2", "rows")}
SLOW = {
    ("mistral-window", "CP2", "packed"),
    ("qwen2-tied", "CP2xPP2", "packed"),
    ("qwen3", "CP2xTP2", "packed"),
    ("qwen2-tied", "CP2xPP2xVPP2", "packed"),
}


def case(variant: str, layout: str, form: str) -> Any:
    key = (variant, layout, form)
    marks = () if key in QUICK else pytest.mark.slow if key in SLOW else pytest.mark.nightly
    return pytest.param(variant, layout, form, marks=marks, id="-".join(key))


CASES = [
    case(variant, layout, form)
    for variant in dict.fromkeys((*REPRESENTATIVES, "gemma2", "gemma3", "qwen3-moe"))
    for layout in LAYOUTS
    for form in ("packed", "rows")
    if layout != "one rank"
    and (variant == "qwen3-moe" or layout not in EXPERTS)
    and not (form == "rows" and "VPP" in layout)  # refused
]


@functools.cache
def at_layout(folder: Path, layout: str, form: str) -> Trained:
    return train(recipe_for(folder, LAYOUTS[layout], packing=form == "packed"))


@pytest.mark.parametrize(("variant", "layout", "form"), CASES)
def test_layout(models: Any, variant: str, layout: str, form: str) -> None:
    folder = models(variant)
    assert_same_run(at_layout(folder, layout, form), at_layout(folder, "one rank", "packed"))


def evaluate_and_step(recipe: Recipe) -> Any:
    """A rank's results of an evaluation and of a step."""
    from mcore_swift.training import step

    model = open_model(recipe)
    batches = micro_batches(recipe, model.source.vocab_size, parallel.ranks())
    work = (batches, OBJECTIVES["sft"], CPU)
    return step.eval_step(model.models, *work), step.train_step(model.models, model.optimizer, *work)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("CP2", marks=pytest.mark.nightly),
        pytest.param("CP2xDP2", marks=pytest.mark.slow),
        pytest.param("CP2xPP2", marks=pytest.mark.nightly),
    ],
)
def test_counts_and_evaluation_are_one_ranks(models: Any, layout: str) -> None:
    folder, section = models("qwen3"), LAYOUTS[layout]
    (expected,) = run_ranks(evaluate_and_step, 1, recipe_for(folder))
    ranks = parallel.resolve(section, world_size=None).world_size
    for results in run_ranks(evaluate_and_step, ranks, recipe_for(folder, section)):
        for found, one in zip(results, expected, strict=True):
            assert found.loss == pytest.approx(one.loss, rel=1e-6)
            for name in ("loss_tokens", "tokens", "sum_squared_lengths"):
                assert getattr(found, name) == getattr(one, name), name


@pytest.mark.nightly
def test_every_mode_is_the_same_on_the_cpu(models: Any) -> None:
    folder = models("qwen3-moe")
    sizes = {"cp": 4, "cp_comm_type": "a2a+p2p", "hierarchical_cp": [2, 2]}
    assert_same_run(train(recipe_for(folder, ParallelSection(**sizes))), at_layout(folder, "one rank", "packed"))
