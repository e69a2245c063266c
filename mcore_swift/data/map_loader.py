"""Loaders over data sets whose samples are all known: a micro-batch is a pure function of the step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from mcore_swift.data.batch import MicroBatch
from mcore_swift.data.shape import LoaderShape
from mcore_swift.errors import InputError


class TrainLoader(Protocol):
    """What training sees of the data. All ranks of a data-parallel rank's model-parallel group get equal batches."""

    samples_per_epoch: int | None  # packed sequences or rows; None where it can't be known

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of optimizer step `step` (0-based), in order."""
        ...

    def report(self) -> dict[str, Any]:
        """Counts for the summary."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step that was asked for: the same on all ranks, and JSON can hold it."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at that position. Raises InputError when it belongs to other data."""
        ...


class Samples(Protocol):
    """A finite data set: micro-batches from sample numbers. None stands for a sample of padding without loss."""

    def __len__(self) -> int: ...

    def micro_batch(self, numbers: Sequence[int | None]) -> MicroBatch: ...

    def report(self) -> dict[str, Any]: ...


def hash_of(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def check_same_data(state: dict[str, Any], own: dict[str, Any]) -> None:
    """Raises InputError naming what differs between a checkpoint's data position and this run's data."""
    for name, setting in (
        ("kind", "data.streaming and data.format"),
        ("global_batch_size", "schedule.global_batch_size"),
        ("fingerprint", "the training data, their tokenizer or the settings that shape their samples"),
    ):
        if state.get(name) != own[name]:
            detail = "" if name == "fingerprint" else f": {state.get(name)!r} there, {own[name]!r} here"
            raise InputError(
                f"data: the checkpoint's data position can't be continued, {setting} changed{detail}; "
                "keep the run's data, or start anew with checkpoint.resume=never"
            )


class MapTrainLoader:
    """Step k takes samples order[k * G : (k + 1) * G] of the endless order epoch 0, epoch 1, …, whatever the layout.

    Each epoch holds every sample once, shuffled by (seed, epoch). `identity`: all that decides what sample i is.
    """

    def __init__(
        self, samples: Samples, *, shape: LoaderShape, seed: int, shuffle: bool, identity: object, endless: bool = False
    ) -> None:
        self.samples, self.shape = samples, shape
        self.samples_per_epoch = None if endless else len(samples)
        self._numbers = self._endless if endless else self._shuffled
        self._order: Callable[[int], np.ndarray] = lru_cache(maxsize=2)(
            lambda epoch: (
                np.random.default_rng([seed, epoch]).permutation(len(samples)) if shuffle else np.arange(len(samples))
            )
        )
        self._own = {
            "kind": "map",
            "fingerprint": hash_of([identity, seed, shuffle]),
            "global_batch_size": shape.global_batch_size,
        }

    def micro_batches(self, step: int) -> list[MicroBatch]:
        first = step * self.shape.global_batch_size
        return [
            self.samples.micro_batch([self._numbers(first + slot) for slot in slots]) for slots in self.shape.slots()
        ]

    def _shuffled(self, position: int) -> int:
        epoch, index = divmod(position, len(self.samples))
        return int(self._order(epoch)[index])

    def _endless(self, position: int) -> int:
        return position

    def report(self) -> dict[str, Any]:
        return self.samples.report()

    def state_dict(self) -> dict[str, Any]:
        return dict(self._own)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_same_data(state, self._own)


class EvalLoader:
    """Every validation sample once, in order. All ranks get the same number of micro-batches: the last global batch is
    filled with samples that have no loss."""

    def __init__(self, samples: Samples, *, shape: LoaderShape) -> None:
        self.samples, self.shape = samples, shape
        self.num_samples = len(samples)
        self.num_batches = -(-self.num_samples // shape.global_batch_size)

    def batches(self) -> Iterator[list[MicroBatch]]:
        """This rank's micro-batches of each global batch."""
        for batch in range(self.num_batches):
            first = batch * self.shape.global_batch_size
            yield [
                self.samples.micro_batch([n if (n := first + slot) < self.num_samples else None for slot in slots])
                for slots in self.shape.slots()
            ]

    def report(self) -> dict[str, Any]:
        return self.samples.report()
