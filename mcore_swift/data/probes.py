"""Micro-batches of answers apart from their probes: probes are only read, so they need no pass backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mcore_swift.data.batch import MicroBatch, Sequences
from mcore_swift.data.context_split import NO_ANSWER, lengthen

OF_PLACES = ("tokens", "labels", "loss_mask", "position_ids", "real", "adapter")  # a MicroBatch's, [b, s]


def apart(batches: Sequence[MicroBatch], *, multiple: int) -> tuple[list[MicroBatch], list[MicroBatch]]:
    """(the step's micro-batches without the probes, those with nothing else), both as many as before, on the host.

    Packed ones of a list have one length, a multiple of `multiple`, which pipeline stages need: that of the fullest.
    Rows are shared out evenly, padding fills up.
    """
    return _only(batches, probes=False, multiple=multiple), _only(batches, probes=True, multiple=multiple)


def _only(batches: Sequence[MicroBatch], *, probes: bool, multiple: int) -> list[MicroBatch]:
    if batches[0].cu_seqlens is None:
        return [_rows(batch, probes) for batch in batches]
    found = [_documents(batch, probes) for batch in batches]
    longest = max(max(batch.tokens.size(1) for batch in found), 1)
    return [lengthen(batch, -(-longest // multiple) * multiple) for batch in found]


def _documents(batch: MicroBatch, probes: bool) -> MicroBatch:
    """A packed micro-batch without other documents and without padding."""
    assert batch.sequences is not None and batch.cu_seqlens is not None
    lengths = batch.cu_seqlens.diff()
    segments = torch.arange(len(lengths)).repeat_interleave(lengths)
    owners = torch.full((len(lengths),), NO_ANSWER)
    owners = owners.scatter_reduce(0, segments, batch.sequences.index[0], "amax")
    keep = _wanted(owners, batch.sequences, probes)
    own = lengths[keep]
    boundaries = torch.cat([own.new_zeros(1), own.cumsum(0, dtype=own.dtype)])
    changed = _picked(batch, 1, keep[segments].nonzero()[:, 0], probes)
    return replace(changed, cu_seqlens=boundaries, max_seqlen=int(own.max()) if len(own) else 0)


def _rows(batch: MicroBatch, probes: bool) -> MicroBatch:
    """Half of the rows: the wanted documents, then rows that are padding only."""
    assert batch.sequences is not None
    owners = batch.sequences.index.amax(1)
    rows = torch.cat([_wanted(owners, batch.sequences, probes).nonzero(), (owners == NO_ANSWER).nonzero()])[:, 0]
    return _picked(batch, 0, rows[: max(batch.tokens.size(0) // 2, 1)], probes)


def _wanted(owners: Tensor, sequences: Sequences, probes: bool) -> Tensor:
    """bool, of the numbers of answers: they are probes, or aren't. NO_ANSWER isn't wanted."""
    assert sequences.probe is not None
    kinds = torch.cat([sequences.probe == probes, torch.zeros(1, dtype=torch.bool)])  # the last one is NO_ANSWER's
    return kinds[owners]


def _picked(batch: MicroBatch, dimension: int, places: Tensor, probes: bool) -> MicroBatch:
    """The micro-batch at these places of [b, s], its answers numbered anew."""
    assert batch.sequences is not None and batch.sequences.probe is not None
    kept = batch.sequences.probe == probes
    numbers = torch.cat([torch.where(kept, kept.cumsum(0) - 1, NO_ANSWER), torch.tensor([NO_ANSWER])])
    index = numbers[batch.sequences.index.index_select(dimension, places)]
    of_answers = {
        name: values[kept] for name, values in vars(batch.sequences).items() if values is not None and name != "index"
    }
    of_places = {
        name: values.index_select(dimension, places)
        for name in OF_PLACES
        if (values := getattr(batch, name)) is not None
    }
    return replace(batch, **of_places, sequences=Sequences(index=index, **of_answers))
