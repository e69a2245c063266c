"""The guide's second step for real: DPO teaches SmolLM2 to tell right answers from wrong ones that it has not seen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mcore_swift.training.metrics import read_metrics
from perf.rewards import implicit_reward, of_pairs

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"


@pytest.mark.nightly
def test_dpo_of_a_real_model(smollm2: Path, tmp_path: Path) -> None:
    """Ten minutes on two cores. The accuracy on held-out pairs, from transformers and PEFT on the exported adapter, is
    above 0.6, and it is the one that the run itself reports."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "mcore_swift.cli", "train", str(RECIPES / "smollm2_dpo.yaml")]
    command += ["--model.path", str(smollm2), "--checkpoint.dir", str(run), "--data.cache_dir", str(tmp_path / "cache")]
    subprocess.run(command, check=True)
    evaluated = read_metrics(run / "metrics.jsonl")[-1]

    held_out = (RECIPES / "data" / "gsm8k_preference_held_out.jsonl").read_text(encoding="utf-8").splitlines()
    found = of_pairs([json.loads(row) for row in held_out], implicit_reward(smollm2, run / "adapter", beta=0.1))
    assert found["accuracy"][0] > 0.6
    assert found["accuracy"][0] == pytest.approx(evaluated["eval_accuracy"], abs=1.5 / len(held_out))
    assert found["margin"][0] == pytest.approx(evaluated["eval_margin"], rel=1e-3)
