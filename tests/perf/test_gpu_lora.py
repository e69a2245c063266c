"""What perf.gpu_lora makes of its runs; the runs themselves need a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from perf import peft_liger
from perf.gpu_lora import CASES, judged, text
from tests.distributed.tiny_models import tiny_folder

BF16 = CASES[0]
GOOD = {"run": "BF16", "tokens_per_second": 15_000.0, "peak_gib": 35.0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "BF16: 15,000 tokens/s, 35.0 GiB"),
        ({"tokens_per_second": 14_000.0}, "BF16: 14,000 tokens/s, 35.0 GiB: TOO SLOW, at least 14,500"),
        ({"peak_gib": 36.5}, "BF16: 15,000 tokens/s, 36.5 GiB: TOO LARGE, at most 36 GiB"),
    ],
)
def test_bounds(changes: dict[str, float], words: str) -> None:
    row = judged(BF16, GOOD | changes)
    assert text(row) == words
    assert (row["fast"] and row["small"]) == (not changes)


def test_a_failed_run_is_told_with_its_reason() -> None:
    assert text(judged(BF16, {"run": "BF16", "failed": True, "reason": "no GPU"})) == "BF16: failed: no GPU"


def test_the_other_stack_runs_here(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "qwen3", "qwen3")
    words = [str(folder), "--length", "16", "--micro-batches", "2", "--steps", "3", "--rank", "2"]
    assert peft_liger.main(words) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith('PEFT {"tokens_per_second": ')
