"""Tensors as they lie on the disk: rectangles of raw bytes in files, whatever the format around them.

Safetensors, `torch_dist` and zipped .bin files all keep a tensor's rows as plain row-major bytes. Conversion is then a
copy of byte ranges from one set of rectangles to another.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mcore_swift.errors import InputError
from mcore_swift.weights.safetensors_io import ITEM_SIZE


@dataclass(frozen=True)
class Block:
    """A rectangle of a tensor, row-major and contiguous at byte `start` of `file`. offset, shape: in elements."""

    file: Path
    start: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor on the disk. dtype in safetensors' naming; the blocks tile the shape, which has at least one axis."""

    dtype: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * ITEM_SIZE[self.dtype]

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.row_bytes

    def check(self, name: str) -> None:
        """Raises InputError when the blocks don't tile the shape (each inside, no two alike, together as large)."""
        inside = all(
            len(block.offset) == len(block.shape) == len(self.shape)
            and all(o >= 0 and n >= 0 for o, n in zip(block.offset, block.shape, strict=True))
            and all(o + n <= size for o, n, size in zip(block.offset, block.shape, self.shape, strict=True))
            for block in self.blocks
        )
        volume = sum(math.prod(block.shape) for block in self.blocks)
        if not inside or volume != math.prod(self.shape) or len({b.offset for b in self.blocks}) != len(self.blocks):
            raise InputError(f"{name}: its parts don't make up its shape {list(self.shape)}: the checkpoint is damaged")

    def layer(self, number: int) -> Stored:
        """Slice `number` of the leading axis, without that axis (a homogeneous checkpoint stacks the layers)."""
        item = ITEM_SIZE[self.dtype]
        blocks = []
        for block in self.blocks:
            index = number - block.offset[0]
            if 0 <= index < block.shape[0]:
                start = block.start + index * math.prod(block.shape[1:]) * item
                blocks.append(replace(block, start=start, offset=block.offset[1:], shape=block.shape[1:]))
        return Stored(self.dtype, self.shape[1:], tuple(blocks))

    def merged(self) -> Stored:
        """[n, rows, …] as [n · rows, …]: the same bytes. Weight rules speak so of a stack of experts."""
        rows, item = self.shape[1], ITEM_SIZE[self.dtype]
        blocks = []
        for block in self.blocks:
            count, own, *inner = block.shape
            first, row, *rest = block.offset
            step = own * math.prod(inner) * item
            if own == rows:  # whole slices follow one another without a gap
                blocks.append(replace(block, offset=(first * rows, *rest), shape=(count * rows, *inner)))
                continue
            for number in range(count):
                offset = ((first + number) * rows + row, *rest)
                blocks.append(replace(block, start=block.start + number * step, offset=offset, shape=(own, *inner)))
        return Stored(self.dtype, (self.shape[0] * rows, *self.shape[2:]), tuple(blocks))


class Files:
    """Open descriptors by path; closed with the object."""

    def __init__(self, flags: int = os.O_RDONLY) -> None:
        self._flags = flags
        self._open: dict[Path, int] = {}

    def __getitem__(self, path: Path) -> int:
        if path not in self._open:
            self._open[path] = os.open(path, self._flags)
        return self._open[path]

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])


def read_exactly(descriptor: int, out: memoryview, start: int, *, name: str) -> None:
    """Fills `out` from byte `start`. Raises InputError when the file ends before."""
    while out:
        count = os.preadv(descriptor, [out], start)
        if not count:
            raise InputError(f"{name}: the file ends {len(out)} bytes too early: truncated")
        out, start = out[count:], start + count


def read_rows(stored: Stored, first: int, last: int, out: np.ndarray, files: Files) -> None:
    """Reads rows [first, last) into `out`, uint8 [(last − first) · row_bytes], contiguous."""
    view = memoryview(out)
    row_bytes = stored.row_bytes
    for block in stored.blocks:
        low, high = max(first, block.offset[0]), min(last, block.offset[0] + block.shape[0])
        if low >= high:
            continue
        own_row = math.prod(block.shape[1:]) * ITEM_SIZE[stored.dtype]
        start = block.start + (low - block.offset[0]) * own_row
        if own_row == row_bytes:
            part = view[(low - first) * row_bytes : (high - first) * row_bytes]
            read_exactly(files[block.file], part, start, name=str(block.file))
        else:
            _read_columns(stored, block, low - first, high - low, start, out, files)


def _read_columns(
    stored: Stored, block: Block, row: int, num_rows: int, start: int, out: np.ndarray, files: Files
) -> None:
    """A block narrower than the tensor (a row-parallel weight's shard): read whole, laid into its columns."""
    item = ITEM_SIZE[stored.dtype]
    part = np.empty(num_rows * math.prod(block.shape[1:]) * item, np.uint8)
    read_exactly(files[block.file], memoryview(part), start, name=str(block.file))
    target = out.reshape(-1, *stored.shape[1:], item)
    place = tuple(slice(o, o + n) for o, n in zip(block.offset[1:], block.shape[1:], strict=True))
    target[(slice(row, row + num_rows), *place)] = part.reshape(num_rows, *block.shape[1:], item)


def row_chunks(first: int, last: int, row_bytes: int, *, budget: int) -> Iterator[tuple[int, int]]:
    """Cuts rows [first, last) into pieces of at most `budget` bytes (at least one row)."""
    step = max(1, budget // max(row_bytes, 1))
    for low in range(first, last, step):
        yield low, min(low + step, last)
