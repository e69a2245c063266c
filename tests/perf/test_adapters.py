"""What a run of adapters is planned to hold, against the modules that hold it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mcore_swift import parallel
from mcore_swift.cli import main
from mcore_swift.models.build import read_source
from mcore_swift.models.stages import pipeline_layout
from mcore_swift.recipe import AdapterSection, ParallelSection, Recipe
from mcore_swift.training.adapters import settings_of
from perf.adapters import SCALE_BYTES, adapted_stages
from tests.distributed.harness import prepared, run_ranks
from tests.distributed.rank_model import open_model, recipe_for
from tests.distributed.tiny_models import tiny_folder

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "moe_intermediate_size": 128}


def held_rank(recipe: Recipe) -> tuple[int, int, int, int]:
    """This rank's stage, its parameters that are trained, and numbers and bytes of what is in four bits."""
    from mcore_swift.peft import quantized

    model = open_model(recipe)
    trained = sum(p.numel() for chunk in model.chunks for p in chunk.parameters() if p.requires_grad)
    weights: list[Any] = [whole.__self__ for whole in quantized.values(model.chunks).values()]  # type: ignore[attr-defined]
    numbers = sum(weight.site.weight.numel() for weight in weights)
    return parallel.ranks().pp, trained, numbers, sum(weight.nbytes for weight in weights)


@pytest.mark.parametrize(
    ("variant", "layout", "keys"),
    [
        pytest.param("qwen2-tied", ParallelSection(tp=2, pp=2), {"dora": True}, marks=pytest.mark.slow),
        pytest.param(
            "qwen3-moe",
            ParallelSection(ep=2, dp=2),
            {"modules_to_save": ["lm_head", "norm"]},
            marks=pytest.mark.nightly,
        ),
        pytest.param("qwen3-moe", ParallelSection(ep=2, tp=2, dp=2), {"share_a": True}, marks=pytest.mark.nightly),
    ],
)
def test_formula_counts_what_is_held(
    tmp_path: Path, variant: str, layout: ParallelSection, keys: dict[str, Any]
) -> None:
    prepared()
    sizes = SIZES if variant == "qwen3-moe" else {key: SIZES[key] for key in ("hidden_size", "intermediate_size")}
    folder = tiny_folder(tmp_path / variant, variant, **sizes)
    targets = ["q_proj", "o_proj", "mlp"] + (["experts"] if variant == "qwen3-moe" else [])
    section = AdapterSection(name="lora", rank=4, targets=targets, quantization="nf4", **keys)
    plan, source = parallel.resolve(layout, world_size=None), read_source(folder)
    settings, _ = settings_of(section, seed=0)
    stages = adapted_stages(source, plan, pipeline_layout(source, plan), settings, targets, layers="torch")
    recipe = recipe_for(folder, layout, adapter=section)
    for stage, trained, numbers, held in run_ranks(held_rank, plan.world_size, recipe):
        assert (trained, numbers) == (stages[stage].trained.total, stages[stage].linear)
        assert numbers * (0.5 + SCALE_BYTES[True]) <= held < 1.02 * numbers * (0.5 + SCALE_BYTES[True])


def test_qwen_8b_in_four_bits(capsys: pytest.CaptureFixture[str]) -> None:
    def stage(*words: str) -> Any:
        assert main(["plan", str(RECIPES / "bench_qlora.yaml"), "--gpus", "1", "--json", *words]) == 0
        return json.loads(capsys.readouterr().out)["stages"][0]

    four, plain = stage(), stage("--adapter.quantization", "none")
    linear = 36 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 12_288)
    trained = 36 * 16 * (3 * 4096 + 4096 + 2 * 1024 + 2 * 4096 + 3 * (4096 + 12_288))
    assert four["parameters"]["dense"] == plain["parameters"]["dense"] == 8_190_735_360
    assert plain["bytes"]["weights"] == 2 * (8_190_735_360 + trained)
    assert four["bytes"]["weights"] == pytest.approx(
        plain["bytes"]["weights"] - (1.5 - 65 / 64 / 64) * linear, rel=1e-6
    )
    for found in (four, plain):
        assert (found["bytes"]["gradients"], found["bytes"]["optimizer"]) == (4 * trained, 12 * trained)
