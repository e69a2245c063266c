"""The script that measures a mixture of experts on GPUs: its recipes, its report, and a run on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mcore_swift import parallel
from mcore_swift.models.build import check_layout, read_source
from mcore_swift.models.experts import check_experts
from mcore_swift.recipe_checks import check_recipe
from mcore_swift.recipe_io import load_recipe
from perf import gpu_moe
from perf.gpu_levers import NOTHING_SAVED
from tests.distributed.tiny_models import tiny_folder


@pytest.mark.parametrize("case", gpu_moe.CASES, ids=lambda case: case.name)
def test_each_cases_recipe_is_allowed(case: gpu_moe.Case, tmp_path: Path) -> None:
    recipe = load_recipe(case.recipe, [*NOTHING_SAVED, *case.keys, "--checkpoint.dir", str(tmp_path)])
    check_recipe(recipe)
    source = read_source(Path(recipe.model.path), overrides=recipe.model.overrides)
    plan = parallel.resolve(recipe.parallel, world_size=2)
    check_layout(source, plan)
    check_experts(source, plan, recipe.moe, device="cuda")


def test_what_is_reported(tmp_path: Path) -> None:
    rows = [
        {"loss": 3.0, "memory_gib": peak, "tokens_per_second_per_gpu": speed, "tflops_per_gpu": speed / 100}
        for peak, speed in ((9.0, 1.0), (11.5, 2.0), (11.0, 7000.0), (11.0, 9000.0))
    ]
    recipe, log = gpu_moe.LORA, tmp_path / "log"
    fast = gpu_moe.report(gpu_moe.Case("x", recipe, measure=gpu_moe.TOKENS, least=7300), rows, log)
    slow = gpu_moe.report(gpu_moe.Case("x", recipe, least=81), rows, log)
    assert gpu_moe.text(fast) == "x: 80 TFLOP/s, 8,000 tokens/s a GPU (at least 7,300 tokens/s), 11.5 GiB"
    assert gpu_moe.text(slow) == "x: 80 TFLOP/s, 8,000 tokens/s a GPU (at least 81 TFLOP/s): TOO SLOW, 11.5 GiB"
    log.write_text("much\nthe reason\n")
    assert gpu_moe.text(gpu_moe.report(gpu_moe.Case("x", recipe), [], log)) == "x: failed: the reason"


@pytest.mark.nightly
def test_on_the_cpu(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "m", "qwen3-moe")
    keys = ["--model.path", str(model), "--runtime.device", "cpu", "--data.sequence_length", "32"]
    keys += ["--model.overrides", "{}", "--adapter.rank", "8", "--moe.grouped", "true", "--precision.dtype", "fp32"]
    only = ["--only", "LoRA, BF16", "LoRA of attention"]
    code = gpu_moe.main([str(tmp_path / "out"), "--work", str(tmp_path / "work"), *only, "--steps", "3", *keys])
    experts, attention = json.loads((tmp_path / "out" / "gpu_moe.json").read_text())["rows"]
    assert code == 1 and not experts["reached"] and attention["reached"]  # a CPU is slower than two GPUs
    assert len(experts["losses"]) == 3 and experts["losses"][0] == attention["losses"][0]
    assert experts["losses"][2] != attention["losses"][2]
