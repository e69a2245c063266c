"""Experts in a running model: byte-equal at any layout of theirs, and each rank reads only its own ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mcore_swift.recipe import ParallelSection
from tests.distributed.harness import run_ranks
from tests.distributed.tiny_models import tiny_folder
from tests.weights.test_live import assert_same_tensors, load_and_export, ranks_of

LAYOUTS = {
    "EP2": ParallelSection(ep=2, dp=2),
    "EP4": ParallelSection(ep=4, dp=4),
    "EP2xTP2xETP2": ParallelSection(ep=2, tp=2, dp=2),
    "EP2xTP2xETP1": ParallelSection(ep=2, tp=2, etp=1),
    "EP2xPP2xVPP2": ParallelSection(ep=2, pp=2, vpp=2, dp=2),
}
SLOW = {("glm4-moe", "EP2xTP2xETP1"), ("mixtral", "EP2xPP2xVPP2"), ("qwen2-moe", "EP2xTP2xETP2")}


@pytest.mark.parametrize(
    ("variant", "layout"),
    [
        pytest.param(v, la, marks=pytest.mark.slow if (v, la) in SLOW else pytest.mark.nightly, id=f"{v}-{la}")
        for v in ("qwen3-moe", "mixtral", "qwen2-moe", "glm4-moe")
        for la in LAYOUTS
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_round_trip_is_byte_equal(tmp_path: Path, variant: str, layout: str, dtype: torch.dtype) -> None:
    folder, out = tiny_folder(tmp_path / "model", variant, dtype=dtype), tmp_path / "out"
    section = LAYOUTS[layout]
    read = run_ranks(load_and_export, ranks_of(section), folder, out, section, dtype, 10**9)
    assert_same_tensors(out, folder)
    for bytes_read, own in read:
        assert own / 1.1 <= bytes_read <= 1.1 * own
