"""A real trained model through Megatron-Core: the log-likelihood that transformers gives, at any layout."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from statistics import mean

import pytest
import torch

from mcore_swift import parallel
from mcore_swift.data.batch import MicroBatch
from mcore_swift.recipe import ParallelSection
from tests.distributed.harness import prepared, run_ranks

WINDOWS, LENGTH = 16, 1024
PUBLISHED = 2.45158  # nats a token: transformers in fp32 on the dequantized weights rounded to bf16 (perplexity 11.607)


def window_losses(folder: Path, layout: ParallelSection, windows: torch.Tensor) -> list[float]:
    """The mean negative log-likelihood of each window [n, length], scored alone. Runs in a rank."""
    from mcore_swift.models.build import build_chunks, read_source, tensor_rules, transformer_config
    from mcore_swift.objectives.registry import OBJECTIVES
    from mcore_swift.training.step import run_schedule, score_loss
    from mcore_swift.weights import live
    from mcore_swift.weights.safetensors_io import SafetensorsFolder

    platform, source = prepared(), read_source(folder)
    plan = parallel.resolve(layout, world_size=int(os.environ["WORLD_SIZE"]))
    parallel.initialize(plan, platform, seed=1)
    config = transformer_config(source, plan, platform, dtype=torch.float32)
    chunks = build_chunks(source, config, plan, platform)
    live.load(chunks, tensor_rules(source, config), SafetensorsFolder(folder), tied=source.tied)
    positions = torch.arange(LENGTH - 1)[None]
    batches = [
        MicroBatch(window[None, :-1], window[None, 1:], torch.ones(1, LENGTH - 1), positions) for window in windows
    ]
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():  # one micro-batch a window: the pipeline's stages work at the same time
        sums = run_schedule(chunks, batches, partial(score_loss, OBJECTIVES["sft"], {}), forward_only=True)
    return [float(window["loss"] / window["count"]) for window in sums]


@pytest.mark.parametrize(
    "number", [pytest.param(2, marks=pytest.mark.slow), pytest.param(WINDOWS, marks=pytest.mark.nightly)]
)
@pytest.mark.parametrize(
    "layout",
    [
        ParallelSection(sequence_parallel=False),
        pytest.param(ParallelSection(pp=2), marks=pytest.mark.nightly),
        # 9 heads, 3 key-value heads
        pytest.param(ParallelSection(tp=3, sequence_parallel=False), marks=pytest.mark.nightly),
    ],
    ids=["one rank", "PP2", "TP3"],
)
def test_wikipedia_log_likelihood(smollm2: Path, data_folder: Path, layout: ParallelSection, number: int) -> None:
    """Each of the first windows has transformers' value; all of them have the published mean."""
    from mcore_swift.data.tokenizer import load_tokenizer

    rows = (data_folder / "wikipedia_head.jsonl").read_text().splitlines()
    text = "".join(json.loads(row)["text"] for row in rows)
    ids = load_tokenizer(smollm2)(text)["input_ids"][: WINDOWS * LENGTH]
    windows = torch.tensor(ids).view(WINDOWS, LENGTH)
    golden = json.loads((data_folder / "smollm2_window_nll.json").read_text())  # transformers', each window
    ranks = run_ranks(window_losses, layout.tp * layout.pp, smollm2, layout, windows[:number], timeout=900)
    losses = next(losses for losses in reversed(ranks) if losses)  # the last stage has them
    assert losses == pytest.approx(golden[:number], abs=2e-5)
    assert mean(golden) == pytest.approx(PUBLISHED, abs=1e-5)
    if number == WINDOWS:
        assert round(mean(losses), 4) == round(PUBLISHED, 4)
        assert mean(losses) == pytest.approx(PUBLISHED, abs=1e-5)
