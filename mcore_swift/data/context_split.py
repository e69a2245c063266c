"""Which positions of a micro-batch a context parallel rank holds.

A causal document costs more the further one reads, so Transformer Engine and Megatron-Core cut it into 2·cp chunks and
give rank r the chunks r and 2·cp − 1 − r: equal work for all. In a packed sequence each document is cut for itself, so
its length has to be a multiple of 2·cp. Padding goes behind the document's own tokens, as a part of its segment: no
token of a causal model sees what follows it, so the padded boundaries are all that attention needs to know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mcore_swift.data.batch import MicroBatch, Sequences

NO_ANSWER = -1  # in Sequences.index: the position belongs to no answer


def zigzag(cu_seqlens: Tensor, *, size: int, rank: int) -> Tensor:
    """The positions that `rank` of `size` holds, in their order: int64 [cu_seqlens[-1] / size].

    cu_seqlens: int [n + 1], boundaries of segments whose lengths are multiples of 2·size.
    """
    lengths = cu_seqlens.diff().long()
    assert not (lengths % (2 * size)).any(), f"segments {lengths.tolist()} can't be cut into {2 * size} chunks"
    starts, chunk_lengths = (values.repeat_interleave(lengths) for values in (cu_seqlens[:-1], lengths // (2 * size)))
    chunks = (torch.arange(starts.numel(), device=starts.device) - starts) // chunk_lengths
    return ((chunks == rank) | (chunks == 2 * size - 1 - rank)).nonzero()[:, 0]


def sequence_order(cu_seqlens: Tensor, *, size: int) -> Tensor:
    """Where each position of the sequence is, once the ranks' parts are put one behind the other: int64 [total]."""
    return torch.cat([zigzag(cu_seqlens, size=size, rank=rank) for rank in range(size)]).argsort()


def pad_documents(batch: MicroBatch, multiple: int) -> MicroBatch:
    """A packed micro-batch with each segment padded to a multiple of `multiple`. Padding has no label."""
    assert batch.cu_seqlens is not None
    lengths = batch.cu_seqlens.diff()
    padded = -(-lengths // multiple) * multiple
    boundaries = torch.cat([padded.new_zeros(1), padded.cumsum(0, dtype=padded.dtype)])
    starts = (boundaries[:-1] - batch.cu_seqlens[:-1]).repeat_interleave(lengths)
    index = torch.arange(starts.numel(), device=starts.device) + starts  # where each old position goes

    def spread(values: Tensor, fill: int = 0) -> Tensor:
        return values.new_full((1, int(boundaries[-1])), fill).index_copy_(1, index, values)

    return replace(
        batch,
        tokens=spread(batch.tokens),
        labels=spread(batch.labels),
        loss_mask=spread(batch.loss_mask),
        position_ids=spread(batch.position_ids),
        cu_seqlens=boundaries,
        max_seqlen=int(padded.max()),
        real=None if batch.real is None else spread(batch.real),
        adapter=None if batch.adapter is None else spread(batch.adapter),
        sequences=_with_index(batch.sequences, lambda values: spread(values, NO_ANSWER)),
    )


def lengthen(batch: MicroBatch, length: int) -> MicroBatch:
    """A packed micro-batch of `length` positions: what is missing is one more segment of padding."""
    assert batch.cu_seqlens is not None and batch.max_seqlen is not None
    missing = length - batch.tokens.size(1)
    if missing == 0:
        return batch

    def extend(values: Tensor, fill: int = 0) -> Tensor:
        return torch.nn.functional.pad(values, (0, missing), value=fill)

    return replace(
        batch,
        tokens=extend(batch.tokens),
        labels=extend(batch.labels),
        loss_mask=extend(batch.loss_mask),
        position_ids=extend(batch.position_ids),
        cu_seqlens=torch.cat([batch.cu_seqlens, batch.cu_seqlens.new_tensor([length])]),
        max_seqlen=max(batch.max_seqlen, missing),
        real=None if batch.real is None else extend(batch.real),
        adapter=None if batch.adapter is None else extend(batch.adapter),
        sequences=_with_index(batch.sequences, lambda values: extend(values, NO_ANSWER)),
    )


def part_of(batch: MicroBatch, *, size: int, rank: int) -> MicroBatch:
    """What `rank` of `size` holds of a micro-batch: [b, s / size]. Its `cu_seqlens` stay those of the whole."""
    segments = batch.cu_seqlens
    if segments is None:
        segments = torch.tensor([0, batch.tokens.size(1)], device=batch.tokens.device)
    return batch.at(zigzag(segments, size=size, rank=rank))


def _with_index(sequences: Sequences | None, change: Callable[[Tensor], Tensor]) -> Sequences | None:
    """The sequences with `change` applied to what they say of each position; what they say of answers stays."""
    return None if sequences is None else replace(sequences, index=change(sequences.index))
