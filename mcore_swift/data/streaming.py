"""Training on data larger than memory: files are read once an epoch, nothing is cached, and a resume is exact.

The stream is cut into blocks of consecutive rows. A block is tokenized, cut, packed (best fit, inside the block) and
shuffled by itself, so that its samples are a pure function of the seed and of the row it starts at. The position is
therefore three numbers for the block and one inside it; a resume re-reads one block. Shuffling reaches no further than
a block: shuffle sorted files beforehand. Every rank reads and tokenizes the whole stream and takes its own samples, so
that the samples of a step don't depend on the layout; for very many ranks, index the data (`mcore-swift data prepare`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mcore_swift.data.batch import MicroBatch
from mcore_swift.data.collate import collate
from mcore_swift.data.judged_collate import collate_judged
from mcore_swift.data.judged_samples import JudgedCounts, JudgedSet, judged_samples, judged_settings
from mcore_swift.data.map_loader import check_same_data, hash_of
from mcore_swift.data.samples import Counts, SampleSet, make_samples
from mcore_swift.data.shape import LoaderShape
from mcore_swift.data.sources import Problem, WrongColumns, find_files, raise_problems
from mcore_swift.data.tokenized import EncodedRow, Encoder, SourceFile, TokenizedRows, encode_file
from mcore_swift.data.tokenizer import fingerprint, pad_id_of
from mcore_swift.data.wanted import Wanted
from mcore_swift.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mcore_swift.recipe import DataSection

BLOCK_ROWS = 4096
BLOCK_TOKENS = 1 << 20  # a block ends at either limit, but holds at least BLOCK_PACKS packs' worth of tokens
BLOCK_PACKS = 64


@dataclass(frozen=True)
class Place:
    """The row at which a block starts."""

    epoch: int = 0
    file: int = 0
    row: int = 0


@dataclass(frozen=True)
class Block:
    """`order`: sample numbers in the order they are used; `next`: where the block after it starts."""

    place: Place
    samples: SampleSet | JudgedSet
    order: np.ndarray
    next: Place


class StreamReader:
    """Blocks one after the other, without end, each a pure function of its place."""

    def __init__(
        self,
        files: list[Path],
        data: DataSection,
        encoder: Encoder,
        *,
        seed: int,
        block_rows: int = BLOCK_ROWS,
        wanted: Wanted = Wanted(),  # noqa: B008  (frozen)
    ) -> None:
        self.files, self.data, self.encoder, self.seed, self.block_rows = files, data, encoder, seed, block_rows
        self.block_tokens = max(BLOCK_TOKENS, BLOCK_PACKS * data.sequence_length)
        self.wanted = wanted
        self._open: tuple[Place, Iterator[EncodedRow], str] | None = None  # the reader of the file, at this place
        self._problems: list[Problem] = []

    def block(self, place: Place) -> Block:
        """The block that starts at `place`; it lies inside one file. Raises InputError for bad rows in it."""
        if self._open is None or self._open[0] != place or not place.row:
            self._open = self._reader(place)
        _, rows, format = self._open
        encoded, ended = self._take(rows)
        after = self._next_file(place) if ended else Place(place.epoch, place.file, place.row + len(encoded))
        self._open = (after, rows, format)
        return self._make(place, encoded, format, after)

    def _reader(self, place: Place) -> tuple[Place, Iterator[EncodedRow], str]:
        try:
            rows, layout = encode_file(
                self.files[place.file],
                self.encoder,
                format=self.wanted.format(self.data.format),
                problems=self._problems,
                skip=place.row,
            )
        except WrongColumns as error:
            raise InputError(f"{error}; {self.wanted}") from error
        return place, rows, layout.format

    def _take(self, rows: Iterator[EncodedRow]) -> tuple[list[EncodedRow], bool]:
        """The rows of one block, and whether the file ended."""
        encoded: list[EncodedRow] = []
        tokens = 0
        while len(encoded) < self.block_rows and tokens < self.block_tokens:
            row = next(rows, None)
            raise_problems(self._problems)
            if row is None:
                return encoded, True
            if row.weight != 1.0:
                raise InputError(
                    f"data.streaming: a row's weight is {row.weight:g}, but a weighted mean needs rows that are known"
                    " beforehand; set data.streaming: false, or leave the column out"
                )
            encoded.append(row)
            tokens += len(row.tokens)
        return encoded, False

    def _next_file(self, place: Place) -> Place:
        last = place.file + 1 == len(self.files)
        return Place(place.epoch + 1) if last else Place(place.epoch, place.file + 1)

    def _make(self, place: Place, encoded: list[EncodedRow], format: str, after: Place) -> Block:
        empty = np.zeros(0, dtype=np.int32)
        rows = TokenizedRows(
            tokens=np.concatenate([empty, *(row.tokens for row in encoded)]),
            loss=np.concatenate([empty.astype(np.uint8), *(row.loss for row in encoded)]),
            offsets=np.cumsum([0, *(len(row.tokens) for row in encoded)], dtype=np.int64),
            files=[SourceFile(self.files[place.file], len(encoded), format)],
            key="",
            first_row=place.row,
            judged=np.array([row.judged for row in encoded]).reshape(-1, 4) if self.wanted.judged else None,
        )
        self.wanted.check_weights(rows.all_weights, self.files[place.file])
        data = self.data
        samples = (
            judged_samples(rows, data, self.wanted)
            if self.wanted.judged
            else make_samples(rows, sequence_length=data.sequence_length, too_long=data.too_long, packing=data.packing)
        )
        order = np.arange(len(samples))
        if data.shuffle:
            order = np.random.default_rng([self.seed, place.epoch, place.file, place.row]).permutation(order)
        return Block(place, samples, order, after)


class StreamTrainLoader:
    """Goes forward only: steps are asked for one after the other, or from where `load_state_dict` put it."""

    def __init__(self, reader: StreamReader, *, shape: LoaderShape, pad_id: int, identity: object) -> None:
        self.reader, self.shape, self.pad_id = reader, shape, pad_id
        self._own = {
            "kind": "streaming",
            "fingerprint": hash_of(identity),
            "global_batch_size": shape.global_batch_size,
        }
        self.samples_per_epoch: int | None = None
        self._step, self._cursor = 0, 0
        self._block: Block | None = None
        self._start = Place()
        self._counts = JudgedCounts() if reader.wanted.judged else Counts()
        # One thread tokenizes the next block while this one is trained on.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
        self._ahead: Future[Block] | None = None

    def micro_batches(self, step: int) -> list[MicroBatch]:
        if step != self._step:
            raise ValueError(f"a stream goes forward only: step {self._step} is next, {step} was asked for")
        slots = self.shape.slots()
        mine = {slot for rank_slots in slots for slot in rank_slots}
        taken = {slot: self._next_sample(slot in mine) for slot in range(self.shape.global_batch_size)}
        self._step += 1
        return [self._collate([taken[slot] for slot in rank_slots]) for rank_slots in slots]

    def _collate(self, samples: list[Any]) -> MicroBatch:
        wanted, packing = self.reader.wanted, self.reader.data.packing
        if not wanted.judged:
            return collate(samples, packing=packing, shape=self.shape, pad_id=self.pad_id)
        return collate_judged(samples, form=wanted.form, packing=packing, shape=self.shape, pad_id=self.pad_id)

    def _next_sample(self, wanted: bool) -> list[Any]:
        block = self._current()
        sample = int(block.order[self._cursor])
        self._cursor += 1
        return block.samples.documents(sample) if wanted else []

    def _current(self) -> Block:
        """The block that holds the next sample."""
        block = self._block or self._enter(self._start)
        epoch = block.place.epoch
        while self._cursor >= len(block.order):
            if block.next.epoch > epoch + 1:
                raise InputError("data.train: a whole pass over the data gave no sample that can be used")
            self._cursor = 0
            block = self._enter(block.next)
        return block

    def _enter(self, place: Place) -> Block:
        ahead = self._ahead or self._worker.submit(self.reader.block, place)
        self._block = block = ahead.result()
        self._counts = self._counts.plus(block.samples.counts)
        self._ahead = self._worker.submit(self.reader.block, block.next)
        return block

    def report(self) -> dict[str, Any]:
        """Counts of the blocks entered so far by this process."""
        data = self.reader.data
        return self._counts.report(sequence_length=data.sequence_length if data.packing else None)

    def state_dict(self) -> dict[str, Any]:
        place = self._block.place if self._block else self._start
        return self._own | {"place": asdict(place), "cursor": self._cursor, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_same_data(state, self._own)
        if self._ahead is not None:
            self._ahead.cancel()  # one that already runs ends by itself, and the reader then reopens at the place
            self._ahead = None
        self._block, self._start = None, Place(**state["place"])
        self._cursor, self._step = state["cursor"], state["step"]


def build_streaming(
    data: DataSection,
    *,
    shape: LoaderShape,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    wanted: Wanted = Wanted(),  # noqa: B008  (frozen)
) -> StreamTrainLoader:
    """The training loader of a streaming recipe. Data are known by file names and sizes, not by their content."""
    files = find_files(source.path for source in data.train)
    if not any(file.stat().st_size for file in files):
        raise InputError(f"{', '.join(map(str, files))}: no rows")
    known = [(file.name, file.stat().st_size) for file in files]
    settings = [data.format, data.packing, data.sequence_length, data.too_long, data.shuffle]
    settings += judged_settings(data, wanted)
    identity = [known, fingerprint(tokenizer), settings, seed, BLOCK_ROWS, BLOCK_TOKENS]
    # A copy, since another thread uses it: the caller's own use would find the Rust object borrowed.
    reader = StreamReader(files, data, Encoder(copy.deepcopy(tokenizer)), seed=seed, wanted=wanted)
    return StreamTrainLoader(reader, shape=shape, pad_id=pad_id_of(tokenizer), identity=identity)
