"""The DPO script's own path: its recipes, its rows, its report, and all of it on the CPU with a tiny model."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mcore_swift.data.packing import best_fit_decreasing
from mcore_swift.recipe_checks import check_recipe
from mcore_swift.recipe_io import load_recipe
from perf import gpu_dpo
from perf.gpu_levers import NOTHING_SAVED
from perf.gpu_spine import execute
from tests.distributed.tiny_models import tiny_folder

OURS = [case for case in gpu_dpo.CASES if not case.name.startswith("trl")]


@pytest.mark.parametrize("case", OURS, ids=lambda case: case.name)
def test_each_cases_recipe_is_allowed(case: gpu_dpo.Case, tmp_path: Path) -> None:
    check_recipe(load_recipe(gpu_dpo.RECIPE, [*NOTHING_SAVED, *case.keys, "--checkpoint.dir", str(tmp_path)]))


def test_rows_fill_the_same_packs_for_sft_and_dpo(tmp_path: Path) -> None:
    lengths = gpu_dpo.draw(4, 4096)
    documents = lengths[:, :1] + lengths[:, 1:]
    assert 0.95 * 4 * 4096 <= gpu_dpo.tokens_of(lengths) == documents.sum() <= 4 * 4096
    assert documents.min() > 300 and documents.max() < 1200
    for packed in (documents.sum(1), documents.reshape(-1)):
        assert len(best_fit_decreasing(packed, 4096)[0]) - 1 == 4
    gpu_dpo.write_rows(tmp_path, lengths, words=50)
    pairs, answers = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("pairs", "answers")
    )
    counts = [[len(row[name].split()) for name in ("prompt", "chosen", "rejected")] for row in pairs]
    np.testing.assert_array_equal(np.array(counts) + np.array([0, 1, 1]), lengths)  # EOS behind the answers
    assert [row["prompt"] + row["response"] for row in answers] == [
        row["prompt"] + row[side] for row in pairs for side in ("chosen", "rejected")
    ]


def row(name: str, seconds: float, **more: Any) -> dict[str, Any]:
    found = {"run": name, "title": name.upper(), "seconds": seconds, "tokens_per_second": 1000 / seconds}
    return {**found, "memory_gib": 40.0, **more}


def test_what_is_reported() -> None:
    trl = {"pairs_in_a_pass": 3, "padding": 0.25, "liger": True}
    rows = [
        row("sft", 1.0),
        row("dpo", 1.39, memory_gib=43.5),
        row("precomputed", 1.06, reference_seconds=2.0),
        {"run": "fp8", "title": "FP8", "failed": True, "reason": "stopped"},
        row("trl", 2.3, **trl),
    ]
    found = gpu_dpo.compared(rows)
    assert [one["misses"] for one in found] == [[], ["gib_over_sft", "speed_of_trl"], ["time_of_sft"], [], []]
    assert found[1]["time_of_sft"] == pytest.approx(1.39) and found[1]["speed_of_trl"] == pytest.approx(2.3 / 1.39)
    assert gpu_dpo.table(found).splitlines()[2:] == [
        "| SFT | 1.000 | 1,000 |  | 40.00 | 2.30 |  |",
        "| DPO | 1.390 | 719 | 1.390 | 43.50 (+3.50) | 1.65 | MISSED: gib_over_sft, speed_of_trl |",
        "| PRECOMPUTED | 1.060 | 943 | 1.060 | 40.00 (+0.00) | 2.17 | MISSED: time_of_sft; reference beforehand: "
        "2.0 s, compilation included |",
        "| FP8 | | | | | | failed: stopped |",
        "| TRL | 2.300 | 435 |  | 40.00 |  | 3 pairs a pass, 25 % padding, Liger |",
    ]
    assert gpu_dpo.compared(rows[1:2])[0]["misses"] == []  # nothing to compare with


def test_a_run_that_takes_too_long_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys, time; subprocess.Popen(['sleep', '30']); print('begun', flush=True); time.sleep(30)"
    )
    begin = time.monotonic()
    assert execute([sys.executable, "-c", script], tmp_path / "log", limit=1) == 124
    assert time.monotonic() - begin < 10
    assert gpu_dpo.failure(tmp_path / "log") == {"failed": True, "reason": "stopped after 1 s"}
    assert execute([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log", limit=30) == 3


@pytest.mark.nightly
def test_on_the_cpu(tmp_path: Path) -> None:
    """All runs but FP8: ours and TRL's see the same tokens, and begin at the same loss."""
    model = tiny_folder(tmp_path / "m", "qwen3", hidden_size=128, intermediate_size=192, head_dim=32)
    keys = ["--model.path", str(model), "--runtime.device", "cpu", "--data.sequence_length", "256"]
    only = ["--only", "sft", "dpo", "precomputed", "trl"]
    gpu_dpo.main([str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--steps", "3", *only, *keys])
    found = json.loads((tmp_path / "out" / "gpu_dpo.json").read_text())
    sft, dpo, precomputed, trl = found["rows"]
    assert not any("failed" in row for row in found["rows"]), found["rows"]
    for run in (sft, dpo, precomputed):
        assert run["labels"] == [found["labels"]] and run["positions"] == [4 * 256]
    assert trl["tokens"] == found["tokens"] and len(trl["step_seconds"]) == 3
    for run in (dpo, precomputed, trl):
        assert run["losses"][0] == pytest.approx(math.log(2), abs=1e-4)
    assert precomputed["reference_seconds"] > 0 and dpo["reference_seconds"] is None
