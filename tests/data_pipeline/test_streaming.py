"""Streams: exact resume, layout independence, whole epochs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_swift.data import streaming
from mcore_swift.data.batch import MicroBatch
from mcore_swift.data.loader import LoaderShape, build_loaders
from mcore_swift.errors import InputError
from mcore_swift.recipe import DataSection


@pytest.fixture
def stream(
    section: Callable[..., DataSection],
    make_shape: Callable[..., LoaderShape],
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Any]:
    """A loader over the fixtures in blocks of 7 rows: 3 files, many blocks, several epochs in a few steps."""
    real = streaming.StreamReader
    monkeypatch.setattr(streaming, "StreamReader", lambda *a, **k: real(*a, block_rows=7, **k))

    def make(*files: Any, packing: bool = True, shuffle: bool = True, **shape: int) -> Any:
        data = section(
            *(files or ("chat.jsonl", "pairs.jsonl", "text.jsonl")), streaming=True, packing=packing, shuffle=shuffle
        )
        return build_loaders(data, shape=make_shape(**shape), tokenizer=tokenizer, seed=1, vocab_size=600)[0]

    return make


def equal(a: list[MicroBatch], b: list[MicroBatch]) -> bool:
    return all(
        torch.equal(x.tokens, y.tokens) and torch.equal(x.loss_mask, y.loss_mask) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("packing", [True, False])
def test_a_resumed_stream_goes_on_bit_identically(stream: Callable[..., Any], packing: bool):
    whole = stream(packing=packing)
    steps, states = [], []
    for step in range(30):
        states.append(json.loads(json.dumps(whole.state_dict())))
        steps.append(whole.micro_batches(step))
    assert len({state["place"]["epoch"] for state in states}) > 1
    for start in (0, 1, 5, 13, 29):
        resumed = stream(packing=packing)
        resumed.load_state_dict(states[start])
        assert all(equal(resumed.micro_batches(step), steps[step]) for step in range(start, 30))


def test_a_used_loader_can_be_put_back(stream: Callable[..., Any]):
    loader = stream()
    state = loader.state_dict()
    first = [loader.micro_batches(step) for step in range(6)]
    loader.load_state_dict(state)
    assert all(equal(loader.micro_batches(step), first[step]) for step in range(6))


def test_ranks_share_each_step_without_overlap(stream: Callable[..., Any]):
    whole = stream(micro_batch_size=1)
    ranks = [stream(dp_size=2, dp_rank=rank, micro_batch_size=2) for rank in range(2)]
    for step in range(8):
        expected = torch.cat([batch.tokens.flatten() for batch in whole.micro_batches(step)])
        found = torch.cat([batch.tokens.flatten() for rank in ranks for batch in rank.micro_batches(step)])
        assert torch.equal(found, expected)


def test_an_epoch_holds_every_row_once(stream: Callable[..., Any]):
    loader = stream("chat.jsonl", packing=False, shuffle=True, global_batch_size=12)
    epochs = [loader.micro_batches(step) for step in range(3)]
    rows = [Counter(int(batch.tokens.sum()) for batch in epoch) for epoch in epochs]
    assert rows[0] == rows[1] == rows[2] and len(rows[0]) == 12
    orders = {tuple(int(batch.tokens.sum()) for batch in epoch) for epoch in epochs}
    assert len(orders) == 3
    assert loader.samples_per_epoch is None and loader.report()["rows"] >= 36


def test_steps_go_forward_only(stream: Callable[..., Any]):
    with pytest.raises(ValueError, match="step 0 is next, 3 was asked for"):
        stream().micro_batches(3)


def test_other_data_or_batch_size_can_not_be_resumed(stream: Callable[..., Any]):
    state = stream().state_dict()
    with pytest.raises(InputError, match="the training data"):
        stream("chat.jsonl").load_state_dict(state)
    with pytest.raises(InputError, match=r"global_batch_size changed: 4 there, 8 here"):
        stream(global_batch_size=8).load_state_dict(state)


def test_a_bad_row_is_reported_with_its_line(stream: Callable[..., Any], jsonl: Callable[..., Path]):
    rows = [{"text": "fine"}] * 9
    with pytest.raises(InputError, match=r"rows\.jsonl:11: text is empty"):
        loader = stream(jsonl(*rows, "", {"text": ""}), packing=False)
        for step in range(3):
            loader.micro_batches(step)


def test_an_empty_stream_is_refused(stream: Callable[..., Any], jsonl: Callable[..., Path]):
    with pytest.raises(InputError, match="no rows"):
        stream(jsonl())
