"""The preference rows of the objectives' tests, and the micro-batches they make at a layout.

Pairs and packs are of very different sizes: a mean of the ranks', packs' or pairs' means would be far from the mean
over all. The answers of the packs that the second of two data parallel ranks gets are short.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mcore_swift import parallel
from mcore_swift.data.batch import MicroBatch, Sequences
from mcore_swift.data.collate import collate
from mcore_swift.data.judged_collate import collate_judged
from mcore_swift.data.judged_samples import Answer
from mcore_swift.data.samples import Document
from mcore_swift.data.shape import LoaderShape
from mcore_swift.data.wanted import Form
from mcore_swift.recipe import Recipe

# Of each row: labels of the prompt, of the better answer, of the other one.
LENGTHS = ((3, 17, 9), (8, 5, 22), (2, 12, 12), (11, 6, 4), (4, 2, 3), (1, 4, 2), (5, 3, 1), (2, 2, 5), (7, 19, 14))
# The rows of each pack; rank r of n data parallel ranks gets the packs r, r + n, … One holds no answers at all.
PACKS = ((0, 1), (4, 5, 6), (2,), (7,), (3, 8), ())
PACK_LENGTH = 112
MARGINS = (0.0, 1.5, 0.3, 0.0, 2.0, 0.7, 1.0, 0.2, 3.0)  # of each row


def answers(vocab_size: int) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected) of each row, as token ids that are neither 0 nor 1."""
    generator = np.random.default_rng(5)
    return [
        tuple(generator.integers(2, vocab_size, length).tolist() for length in lengths)  # type: ignore[misc]
        for lengths in LENGTHS
    ]


def document(prompt: list[int], answer: list[int]) -> Document:
    loss = np.array([0] * len(prompt) + [1] * len(answer), dtype=np.uint8)
    return np.array(prompt + answer, dtype=np.int32), loss


def pairs(recipe: Recipe, vocab_size: int, place: parallel.Ranks, *, short: bool = False) -> list[MicroBatch]:
    """This rank's micro-batches of pairs, one pack (or the rows of one) each; `short`: with prompts of one token."""
    rows = [(prompt[-1:] if short else prompt, *sides) for prompt, *sides in answers(vocab_size)]
    found = []
    for pack in PACKS[place.dp :: place.dp_size]:
        documents = [document(rows[row][0], rows[row][side]) for row in pack for side in (1, 2)]
        numbers = torch.tensor([row for row in pack for _ in range(2)], dtype=torch.int64)
        found.append(_batch(recipe, documents, Sequences(index=torch.zeros(0), row=numbers)))
    return found


def judged(recipe: Recipe, vocab_size: int, place: parallel.Ranks) -> list[MicroBatch]:
    """The better answer of even rows as a good one, the other one of odd rows as a bad one, each with its probe.

    A row's probe is the answer to the row before, as TRL takes it.
    """
    rows = [(prompt, (chosen, rejected)[row % 2]) for row, (prompt, chosen, rejected) in enumerate(answers(vocab_size))]
    found = []
    for pack in PACKS[place.dp :: place.dp_size]:
        documents = [document(*rows[row]) for row in pack] + [document(rows[row][0], rows[row - 1][1]) for row in pack]
        good = torch.tensor([row % 2 == 0 for row in pack] * 2, dtype=torch.bool)
        sequences = Sequences(
            index=torch.zeros(0),
            row=torch.tensor([*pack, *pack], dtype=torch.int64),
            desirable=good,
            probe=torch.arange(2 * len(pack)) >= len(pack),
        )
        found.append(_batch(recipe, documents, sequences))
    return found


def scored(recipe: Recipe, vocab_size: int, place: parallel.Ranks, *, margins: bool) -> list[MicroBatch]:
    """This rank's micro-batches of pairs that are scored, made by the loaders' own collation."""
    form = Form(answers=2, labelled=False, scored=True)
    found = []
    for pack in PACKS[place.dp :: place.dp_size]:
        units = [_scored_pair(row, *answers(vocab_size)[row], margins=margins) for row in pack]
        samples = [[answer for unit in units for answer in unit]] if recipe.data.packing else units or [[]]
        packing, shape = recipe.data.packing, _shape(recipe)
        found.append(collate_judged(samples, form=form, packing=packing, shape=shape, pad_id=0))
    return found


def _scored_pair(row: int, prompt: list[int], *sides: list[int], margins: bool) -> list[Answer]:
    margin = MARGINS[row] if margins else math.nan
    return [Answer(*document(prompt, side), row, margin, math.nan, math.nan, False, math.nan) for side in sides]


def _shape(recipe: Recipe) -> LoaderShape:
    return LoaderShape(
        global_batch_size=1,
        micro_batch_size=1,
        sequence_length=PACK_LENGTH,
        dp_rank=0,
        dp_size=1,
        pad_multiple=parallel.resolve(recipe.parallel, world_size=None).length_multiple,
    )


def _batch(recipe: Recipe, documents: list[Document], sequences: Sequences) -> MicroBatch:
    shape, packing = _shape(recipe), recipe.data.packing
    samples: Any = [documents] if packing else [[each] for each in documents] or [[]]
    batch = collate(samples, packing=packing, shape=shape, pad_id=0)
    if packing:
        assert batch.cu_seqlens is not None
        number = torch.arange(len(batch.cu_seqlens) - 1).repeat_interleave(batch.cu_seqlens.diff())[None]
    else:
        number = torch.arange(batch.tokens.size(0))[:, None].expand_as(batch.tokens)
    return replace(batch, sequences=replace(sequences, index=torch.where(batch.loss_mask > 0, number, -1)))
