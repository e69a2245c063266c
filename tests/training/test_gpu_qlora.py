"""The QLoRA script's own path: its recipes, its report, and a run on the CPU with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mcore_swift.models.build import read_source
from mcore_swift.peft.quantized_rules import check_quantization
from mcore_swift.recipe_checks import check_recipe
from mcore_swift.recipe_io import load_recipe
from perf import gpu_qlora
from perf.gpu_levers import NOTHING_SAVED
from tests.distributed.tiny_models import tiny_folder


@pytest.mark.parametrize("case", gpu_qlora.CASES, ids=lambda case: case.name)
def test_each_cases_recipe_is_allowed(case: gpu_qlora.Case, tmp_path: Path) -> None:
    recipe = load_recipe(gpu_qlora.RECIPE, [*NOTHING_SAVED, *case.keys, "--checkpoint.dir", str(tmp_path)])
    check_recipe(recipe)
    check_quantization(recipe, read_source(Path(recipe.model.path)), on_cpu=False)


def test_what_is_reported(tmp_path: Path) -> None:
    rows = [{"loss": 3.0, "memory_gib": peak, "tokens_per_second_per_gpu": 5.0} for peak in (9.0, 11.5, 11.0)]
    fits, large = (gpu_qlora.report(gpu_qlora.Case("x", [], bound), rows, tmp_path / "log") for bound in (12.0, 11.0))
    assert gpu_qlora.text(fits) == "x: 11.50 GiB (at most 12), 5 tokens/s"
    assert gpu_qlora.text(large) == "x: 11.50 GiB (at most 11): TOO MUCH, 5 tokens/s"
    (tmp_path / "log").write_text("much\nthe reason\n")
    failed = gpu_qlora.report(gpu_qlora.Case("x", []), [], tmp_path / "log")
    assert gpu_qlora.text(failed) == "x: failed: the reason"


@pytest.mark.nightly
def test_on_the_cpu(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "m", "qwen3", hidden_size=128, intermediate_size=192, head_dim=32)
    keys = ["--model.path", str(model), "--runtime.device", "cpu", "--data.sequence_length", "32"]
    only = ["--only", "Qwen3-8B, NF4", "Qwen3-8B, BF16"]
    code = gpu_qlora.main([str(tmp_path / "out"), "--work", str(tmp_path / "work"), *only, "--steps", "3", *keys])
    four, plain = json.loads((tmp_path / "out" / "gpu_qlora.json").read_text())["rows"]
    assert code == 0 and four["fits"] and len(four["losses"]) == 3
    assert four["losses"] != plain["losses"]  # other weights: quantized, and drawn otherwise
    summary = (tmp_path / "work" / "Qwen3_8B__NF4" / "summary.md").read_text()
    assert "| base weights | nf4, double quantization: 0.00 GiB on a rank instead of 0.00, relative error " in summary
