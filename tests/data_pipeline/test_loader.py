"""Loaders from files: order, layout independence, cache, validation, synthetic data."""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_swift.data import tokenized
from mcore_swift.data.batch import MicroBatch
from mcore_swift.data.loader import LoaderShape, build_loaders
from mcore_swift.data.tokenized import tokenize_files
from mcore_swift.errors import InputError
from mcore_swift.recipe import DataSection, SourceSection

Build = Callable[..., Any]


@pytest.fixture
def build(tokenizer: Any) -> Build:
    def make(data: DataSection, shape: LoaderShape, **settings: Any) -> Any:
        return build_loaders(data, shape=shape, **({"tokenizer": tokenizer, "seed": 1, "vocab_size": 600} | settings))

    return make


def documents(batches: list[MicroBatch]) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """(tokens, loss mask) of each document that has a loss, sorted."""
    found = []
    for batch in batches:
        if batch.cu_seqlens is None:
            rows = [(batch.tokens[i], batch.loss_mask[i]) for i in range(len(batch.tokens))]
        else:
            ends = batch.cu_seqlens.tolist()
            rows = [(batch.tokens[0, a:b], batch.loss_mask[0, a:b]) for a, b in itertools.pairwise(ends)]
        for tokens, mask in rows:
            if mask.any():
                last = int(mask.nonzero().max()) + 2  # right padding of unpacked rows left out
                found.append((tuple(tokens[:last].tolist()), tuple(mask[:last].tolist())))
    return sorted(found)


def same(a: MicroBatch, b: MicroBatch) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


@pytest.mark.parametrize("packing", [True, False])
def test_a_step_holds_the_same_samples_at_every_layout(
    build: Build, section: Callable[..., DataSection], make_shape: Callable[..., LoaderShape], packing: bool
):
    data = section("chat.jsonl", "pairs.jsonl", packing=packing)

    def step(number: int, dp_size: int, micro_batch_size: int) -> Any:
        found = []
        for rank in range(dp_size):
            shape = make_shape(dp_size=dp_size, dp_rank=rank, micro_batch_size=micro_batch_size)
            batches = build(data, shape)[0].micro_batches(number)
            assert len(batches) == 4 // (dp_size * micro_batch_size)
            found += batches
        return documents(found)

    for number in (0, 1, 7):
        assert step(number, 1, 1) == step(number, 2, 1) == step(number, 2, 2) == step(number, 1, 4)


def test_each_epoch_holds_every_row_once_in_another_order(
    build: Build, section: Callable[..., DataSection], make_shape: Callable[..., LoaderShape]
):
    train, _ = build(section("chat.jsonl", packing=False), make_shape(global_batch_size=5))
    assert train.samples_per_epoch == 12
    batches = [batch for step in range(12) for batch in train.micro_batches(step)]  # 60 rows are 5 epochs
    epochs = [batches[i : i + 12] for i in range(0, 60, 12)]
    assert all(documents(epoch) == documents(epochs[0]) for epoch in epochs)
    assert len({tuple(batch.tokens[0].tolist()) for batch in epochs[0]}) == 12
    orders = {tuple(int(batch.tokens.sum()) for batch in epoch) for epoch in epochs}
    assert len(orders) == 5


def test_packed_and_unpacked_hold_the_same_documents(
    build: Build, section: Callable[..., DataSection], make_shape: Callable[..., LoaderShape]
):
    data = section("chat.jsonl", "pairs.jsonl", shuffle=False)
    packed, _ = build(data, make_shape(global_batch_size=1))
    rows, _ = build(replace(data, packing=False), make_shape(global_batch_size=1))
    assert packed.samples_per_epoch < rows.samples_per_epoch == 32
    a = [batch for step in range(packed.samples_per_epoch) for batch in packed.micro_batches(step)]
    b = [batch for step in range(32) for batch in rows.micro_batches(step)]
    assert documents(a) == documents(b) and len(documents(a)) == 32


def test_report_counts(build: Build, section: Callable[..., DataSection], make_shape: Callable[..., LoaderShape]):
    report = build(section("text.jsonl", sequence_length=128), make_shape(sequence_length=128))[0].report()
    assert report["rows"] == 40 and report["split"] > 0 and report["packing_efficiency"] > 0.96
    assert report["tokens"] == pytest.approx(report["packing_efficiency"] * report["samples"] * 128)


def test_the_cache_is_reused_until_something_changes(
    build: Build,
    section: Callable[..., DataSection],
    make_shape: Callable[..., LoaderShape],
    jsonl: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    caplog.set_level(logging.INFO, logger="mcore_swift")
    file = jsonl({"text": "one two"}, {"text": "three"})
    first = build(section(file), make_shape())[0].micro_batches(0)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "datasets", None)  # a second run doesn't even open the rows
        second = build(section(file), make_shape())[0]
        longer = build(section(file, sequence_length=64), make_shape(sequence_length=64))[0]
    assert all(same(a, b) for a, b in zip(first, second.micro_batches(0), strict=True))
    assert second.report()["cache_reused"] and longer.report()["cache_reused"] and "reused" in caplog.text
    jsonl({"text": "one two"}, {"text": "threE"})  # same size
    changed = build(section(file), make_shape())[0]
    assert not changed.report()["cache_reused"]
    with pytest.raises(InputError, match="the checkpoint's data position can't be continued, the training data"):
        changed.load_state_dict(second.state_dict())
    changed.load_state_dict(json.loads(json.dumps(changed.state_dict())))


