"""The field of a row that names its adapter: what becomes of it in micro-batches, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_swift.data.adapter_field import read_adapters
from mcore_swift.data.batch import MicroBatch
from mcore_swift.data.context_split import lengthen, pad_documents, part_of
from mcore_swift.data.loader import LoaderShape, build_loaders
from mcore_swift.errors import InputError
from mcore_swift.recipe import DataSection, SourceSection

NAMES = ("math", "code")


def rows_in(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Texts whose words tell the adapter; some are cut in pieces."""
    texts = [(name, f" {name}" * length) for length in (3, 40, 9, 14) for name in (*NAMES, NAMES[0])]
    rows = [{"text": text, "kind": name} for name, text in texts]
    return [rows_in(tmp_path / "a.jsonl", rows[:5]), rows_in(tmp_path / "b.jsonl", rows[5:])]


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False])
def test_each_document_gets_its_row_s_number(files: list[Path], tmp_path: Path, tokenizer: Any, packing: bool) -> None:
    sources = [SourceSection(path=str(file)) for file in files]
    data = DataSection(
        train=sources, adapter_field="kind", packing=packing, sequence_length=32, cache_dir=str(tmp_path / "cache")
    )
    shape = LoaderShape(
        global_batch_size=2, micro_batch_size=2, sequence_length=32, dp_rank=0, dp_size=1, pad_multiple=1
    )
    loader, _ = build_loaders(data, shape=shape, tokenizer=tokenizer, seed=1, vocab_size=600, adapters=NAMES)
    words = [tokenizer(f" {name}")["input_ids"][-1] for name in NAMES]  # the last token of each name is its own
    seen = 0
    for step in range(4):
        for batch in loader.micro_batches(step):
            assert batch.adapter is not None and batch.adapter.shape == batch.tokens.shape
            for number, word in enumerate(words):
                here = batch.tokens == word
                seen += int(here.sum())
                assert (batch.adapter[here] == number).all()
    assert seen > 20


def test_rows_that_name_no_adapter_are_listed(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"kind": "math"}, {"kind": "maths"}, {}, {"kind": 3}, {"kind": "code"}]
    file = rows_in(tmp_path / "rows.jsonl", [row | {"text": "t"} for row in rows])
    with pytest.raises(InputError) as caught:
        read_adapters([file], field="kind", names=NAMES)
    assert str(caught.value).splitlines()[:3] == [
        f"{file}:2: kind is 'maths', which is none of adapter.several. Did you mean 'math'? Allowed: math, code",
        f"{file}:3: kind (data.adapter_field) is missing; allowed: math, code",
        f"{file}:4: kind is 3, which is none of adapter.several. Allowed: math, code",
    ]


def test_numbers_go_through_context_parallelism() -> None:
    numbers = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    batch = MicroBatch(
        tokens=numbers + 5,
        labels=numbers,
        loss_mask=torch.ones(1, 8),
        position_ids=numbers,
        cu_seqlens=torch.tensor([0, 3, 8], dtype=torch.int32),
        max_seqlen=5,
        adapter=numbers,
    )
    whole = lengthen(pad_documents(batch, 4), 16)
    check: Callable[[MicroBatch], bool] = lambda b: bool((b.adapter[b.tokens > 0] == b.tokens[b.tokens > 0] - 5).all())  # type: ignore[index]  # noqa: E731
    assert check(whole)
    parts = [part_of(whole, size=2, rank=rank) for rank in range(2)]
    assert all(check(part) and part.adapter is not None and part.adapter.shape == (1, 8) for part in parts)
