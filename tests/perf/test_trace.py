"""The explanation of a traced step, of a trace whose times are known, and of one that torch wrote here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from perf import trace


def event(name: str, begin: float, duration: float, kind: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": kind, "name": name, "ts": begin, "dur": duration}


EVENTS = [
    event("nvjet_tst_128x256_64x4", 1000, 100),
    event("nvjet_tst_128x256_64x4", 1102, 98),  # 2 µs after the first
    event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 1150, 150),  # 50 beside a product, 100 alone
    event("Memcpy HtoD (Pageable -> Device)", 1500, 10, "gpu_memcpy"),  # 200 µs after the last
    event("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", 1510, 90),
    event("cudaLaunchKernel", 990, 5, "cuda_runtime"),
    event("cuLaunchKernelEx", 1100, 5, "cuda_driver"),
    event("cudaStreamSynchronize", 1200, 300, "cuda_runtime"),
    event("aten::mm", 980, 20, "cpu_op"),
    {"ph": "i", "name": "a mark", "ts": 0},
]


def written(folder: Path, content: object) -> Path:
    file = folder / "trace.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_times_of_a_known_trace(tmp_path: Path) -> None:
    found = trace.explain(trace.read(written(tmp_path, {"traceEvents": EVENTS})), top=1)
    assert found["span"] == 600 and found["busy"] == 398  # 100 + 98 + 100 + 10 + 90
    assert found["exposed"] == 100
    assert (found["idle_short"], found["idle_long"], found["long_gaps"], found["largest_gap"]) == (2, 200, 1, 200)
    assert (found["launches"], found["waiting"]) == (2, 300)
    assert found["kinds"] == {
        "matrix products": (198, 2),
        "communication": (150, 1),
        "copies": (10, 1),
        "attention": (90, 1),
    }
    assert found["kernels"] == [(198, 2, "nvjet_tst_128x256_64x4")]


def test_what_a_reader_gets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trace.main([str(written(tmp_path, {"traceEvents": EVENTS})), "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["busy", "0.40", "ms", "66.3", "%"]
    assert lines[-1].split() == ["0.15", "ms", "1", "×", "150.0", "µs", "ncclDevKernel_AllReduce_Sum_f32_RING_LL"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("no JSON", "not a trace that torch's profiler wrote"),
        ([], "not a trace that torch's profiler wrote"),
        ({"traceEvents": [3]}, "not a trace that torch's profiler wrote"),
        ({"traceEvents": EVENTS[-2:]}, "no GPU's kernels are in it"),
        (None, "can't be read"),
    ],
)
def test_what_is_no_trace_of_a_gpu(
    content: object, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "none.json" if content is None else written(tmp_path, content)
    assert trace.main([str(file)]) == 2
    assert f"perf.trace: error: {file}: {words}" in capsys.readouterr().err


def test_torchs_own_format(tmp_path: Path) -> None:
    with torch.profiler.profile() as profile:
        torch.mm(torch.ones(8, 8), torch.ones(8, 8))
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    assert any(event["name"] == "aten::mm" for event in trace.read(tmp_path / "trace.json"))
