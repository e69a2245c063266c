"""From documents to the tensors of a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mcore_swift.data.batch import MicroBatch
from mcore_swift.data.samples import Document
from mcore_swift.data.shape import LoaderShape


@dataclass
class _Rows:
    """A micro-batch while it is filled: tokens, labels, position_ids, adapter int64, loss_mask float32, real bool."""

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    position_ids: np.ndarray
    real: np.ndarray
    adapter: np.ndarray

    @classmethod
    def empty(cls, rows: int, length: int, pad_id: int) -> _Rows:
        shape = (rows, length)
        return cls(
            tokens=np.full(shape, pad_id, dtype=np.int64),
            labels=np.zeros(shape, dtype=np.int64),
            loss_mask=np.zeros(shape, dtype=np.float32),
            position_ids=np.zeros(shape, dtype=np.int64),
            real=np.zeros(shape, dtype=np.bool_),
            adapter=np.zeros(shape, dtype=np.int64),
        )

    def put(self, row: int, start: int, document: Document, adapter: int = 0) -> int:
        """Writes a document and returns where it ends. Its last token has no label."""
        tokens, loss = document
        end = start + len(tokens)
        self.tokens[row, start:end] = tokens
        counted = loss[1:] != 0
        self.labels[row, start : end - 1] = np.where(counted, tokens[1:], 0)
        self.loss_mask[row, start : end - 1] = loss[1:]
        self.position_ids[row, start:end] = np.arange(end - start)
        self.real[row, start:end] = True
        self.adapter[row, start:end] = adapter
        return end

    def batch(self, cu_seqlens: list[int] | None = None, *, routed: bool = False) -> MicroBatch:
        """Packed where cu_seqlens are given: all rows become one. `routed`: each document has its own adapter."""
        shape = (1, -1) if cu_seqlens is not None else self.tokens.shape
        segments = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
        return MicroBatch(
            tokens=torch.from_numpy(self.tokens).reshape(shape),
            labels=torch.from_numpy(self.labels).reshape(shape),
            loss_mask=torch.from_numpy(self.loss_mask).reshape(shape),
            position_ids=torch.from_numpy(self.position_ids).reshape(shape),
            cu_seqlens=segments,
            max_seqlen=None if segments is None else int(segments.diff().max()),
            real=torch.from_numpy(self.real).reshape(shape),
            adapter=torch.from_numpy(self.adapter).reshape(shape) if routed else None,
        )


def collate(
    samples: Sequence[list[Document]],
    *,
    packing: bool,
    shape: LoaderShape,
    pad_id: int,
    adapters: Sequence[Sequence[int]] | None = None,
) -> MicroBatch:
    """One micro-batch of samples, each a list of documents; an empty list is a sample of padding only.

    `adapters`: the number of each document's adapter.
    Packed: [1, samples * length] with length = sequence_length padded; each pack's padding is a segment of its own.
    Unpacked (one document a sample): [samples, longest padded].
    """
    own = _collate_packs if packing else _collate_rows
    return own(samples, shape, pad_id, adapters)


def _collate_packs(
    samples: Sequence[list[Document]], shape: LoaderShape, pad_id: int, adapters: Sequence[Sequence[int]] | None
) -> MicroBatch:
    length = shape.padded(shape.sequence_length)
    rows = _Rows.empty(len(samples), length, pad_id)
    cu_seqlens = [0]
    for row, documents in enumerate(samples):
        end = 0
        for number, document in enumerate(documents):
            end = rows.put(row, end, document, adapters[row][number] if adapters else 0)
            cu_seqlens.append(row * length + end)
        if end < length:
            rows.position_ids[row, end:] = np.arange(length - end)
            cu_seqlens.append((row + 1) * length)
    return rows.batch(cu_seqlens, routed=adapters is not None)


def _collate_rows(
    samples: Sequence[list[Document]], shape: LoaderShape, pad_id: int, adapters: Sequence[Sequence[int]] | None
) -> MicroBatch:
    longest = max((len(tokens) for documents in samples for tokens, _ in documents), default=1)
    rows = _Rows.empty(len(samples), shape.padded(longest), pad_id)
    rows.position_ids[:] = np.arange(shape.padded(longest))
    for row, documents in enumerate(samples):
        for number, document in enumerate(documents):
            rows.put(row, 0, document, adapters[row][number] if adapters else 0)
    return rows.batch(routed=adapters is not None)
