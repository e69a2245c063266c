"""From answers to a micro-batch that says which label belongs to which of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from mcore_swift.data.batch import MicroBatch, Sequences
from mcore_swift.data.collate import collate
from mcore_swift.data.judged_samples import Answer
from mcore_swift.data.shape import LoaderShape
from mcore_swift.data.wanted import Form


def collate_judged(
    samples: Sequence[list[Answer]], *, form: Form, packing: bool, shape: LoaderShape, pad_id: int
) -> MicroBatch:
    """One micro-batch of samples, each the answers of its units; an empty list is a sample of padding only.

    Packed: [1, samples * length], as `collate` makes it. Unpacked: [samples * answers, longest padded], a unit's
    documents in rows one below the other. Answers are numbered as they come. Scored: no token is a label, and the loss
    mask is 1 at the last token of each document that isn't padding, as transformers looks for it.
    """
    rows = samples if packing else [row for sample in samples for row in _rows(sample, form.answers)]
    plain = [[(answer.tokens, answer.loss) for answer in row] for row in rows]
    batch = collate(plain, packing=packing, shape=shape, pad_id=pad_id)
    index = np.full((len(rows), batch.tokens.numel() // len(rows)), -1, dtype=np.int64)
    found: list[Answer] = []
    for row, documents in enumerate(rows):
        start = 0
        for answer in documents:
            end = start + len(answer.tokens)
            if form.scored:
                index[row, start + np.flatnonzero(answer.tokens != pad_id)[-1:]] = len(found)
            else:
                index[row, start : end - 1] = np.where(answer.loss[1:] != 0, len(found), -1)
            found.append(answer)
            start = end
    numbers = torch.from_numpy(index).reshape(batch.tokens.shape)
    if form.scored:
        batch = replace(batch, labels=torch.zeros_like(batch.labels), loss_mask=(numbers >= 0).float())
    return replace(batch, sequences=_sequences(found, form, numbers))


def _rows(sample: list[Answer], answers: int) -> list[list[Answer]]:
    return [[answer] for answer in sample] or [[]] * answers


def _sequences(found: list[Answer], form: Form, index: torch.Tensor) -> Sequences:
    labels = torch.tensor([answer.label for answer in found], dtype=torch.float32)
    probes = torch.tensor([answer.probe for answer in found], dtype=torch.bool)
    return Sequences(
        index=index,
        row=torch.tensor([answer.row for answer in found], dtype=torch.int64),
        desirable=labels == 1 if form.labelled else None,
        probe=probes if form.labelled and form.answers == 2 else None,
        margin=None if form.labelled else _known([answer.margin for answer in found[::2]], 0.0),
        weight=_known([answer.weight for answer in found], 1.0),
        ref_logps=torch.tensor([answer.ref_logps for answer in found]) if form.ref_logps else None,
    )


def _known(values: list[float], otherwise: float) -> torch.Tensor | None:
    """float32 [n], with `otherwise` where nothing is known; None where nothing is known at all."""
    known = torch.tensor(values, dtype=torch.float32)
    return None if known.isnan().all() else known.nan_to_num(otherwise)
