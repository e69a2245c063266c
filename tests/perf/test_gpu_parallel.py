"""The script that compares layouts of two GPUs with one: its recipes, its judgement, and a run on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from mcore_swift import parallel
from mcore_swift.models.build import check_layout, read_source
from mcore_swift.models.experts import check_experts
from mcore_swift.models.lever_rules import check_levers
from mcore_swift.recipe_checks import check_recipe
from mcore_swift.recipe_io import load_recipe
from perf import gpu_parallel
from perf.gpu_levers import NOTHING_SAVED
from tests.distributed.tiny_models import tiny_folder


@pytest.mark.parametrize("group", gpu_parallel.GROUPS, ids=lambda group: group.name)
def test_each_runs_recipe_is_allowed(group: gpu_parallel.Group, tmp_path: Path) -> None:
    for name, keys in gpu_parallel.runs(group).items():
        shape = [*group.model, "--model.init", "random", "--checkpoint.dir", str(tmp_path)]
        recipe = load_recipe(gpu_parallel.PARITY, [*shape, *keys, *NOTHING_SAVED])
        check_recipe(recipe)
        source = read_source(Path(recipe.model.path), overrides=recipe.model.overrides)
        plan = parallel.resolve(recipe.parallel, world_size=1 if name.startswith("one GPU") else 2)
        check_layout(source, plan)
        check_experts(source, plan, recipe.moe, device="cuda")
        check_levers(recipe, plan, source, on_cpu=False)


def test_the_other_rounding_says_what_is_far(tmp_path: Path) -> None:
    group = gpu_parallel.Group("x", [], {"near": [], "far": [], "failed": []})
    log = tmp_path / "log"
    log.write_text("much\nthe reason\n")
    losses = {"one GPU": [2.0, 1.0], "other": [2.0, 1.001], "near": [2.0, 1.019], "far": [2.0, 1.021], "failed": []}
    rows = gpu_parallel.report(group, {name: (values, log) for name, values in losses.items()})
    assert [row.get("same") for row in rows] == [True, True, False, None]
    assert gpu_parallel.text(rows[2]) == "x: far: 1.0210 of 1.0000, apart 2.1e-02, last ten 7.0e-03: ANOTHER LOSS"
    assert gpu_parallel.text(rows[3]) == "x: failed: failed: the reason"


@pytest.mark.nightly
def test_on_the_cpu(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "m", "qwen3-moe")
    layouts = {"EP2": gpu_parallel.EP2, "CP2": gpu_parallel.CP2["p2p"]}
    group = gpu_parallel.Group("x", ["--model.path", str(model)], layouts, elsewhere=gpu_parallel.ONE_BY_ONE)
    common = ["--runtime.device", "cpu", "--precision.dtype", "fp32", "--schedule.steps", "3"]
    common += ["--data.sequence_length", "64", "--data.train", "synthetic", "--data.format", "synthetic"]
    rows = gpu_parallel.measure([group], tmp_path / "work", at_once=2, limit=200, common=common)
    assert [row["run"] for row in rows] == ["x: one GPU, other rounding", "x: EP2", "x: CP2"]
    assert all(row["largest_relative_difference"] < 1e-5 for row in rows)
