"""Context parallelism doesn't change the result: families at CP and its combinations, packed and unpacked.

Documents are of different lengths, none of which fits the cut in 2·cp chunks, and the mask of the loss is uneven.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from mcore_swift.recipe import ParallelSection
from tests.distributed.rank_model import Trained, recipe_for, train
from tests.distributed.test_layouts import assert_same_run
from tests.distributed.tiny_models import REPRESENTATIVES, tiny_folder

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
QUICK = {
    ("mistral-window", "CP2", "packed"),
    ("llama-rope-llama3", "CP2", "rows"),
    ("qwen2-tied", "CP2xPP2", "packed"),
}
SLOW = {
    ("qwen3", "CP2xTP2", "packed"),
    ("qwen3", "CP2xDP2", "packed"),
    ("llama-rope-llama3", "CP4", "packed"),
    ("mistral-window", "CP2xPP2", "rows"),
    ("qwen2-tied", "CP2xPP2xVPP2", "packed"),
    ("qwen3-moe", "CP2xEP2", "packed"),
}


def case(variant: str, layout: str, form: str) -> Any:
    key = (variant, layout, form)
    marks = () if key in QUICK else pytest.mark.slow if key in SLOW else pytest.mark.nightly
    return pytest.param(variant, layout, form, marks=marks, id="-".join(key))


CASES = [
    case(variant, layout, form)
    for variant in (*REPRESENTATIVES, "qwen3-moe")
    for layout in LAYOUTS
    for form in ("packed", "rows")
    if layout != "one rank"
    and (variant == "qwen3-moe" or layout not in EXPERTS)
    and not (form == "rows" and "VPP" in layout)  # refused
]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("models")
    return lambda variant: tiny_folder(folder / variant, variant)


@functools.cache
def at_layout(folder: Path, layout: str, form: str) -> Trained:
    return train(recipe_for(folder, LAYOUTS[layout], packing=form == "packed"))


@pytest.mark.parametrize(("variant", "layout", "form"), CASES)
def test_layout(models: Any, variant: str, layout: str, form: str) -> None:
    folder = models(variant)
    assert_same_run(at_layout(folder, layout, form), at_layout(folder, "one rank", "packed"))
