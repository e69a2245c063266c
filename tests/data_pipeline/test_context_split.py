"""The cut of sequences for context parallelism: Transformer Engine's own examples, and nothing lost in padding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mcore_swift.data.batch import MicroBatch, Sequences
from mcore_swift.data.context_split import lengthen, pad_documents, part_of, sequence_order, zigzag


def positions(lengths: list[int]) -> torch.Tensor:
    """Each token's position in its document, for documents of these lengths."""
    return torch.cat([torch.arange(length) for length in lengths])


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


# Documentation of attn_forward_func_with_cp and thd_sequence_order_to_cp_rank_order in Transformer Engine 2.20,
# pytorch/attention/dot_product_attention/context_parallel.py: the positions that each rank holds.
EXAMPLES = [
    ([12], [[0, 1, 2, 9, 10, 11], [3, 4, 5, 6, 7, 8]]),
    ([8, 4], [[0, 1, 6, 7, 0, 3], [2, 3, 4, 5, 1, 2]]),
    (
        [8, 8, 8, 16],
        [
            [0, 7, 0, 7, 0, 7, 0, 1, 14, 15],
            [1, 6, 1, 6, 1, 6, 2, 3, 12, 13],
            [2, 5, 2, 5, 2, 5, 4, 5, 10, 11],
            [3, 4, 3, 4, 3, 4, 6, 7, 8, 9],
        ],
    ),
]


@pytest.mark.parametrize(("lengths", "expected"), EXAMPLES)
def test_the_cut_is_transformer_engines(lengths: list[int], expected: list[list[int]]) -> None:
    size, cuts = len(expected), bounds(lengths)
    parts = [zigzag(cuts, size=size, rank=rank) for rank in range(size)]
    assert [positions(lengths)[part].tolist() for part in parts] == expected
    together = torch.cat(parts)
    assert together[sequence_order(cuts, size=size)].tolist() == list(range(sum(lengths)))


def packed(lengths: list[int]) -> MicroBatch:
    """Documents whose tokens, labels and mask are all different and none 0."""
    total = sum(lengths)
    tokens = torch.arange(1, total + 1)[None]
    return MicroBatch(
        tokens=tokens,
        labels=tokens + 1000,
        loss_mask=tokens.float(),
        position_ids=positions(lengths)[None],
        cu_seqlens=bounds(lengths),
        max_seqlen=max(lengths),
    )


@pytest.mark.parametrize(
    ("lengths", "padded"), [([5, 8, 1], [8, 8, 4]), ([4, 4], [4, 4]), ([1], [4]), ([9, 3], [12, 4])]
)
def test_documents_are_padded_each_and_nothing_else_changes(lengths: list[int], padded: list[int]) -> None:
    batch = packed(lengths)
    found = pad_documents(batch, 4)
    assert found.cu_seqlens is not None and found.cu_seqlens.dtype == torch.int32
    assert found.cu_seqlens.diff().tolist() == padded and found.max_seqlen == max(padded)
    for name in ("tokens", "labels", "loss_mask", "position_ids"):
        theirs = getattr(batch, name)[0].split(lengths)
        for own, old in zip(getattr(found, name)[0].split(padded), theirs, strict=True):
            assert own.dtype == old.dtype and own[: len(old)].equal(old) and not own[len(old) :].any()


def test_a_longer_sequence_has_one_more_segment() -> None:
    batch = packed([8, 4])
    assert lengthen(batch, 12) is batch
    found = lengthen(batch, 32)
    assert found.cu_seqlens is not None
    assert (found.cu_seqlens.tolist(), found.max_seqlen) == ([0, 8, 12, 32], 20)
    assert found.tokens[:, :12].equal(batch.tokens) and not found.tokens[:, 12:].any()
    assert found.loss_mask.shape == (1, 32) and found.loss_mask.sum() == batch.loss_mask.sum()


def test_parts_hold_every_position_once() -> None:
    whole = packed([8, 4, 12])
    parts = [part_of(whole, size=2, rank=rank) for rank in range(2)]
    for part in parts:
        assert part.cu_seqlens is whole.cu_seqlens and part.max_seqlen == 12
        assert part.labels.equal(part.tokens + 1000) and part.loss_mask.equal(part.tokens.float())
    assert sorted(torch.cat([part.tokens[0] for part in parts]).tolist()) == whole.tokens[0].tolist()


def test_rows_are_cut_alike() -> None:
    tokens = torch.arange(24).reshape(2, 12)
    batch = MicroBatch(tokens=tokens, labels=tokens, loss_mask=tokens.float(), position_ids=tokens)
    part = part_of(batch, size=2, rank=1)
    assert part.cu_seqlens is None and part.tokens.tolist() == [[3, 4, 5, 6, 7, 8], [15, 16, 17, 18, 19, 20]]


def test_lengths_that_cannot_be_cut_are_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="4 chunks"):
        zigzag(bounds([8, 6]), size=2, rank=0)


def with_answers(lengths: list[int]) -> MicroBatch:
    """Documents of which each is an answer: its labels count from the second position on, but for the last one."""
    batch = packed(lengths)
    index = torch.full_like(batch.tokens, -1)
    for number, (start, length) in enumerate(zip(bounds(lengths).tolist(), lengths, strict=False)):
        index[0, start + 1 : start + length - 1] = number
    mask = (index >= 0).float()
    return replace(batch, loss_mask=mask, sequences=Sequences(index=index, row=torch.arange(len(lengths)) + 50))


def test_answers_keep_their_labels_in_padding_and_parts() -> None:
    batch = with_answers([5, 8, 3])
    longer = lengthen(pad_documents(batch, 4), 24)
    parts = [part_of(longer, size=2, rank=rank) for rank in range(2)]
    for found in (longer, *parts):
        assert found.sequences is not None and found.sequences.row.tolist() == [50, 51, 52]
        assert found.sequences.index.dtype == torch.int64 and found.sequences.index.shape == found.tokens.shape
        assert (found.sequences.index >= 0).equal(found.loss_mask.bool())
    assert batch.sequences is not None and longer.sequences is not None

    def labels(*batches: MicroBatch) -> list[tuple[int, int]]:
        """(answer, label) of each position with one."""
        pairs = [(b.sequences.index[0], b.labels[0]) for b in batches if b.sequences is not None]
        return sorted((int(i), int(t)) for index, found in pairs for i, t in zip(index, found, strict=True) if i >= 0)

    assert labels(longer) == labels(batch) == labels(*parts) and len(labels(batch)) == 3 + 6 + 1
    assert {int(i) for i in longer.sequences.index[0, 5:8]} == {-1} and {
        int(i) for i in longer.sequences.index[0, 20:]
    } == {-1}


def test_a_part_of_weighted_labels_is_weighted() -> None:
    batch = replace(with_answers([4, 7, 2]), weighted=True)
    longer = lengthen(pad_documents(batch, 4), 24)
    assert longer.weighted and part_of(longer, size=2, rank=1).weighted and longer.to(torch.device("meta")).weighted


def test_answers_move_with_their_batch() -> None:
    whole = with_answers([4]).sequences
    assert whole is not None
    numbers = {name: torch.ones(1) for name in ("ref_logps", "weight", "partners")}
    full = replace(whole, **numbers, probe=torch.ones(1, dtype=torch.bool))
    moved = full.to(torch.device("meta"))
    assert all(value is None or value.device.type == "meta" for value in vars(moved).values())
    assert {name for name, value in vars(moved).items() if value is None} == {"desirable", "margin"}