def test_processes_that_race_for_the_cache_agree(
    tokenizer: Any, fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    build = tokenized._build

    def slow_build(*args: Any, **settings: Any) -> int:
        time.sleep(0.5)  # long enough for every process to find that the entry is not there yet
        return build(*args, **settings)

    monkeypatch.setattr(tokenized, "_build", slow_build)
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()

    def work() -> None:
        rows = tokenize_files(
            [fixtures / "chat.jsonl"], tokenizer=tokenizer, format="auto", cache_dir=tmp_path / "cache"
        )
        results.put((rows.seconds > 0, len(rows), hash(rows.tokens.tobytes() + rows.loss.tobytes())))

    processes = [fork.Process(target=work) for _ in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=100) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(built for built, _, _ in found) == [False, False, False, True]
    assert {rows for _, rows, _ in found} == {12} and len({content for _, _, content in found}) == 1
    assert sorted(path.suffix for path in (tmp_path / "cache" / "tokenized").iterdir()) == ["", ".lock"]


def test_validation_split_is_disjoint_and_each_sample_comes_once(
    build: Build, section: Callable[..., DataSection], make_shape: Callable[..., LoaderShape]
):
    data = section("chat.jsonl", validation_split=0.4, packing=False)
    whole, _ = build(replace(data, validation_split=0.0), make_shape(global_batch_size=12))
    found = {"train": [], "validation": []}
    for rank in range(2):
        shape = make_shape(dp_size=2, dp_rank=rank)
        train, validation = build(data, shape)
        assert train.samples_per_epoch == 7 and validation.num_samples == 5
        batches = list(validation.batches())
        assert [len(batch) for batch in batches] == [2, 2]  # 5 samples in 2 global batches of 4 on 2 ranks
        found["validation"] += [batch for batches in batches for batch in batches]
        found["train"] += [batch for step in range(7) for batch in train.micro_batches(step)]  # 28 rows: 4 epochs
    train, validation = documents(found["train"]), documents(found["validation"])
    assert len(validation) == 5 and len(train) == 28 and not set(train) & set(validation)
    assert sorted({*train, *validation}) == sorted(set(documents(whole.micro_batches(0))))


def test_validation_sources_of_their_own(
    build: Build, section: Callable[..., DataSection], make_shape: Callable[..., LoaderShape], fixtures: Path
):
    data = replace(section("chat.jsonl"), validation=[SourceSection(path=str(fixtures / "pairs.jsonl"))])
    _, validation = build(data, make_shape())
    held = [batch for batches in validation.batches() for batch in batches]
    assert len(documents(held)) == 20


def test_json_parquet_and_folders_give_what_jsonl_gives(
    build: Build,
    section: Callable[..., DataSection],
    make_shape: Callable[..., LoaderShape],
    fixtures: Path,
    tmp_path: Path,
):
    from datasets import Dataset

    rows = [json.loads(line) for line in (fixtures / "chat.jsonl").open()]
    folder = tmp_path / "folder [1]"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps(rows[:5], indent=1))
    Dataset.from_list(rows[5:]).to_parquet(folder / "b.parquet")
    a = build(section("chat.jsonl", shuffle=False), make_shape())[0].micro_batches(0)
    b = build(section(folder, shuffle=False), make_shape())[0].micro_batches(0)
    assert all(same(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("packing", [True, False])
def test_synthetic_data_need_no_files_and_no_datasets(
    make_shape: Callable[..., LoaderShape], monkeypatch: pytest.MonkeyPatch, packing: bool
):
    monkeypatch.setitem(sys.modules, "datasets", None)
    data = DataSection(train=[SourceSection(path="synthetic")], format="synthetic", sequence_length=16, packing=packing)

    def loader(**settings: int) -> Any:
        shape = make_shape(sequence_length=16, **settings)
        return build_loaders(data, shape=shape, tokenizer=None, seed=1, vocab_size=50)[0]

    whole = loader(micro_batch_size=4).micro_batches(3)[0]
    parts = [loader(dp_size=2, dp_rank=rank, micro_batch_size=2).micro_batches(3)[0] for rank in range(2)]
    assert torch.equal(whole.tokens.flatten(), torch.cat([part.tokens.flatten() for part in parts]))
    assert whole.tokens.shape == ((1, 64) if packing else (4, 16)) and whole.loss_mask.all()
    rows, labels = whole.tokens.reshape(4, 16), whole.labels.reshape(4, 16)
    assert torch.equal(rows[:, 1:], labels[:, :-1]) and int(rows.max()) < 50
    assert loader().samples_per_epoch is None
