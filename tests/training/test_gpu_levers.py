"""The GPU script's own path, on the CPU with a tiny model: a lever that runs, one that is refused, one left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mcore_swift.recipe_checks import check_recipe
from mcore_swift.recipe_io import load_recipe
from perf import gpu_levers
from tests.distributed.tiny_models import tiny_folder

SYNTHETIC = (
    "model: {path: m, init: random}\n"
    "data: {train: synthetic, format: synthetic, packing: false, sequence_length: 32}\n"
    "schedule: {steps: 3, global_batch_size: 4, learning_rate: 1.0e-3}\n"
    "logging: {tensorboard: false}\n"
)


@pytest.mark.parametrize("lever", gpu_levers.LEVERS, ids=lambda lever: lever.name)
def test_each_levers_recipe_is_allowed(lever: gpu_levers.Lever, tmp_path: Path) -> None:
    words = [*(gpu_levers.MOE if lever.moe else ()), *gpu_levers.NOTHING_SAVED, *lever.shared, *lever.keys]
    check_recipe(load_recipe(gpu_levers.DENSE, [*words, "--checkpoint.dir", str(tmp_path)]))


def test_what_is_reported(tmp_path: Path) -> None:
    def rows(*values: float) -> list[dict[str, float]]:
        return [{"loss": value, "memory_gib": 2.0, "tokens_per_second_per_gpu": 5.0} for value in values]

    lever = gpu_levers.Lever("x", [])
    same = gpu_levers.report(lever, rows(3.0, 2.0, 1.0001), rows(3.0, 2.0, 1.0), tmp_path / "log")
    assert same["loss_is_the_same"] and same["memory_gib"] == 2.0 and "the same loss" in gpu_levers.text(same)
    other = gpu_levers.report(lever, rows(3.0, 2.0, 1.1), rows(3.0, 2.0, 1.0), tmp_path / "log")
    assert "ANOTHER LOSS, difference 1.0e-01" in gpu_levers.text(other)
    (tmp_path / "log").write_text("much\nthe reason\n")
    assert gpu_levers.text(gpu_levers.report(lever, [], rows(1.0), tmp_path / "log")) == "x: failed: the reason"


@pytest.mark.nightly
def test_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(SYNTHETIC)
    tiny_folder(tmp_path / "m", "qwen3")
    out, only = tmp_path / "out", ["recompute full", "offload layers", "no overlap"]
    words = [str(out), "--only", *only, "--gpus", "0", "--steps", "3", "--work", str(tmp_path / "work")]
    code = gpu_levers.main([*words, "--recipe", str(tmp_path / "recipe.yaml"), "--runtime.device", "cpu"])
    assert code == 0
    report = json.loads((out / "gpu_levers.json").read_text())
    ran, refused = report["rows"]
    assert ran["loss_is_the_same"] and ran["largest_relative_difference"] == 0 and len(ran["losses"]) == 3
    assert "runtime.offload_layers" in refused["reason"] and report["left_out"] == ["no overlap"]
    assert "left out, for want of GPUs: no overlap" in capsys.readouterr().out
