"""Random tokens for benchmarks: no file is read, and a sample depends on the seed and its number alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mcore_swift.data.batch import MicroBatch
from mcore_swift.data.map_loader import EvalLoader, MapTrainLoader, TrainLoader
from mcore_swift.data.shape import LoaderShape
from mcore_swift.errors import InputError

if TYPE_CHECKING:
    from mcore_swift.recipe import DataSection


class SyntheticSamples:
    """Sequences of `sequence_length` uniform tokens, each one document in which every position has a label."""

    def __init__(self, *, shape: LoaderShape, seed: int, vocab_size: int, packing: bool) -> None:
        self.shape, self.seed, self.vocab_size, self.packing = shape, seed, vocab_size, packing

    def __len__(self) -> int:
        raise TypeError("synthetic data have no end")

    def micro_batch(self, numbers: Sequence[int | None]) -> MicroBatch:
        length = self.shape.padded(self.shape.sequence_length)
        # One token more than the sequence is drawn, so that the last position has a label too.
        drawn = np.stack([self._draw(number, length + 1) for number in numbers])
        tokens, labels = torch.from_numpy(drawn[:, :-1].copy()), torch.from_numpy(drawn[:, 1:].copy())
        rows = (1, -1) if self.packing else tokens.shape
        segments = torch.arange(len(numbers) + 1, dtype=torch.int32) * length if self.packing else None
        return MicroBatch(
            tokens=tokens.reshape(rows),
            labels=labels.reshape(rows),
            loss_mask=torch.ones(tokens.shape, dtype=torch.float32).reshape(rows),
            position_ids=torch.arange(length).repeat(len(numbers), 1).reshape(rows),
            cu_seqlens=segments,
            max_seqlen=length if self.packing else None,
        )

    def _draw(self, number: int | None, count: int) -> np.ndarray:
        return np.random.default_rng([self.seed, number or 0]).integers(0, self.vocab_size, size=count)

    def report(self) -> dict[str, Any]:
        return {"synthetic": True}


def build_synthetic(
    data: DataSection, *, shape: LoaderShape, seed: int, vocab_size: int
) -> tuple[TrainLoader, EvalLoader | None]:
    """An endless training loader. Raises InputError for settings that need real data."""
    if data.validation or data.validation_split:
        raise InputError("data.validation: synthetic data have no validation set")
    if [source.path for source in data.train] != ["synthetic"]:
        raise InputError("data.train: with data.format synthetic it is [synthetic], no file is read")
    samples = SyntheticSamples(shape=shape, seed=seed, vocab_size=vocab_size, packing=data.packing)
    identity = ["synthetic", shape.sequence_length, vocab_size, data.packing]
    return MapTrainLoader(samples, shape=shape, seed=seed, shuffle=False, identity=identity, endless=True), None
