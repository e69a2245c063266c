"""Pairs whose prompts are computed once.

Both documents of a pair begin with the same prompt, and a causal model makes the same of it twice. A micro-batch keeps
the boundaries of its whole documents, since attention and rotary positions are theirs; what is computed position by
position, which is all the rest, is computed for the distinct ones (prefix sharing, section 3 of arXiv:2410.20305, where
attention skips the second copy, too). A position whose label counts is never shared: the last token of a prompt is
followed by two different answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from mcore_swift.data.batch import MicroBatch, SharedPrompts


@dataclass(frozen=True)
class _Places:
    """Positions of a micro-batch, all int64: those to compute, and of what is shared the second ones with the first."""

    distinct: np.ndarray
    second: np.ndarray
    first: np.ndarray
    padding: np.ndarray


def share_prompts(batches: Sequence[MicroBatch], *, multiple: int, even: bool) -> list[MicroBatch]:
    """Packed micro-batches of pairs without the second copy of each prompt: [1, s], s a multiple of `multiple`, at most
    what it was. even: the same s for all. What is missing to s is padding."""
    places = [_places(batch) for batch in batches]
    lengths = [max(-(-len(of.distinct) // multiple), 1) * multiple for of in places]
    if even:
        lengths = [max(lengths)] * len(lengths)
    return [_computed(batch, of, length) for batch, of, length in zip(batches, places, lengths, strict=True)]


def _places(batch: MicroBatch) -> _Places:
    assert batch.sequences is not None and batch.cu_seqlens is not None
    index, tokens = batch.sequences.index[0].numpy(), batch.tokens[0].numpy()
    counted = (index >= 0) | (batch.loss_mask[0].numpy() != 0)
    boundaries = batch.cu_seqlens.tolist()
    documents: dict[int, tuple[int, int]] = {}
    computed, copies, originals = np.zeros(len(tokens), dtype=bool), [], []
    for start, end in itertools.pairwise(boundaries):
        owner = int(index[start:end].max(initial=-1))
        if owner < 0:
            continue  # padding
        computed[start:end] = True
        documents[owner] = start, end
        if owner % 2:
            other = documents[owner - 1]
            count = _same(tokens, counted, other, (start, end))
            computed[start : start + count] = False
            copies.append(np.arange(start, start + count))
            originals.append(np.arange(other[0], other[0] + count))
    second, first = (np.concatenate([np.zeros(0, dtype=np.int64), *parts]) for parts in (copies, originals))
    padding = np.ones(len(tokens), dtype=bool)
    padding[second] = False
    return _Places(np.flatnonzero(computed), second, first, np.flatnonzero(padding & ~computed))


def _same(tokens: np.ndarray, counted: np.ndarray, one: tuple[int, int], other: tuple[int, int]) -> int:
    """How many tokens at the beginning of both documents are the same, up to the first label that counts."""
    limit = min(*(int(counted[start:end].argmax()) for start, end in (one, other)))
    differ = tokens[one[0] : one[0] + limit] != tokens[other[0] : other[0] + limit]
    return int(differ.argmax()) if differ.any() else limit


def _computed(batch: MicroBatch, of: _Places, length: int) -> MicroBatch:
    total = batch.tokens.size(1)
    missing = min(length, total) - len(of.distinct)
    alone = max(missing - len(of.padding), 0)  # where there is too little padding, second copies are computed
    second, first = of.second[alone:], of.first[alone:]
    positions = np.concatenate([of.distinct, of.padding[:missing], of.second[:alone]])
    rows = np.zeros(total, dtype=np.int64)  # of padding that isn't computed: any, since nothing is made of it
    rows[positions] = np.arange(len(positions))
    rows[second] = rows[first]
    shared = SharedPrompts(*map(torch.from_numpy, (rows, positions, second, rows[second])))
    return replace(batch.at(shared.positions), shared=shared)
