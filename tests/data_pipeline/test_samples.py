"""Cutting, splitting and collating documents."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from mcore_swift.data.collate import collate
from mcore_swift.data.samples import make_samples, split_rows
from mcore_swift.data.shape import LoaderShape
from mcore_swift.data.tokenized import SourceFile, TokenizedRows
from mcore_swift.errors import InputError


def make_rows(lengths: list[int], *, format: str, learned_from: int = 0, path: str = "rows.parquet") -> TokenizedRows:
    from pathlib import Path

    loss = [np.arange(n) >= learned_from for n in lengths]
    return TokenizedRows(
        tokens=np.arange(1, sum(lengths) + 1, dtype=np.int32),
        loss=np.concatenate(loss).astype(np.uint8),
        offsets=np.cumsum([0, *lengths]),
        files=[SourceFile(Path(path), len(lengths), format)],
        key="k",
    )


def test_long_chats_are_truncated_and_counted():
    samples = make_samples(
        make_rows([5, 12, 3], format="messages"), sequence_length=8, too_long="truncate", packing=False
    )
    assert [len(samples.documents(i)[0][0]) for i in range(3)] == [5, 8, 3]
    assert samples.counts.truncated == 1 and samples.counts.tokens == 16


def test_a_chat_with_nothing_to_learn_after_truncation_is_dropped_and_counted():
    rows = make_rows([5, 12], format="messages", learned_from=8)
    rows.loss[:5] = 1
    samples = make_samples(rows, sequence_length=8, too_long="truncate", packing=False)
    assert len(samples) == 1 and (samples.counts.truncated, samples.counts.without_loss) == (1, 1)


def test_long_rows_are_dropped_or_an_error_with_their_number():
    rows = make_rows([5, 12, 3, 9], format="messages")
    samples = make_samples(rows, sequence_length=8, too_long="drop", packing=True)
    assert samples.counts.dropped == 2 and samples.counts.documents == 2
    with pytest.raises(InputError, match=r"rows\.parquet:2: row of 12 tokens .*sequence_length 8\n.*parquet:4: "):
        make_samples(rows, sequence_length=8, too_long="error", packing=True)


def test_long_texts_are_split_so_that_every_token_is_predicted_once():
    rows = make_rows([5, 20, 8, 9], format="text")
    samples = make_samples(rows, sequence_length=8, too_long="truncate", packing=True)
    documents = [document for i in range(len(samples)) for document in samples.documents(i)]
    predicted = sorted(int(token) for tokens, _ in documents for token in tokens[1:])
    assert predicted == [t for t in range(1, 43) if t not in (1, 6, 26, 34)]  # all but the first of each row
    assert max(len(tokens) for tokens, _ in documents) == 8 and samples.counts.split == 2


def test_split_of_rows_is_disjoint_complete_and_fixed_by_the_seed():
    train, validation = split_rows(50, fraction=0.1, seed=3)
    assert len(validation) == 5 and sorted([*train, *validation]) == list(range(50))
    again = split_rows(50, fraction=0.1, seed=3)
    assert (again[1] == validation).all() and (split_rows(50, fraction=0.1, seed=4)[1] != validation).any()


def document(*tokens: int, loss: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(tokens, dtype=np.int32), np.array(loss, dtype=np.uint8)


def test_packs_become_one_thd_sequence(make_shape: Callable[..., LoaderShape]):
    shape = make_shape(sequence_length=7, pad_multiple=4)
    first = [document(11, 12, 13, loss=[0, 1, 1]), document(21, 22, loss=[1, 1])]
    batch = collate([first, [document(*range(31, 39), loss=[1] * 8)]], packing=True, shape=shape, pad_id=9)
    assert batch.tokens.tolist() == [[11, 12, 13, 21, 22, 9, 9, 9, *range(31, 39)]]
    assert batch.labels.tolist() == [[12, 13, 0, 22, 0, 0, 0, 0, *range(32, 39), 0]]
    assert batch.loss_mask.tolist() == [[1, 1, 0, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, *range(8)]]
    assert batch.cu_seqlens is not None and batch.cu_seqlens.tolist() == [0, 3, 5, 8, 16]
    assert batch.cu_seqlens.dtype == torch.int32 and batch.max_seqlen == 8


def test_rows_are_padded_on_the_right(make_shape: Callable[..., LoaderShape]):
    shape = make_shape(sequence_length=64, pad_multiple=4)
    rows = [[document(1, 2, 3, 4, 5, loss=[0, 0, 1, 0, 1])], [document(6, 7, loss=[0, 1])], []]
    batch = collate(rows, packing=False, shape=shape, pad_id=9)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 9, 9, 9], [6, 7, 9, 9, 9, 9, 9, 9], [9] * 8]
    assert batch.labels.tolist() == [[0, 3, 0, 5, 0, 0, 0, 0], [7, 0, 0, 0, 0, 0, 0, 0], [0] * 8]
    assert batch.loss_mask.tolist() == [[0, 1, 0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0], [0] * 8]
    assert batch.position_ids.tolist() == [list(range(8))] * 3
    assert batch.cu_seqlens is None and batch.loss_mask.dtype == torch.float32


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(1, 1), (1, 4), (2, 2), (4, 1), (3, 4)])
def test_a_global_batch_is_divided_exactly(make_shape: Callable[..., LoaderShape], dp_size: int, micro_batch_size: int):
    shapes = [
        make_shape(global_batch_size=24, micro_batch_size=micro_batch_size, dp_size=dp_size, dp_rank=rank)
        for rank in range(dp_size)
    ]
    taken = [slot for shape in shapes for slots in shape.slots() for slot in slots]
    assert sorted(taken) == list(range(24))
    assert {len(shape.slots()) for shape in shapes} == {24 // (dp_size * micro_batch_size)}


def test_a_batch_that_does_not_divide_is_refused(make_shape: Callable[..., LoaderShape]):
    with pytest.raises(InputError, match=r"global_batch_size: 6 is not a multiple of .* = 2 x 2 = 4"):
        make_shape(global_batch_size=6, micro_batch_size=2, dp_size=2)
