"""Indexed corpora: what is written, and how blends are read back through the loader."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mcore_swift.data.indexed import prepare
from mcore_swift.data.loader import LoaderShape, build_loaders
from mcore_swift.errors import InputError
from mcore_swift.recipe import DataSection, SourceSection

LENGTH = 32


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> list[str]:
    """Two indexed corpora that can be told apart: letters a… and letters z…."""
    from mcore_swift.data.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("indexed")
    tokenizer = load_tokenizer(tokenizer_folder)
    for letter, rows in (("a", 60), ("z", 20)):
        texts = [{"text": " ".join([letter] * (5 + i % 40))} for i in range(rows)]
        (folder / f"{letter}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
        prepare([folder / f"{letter}.jsonl"], folder / letter, tokenizer=tokenizer)
    return [str(folder / letter) for letter in "az"]


@pytest.fixture
def indexed(tmp_path: Path, tokenizer: Any, make_shape: Callable[..., LoaderShape]) -> Callable[..., Any]:
    def make(*sources: SourceSection, shape: dict[str, int] | None = None, **settings: Any) -> Any:
        settings = {"sequence_length": LENGTH, "cache_dir": str(tmp_path / "cache"), "packing": False} | settings
        vocab_size = settings.pop("vocab_size", 600)
        return build_loaders(
            DataSection(train=list(sources), **settings),
            shape=make_shape(sequence_length=LENGTH, **(shape or {})),
            tokenizer=tokenizer,
            seed=1,
            vocab_size=vocab_size,
        )

    return make


def test_prepare_writes_what_megatron_reads(tokenizer: Any, fixtures: Path, tmp_path: Path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    counts = prepare([fixtures / "text.jsonl"], tmp_path / "one", tokenizer=tokenizer)
    prepare([fixtures / "text.jsonl"], tmp_path / "two", tokenizer=tokenizer, workers=2)
    texts = [json.loads(line)["text"] for line in (fixtures / "text.jsonl").open()]
    written: Any = IndexedDataset(str(tmp_path / "one"))
    expected = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    assert [written[i].tolist() for i in range(len(written))] == expected
    assert written[0].dtype == np.uint16 and written.document_indices.tolist() == list(range(41))
    assert counts["documents"] == 40 and counts["tokens"] == sum(map(len, expected))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()
    assert len(list(tmp_path.iterdir())) == 4


def test_prepare_refuses_and_leaves_nothing(tokenizer: Any, fixtures: Path, tmp_path: Path, jsonl: Callable[..., Path]):
    rows = jsonl({"text": "fine"}, {"text": ""})
    with pytest.raises(InputError, match=r"rows\.jsonl:2: text is empty"):
        prepare([rows], tmp_path / "out", tokenizer=tokenizer)
    with pytest.raises(InputError, match="needed text"):
        prepare([fixtures / "chat.jsonl"], tmp_path / "out", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == [rows]
    (tmp_path / "out.bin").touch()
    with pytest.raises(InputError, match=r"out\.bin: exists already"):
        prepare([fixtures / "text.jsonl"], tmp_path / "out", tokenizer=tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no EOS token"):
        prepare([fixtures / "text.jsonl"], tmp_path / "other", tokenizer=tokenizer)


def test_a_blend_keeps_its_weights(indexed: Callable[..., Any], corpora: list[str], tokenizer: Any):
    sources = [SourceSection(path=corpora[0], weight=1.0), SourceSection(path=corpora[1], weight=3.0)]
    train, validation = indexed(*sources, shape={"global_batch_size": 8, "micro_batch_size": 4})
    assert validation is None and train.samples_per_epoch > 100
    z = tokenizer("a z")["input_ids"][-1]
    batches = [batch for step in range(5) for batch in train.micro_batches(step)]
    assert batches[0].tokens.shape == (4, LENGTH) and batches[0].cu_seqlens is None
    from_z = sum(int((batch.tokens == z).any(dim=1).sum()) for batch in batches)
    assert abs(from_z / 40 - 0.75) < 0.03
    for batch in batches:
        assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1]) and batch.loss_mask.all()
        assert batch.position_ids.tolist() == [list(range(LENGTH))] * 4


def test_an_epoch_sees_each_token_of_the_longest_source(indexed: Callable[..., Any], corpora: list[str]):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    train, _ = indexed(SourceSection(path=corpora[0]), shape={"global_batch_size": 1})
    corpus = IndexedDataset(corpora[0])
    tokens = int(corpus.sequence_lengths.sum())
    assert train.samples_per_epoch == (tokens - 1) // LENGTH
    first = [train.micro_batches(step)[0].tokens for step in range(train.samples_per_epoch)]
    again = [train.micro_batches(train.samples_per_epoch + step)[0].tokens for step in range(train.samples_per_epoch)]
    assert sorted(map(repr, first)) == sorted(map(repr, again))


def test_packing_keeps_documents_apart(indexed: Callable[..., Any], corpora: list[str], tokenizer: Any):
    train, _ = indexed(
        SourceSection(path=corpora[0]), packing=True, shape={"global_batch_size": 4, "micro_batch_size": 2}
    )
    for batch in train.micro_batches(0) + train.micro_batches(1):
        ends = batch.cu_seqlens.tolist()
        assert batch.tokens.shape == (1, 2 * LENGTH) and ends[0] == 0 and ends[-1] == 2 * LENGTH and LENGTH in ends
        eods = (batch.tokens[0] == tokenizer.eos_token_id).nonzero().flatten().tolist()
        assert set(ends[1:]) == {e + 1 for e in eods} | {LENGTH, 2 * LENGTH}
        assert not batch.loss_mask[0, eods].any() and int(batch.loss_mask.sum()) == 2 * LENGTH - len(eods)
        assert all(int(batch.position_ids[0, end]) == 0 for end in ends[:-1])
        assert batch.max_seqlen == int(batch.cu_seqlens.diff().max())


@pytest.mark.parametrize("own_sources", [True, False])
def test_validation_samples_come_once(indexed: Callable[..., Any], corpora: list[str], own_sources: bool):
    settings: dict[str, Any] = {"validation_split": 0.25}
    if own_sources:
        settings = {"validation": [SourceSection(path=path) for path in corpora]}
    train, validation = indexed(*[SourceSection(path=path) for path in corpora], **settings)
    batches = [batch for batches in validation.batches() for batch in batches]
    assert len(batches) % 4 == 0 and validation.num_samples <= len(batches) < validation.num_samples + 4
    filled = len(batches) - validation.num_samples
    assert filled == 0 or not any(batch.loss_mask.any() for batch in batches[-filled:])
    assert all(batch.loss_mask.any() for batch in batches[: validation.num_samples])
    assert train.samples_per_epoch > 0


def test_bad_input(indexed: Callable[..., Any], corpora: list[str], tmp_path: Path):
    def refusal(*sources: SourceSection, **settings: Any) -> str:
        with pytest.raises(InputError) as caught:
            indexed(*sources, **settings)[0].micro_batches(0)
        return str(caught.value)

    source = SourceSection(path=corpora[0])
    assert "nothing.bin: no such file" in refusal(SourceSection(path=str(tmp_path / "nothing")), format="indexed")
    assert "weight 0.0 is not positive" in refusal(replace(source, weight=0.0))
    assert "streaming doesn't apply" in refusal(source, streaming=True)
    assert "too_long: drop doesn't apply" in refusal(source, too_long="drop")
    assert "not a multiple of 3" in refusal(source, shape={"pad_multiple": 3})


def test_data_of_another_tokenizer(indexed: Callable[..., Any], tmp_path: Path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "big.bin"), dtype=np.int32)
    builder.add_document(np.arange(600, 800), [200])  # pyright: ignore[reportArgumentType]
    builder.finalize(str(tmp_path / "big.idx"))
    with pytest.raises(InputError, match="the model's embedding has 600 rows: they were prepared with another"):
        indexed(SourceSection(path=str(tmp_path / "big")))[0].micro_batches(0)


def _rank(rank: int, folder: Path, make: Callable[..., Any], sources: list[SourceSection], results: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    shape = {"dp_size": 2, "dp_rank": rank, "micro_batch_size": 2}
    train, _ = make(*sources, shape=shape, cache_dir=str(folder / "shared"))
    results.put((rank, [batch.tokens.tolist() for step in range(3) for batch in train.micro_batches(step)]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_ranks_share_what_one_rank_sees(indexed: Callable[..., Any], corpora: list[str], tmp_path: Path):
    sources = [SourceSection(path=path) for path in corpora]
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    ranks = [fork.Process(target=_rank, args=(rank, tmp_path, indexed, sources, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = dict(results.get(timeout=100) for _ in ranks)
    for process in ranks:
        process.join()
    whole, _ = indexed(*sources, shape={"micro_batch_size": 2})
    alone = [batch.tokens.tolist() for step in range(3) for batch in whole.micro_batches(step)]
    assert [batch for pair in zip(found[0], found[1], strict=True) for batch in pair] == alone
