"""Safetensors folders: checked headers, sliced reads, and files that many ranks write at once.

Reading goes through the safetensors library. Writing is our own, because the library writes a file from one process:
the header fixes every tensor's place beforehand, so that any rank can write any tensor at its offset, without talking.
Format: 8 bytes little-endian header length, JSON header, data (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_swift.errors import InputError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ITEM_SIZE = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
}
MAX_HEADER = 100 << 20


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `start` and `end` are byte offsets in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file. Raises InputError when the file is truncated or not safetensors."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(MAX_HEADER, size - 8):
                raise ValueError(f"its header would take {length} bytes, the file has {size}")
            entries = _entries(path, json.loads(file.read(length)), base=8 + length)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, struct.error) as error:
        raise InputError(f"{path}: not a safetensors file, or truncated: {error}") from None
    end = max((entry.end for entry in entries.values()), default=8 + length)
    if end > size:
        raise InputError(f"{path}: truncated: its header speaks of {end} bytes, the file has {size}")
    return entries


def _entries(path: Path, header: Any, *, base: int) -> dict[str, Entry]:
    """The header's tensors; their offsets count from `base`. Raises ValueError when it is not a table of tensors."""
    try:
        entries = {
            name: Entry(path, item["dtype"], tuple(item["shape"]), *(base + offset for offset in item["data_offsets"]))
            for name, item in header.items()
            if name != "__metadata__"
        }
    except (AttributeError, KeyError, TypeError):
        raise ValueError("its header is not a table of tensors") from None
    for name, entry in entries.items():
        if ITEM_SIZE.get(entry.dtype) and TensorSpec(entry.dtype, entry.shape).nbytes != entry.end - entry.start:
            raise ValueError(
                f"{name} is {entry.dtype} {list(entry.shape)}, but has {entry.end - entry.start} bytes in the file"
            )
    return entries


class SafetensorsFolder:
    """The tensors of a Hugging Face folder: one file, or several with an index.

    Raises InputError for a folder without safetensors, a missing file, and an index that disagrees with its files.
    """

    def __init__(self, folder: Path, *, single: str = SINGLE) -> None:
        """`single`: what the file is called when there is only one."""
        self.folder = folder
        self.bytes_read = 0
        self._handles: dict[Path, Any] = {}
        index = folder / INDEX
        if index.is_file():
            weight_map = _weight_map(index)
            files = [folder / name for name in dict.fromkeys(weight_map.values())]
        elif (folder / single).is_file():
            weight_map, files = {}, [folder / single]
        else:
            raise InputError(
                f"{folder}: no {single} and no {INDEX}; weights are read from safetensors only"
                " (pickled .bin files could execute code: convert them first)"
            )
        self.entries = {name: entry for file in files for name, entry in read_header(file).items()}
        for name, file in weight_map.items():
            if name not in self.entries or self.entries[name].file.name != file:
                raise InputError(f"{index}: tensor {name} is listed in {file}, but it is not there")

    @staticmethod
    def names(folder: Path) -> set[str]:
        """The names of a folder's tensors, from its index where it has one; none where it has no weights."""
        if (folder / INDEX).is_file():
            return set(_weight_map(folder / INDEX))
        return set(read_header(folder / SINGLE)) if (folder / SINGLE).is_file() else set()

    def read(self, name: str, *slices: slice) -> torch.Tensor:
        """Reads `name`, or the part that `slices` (one for each leading axis) select; only those bytes are read."""
        from safetensors import safe_open

        entry = self.entries[name]
        if entry.file not in self._handles:
            self._handles[entry.file] = safe_open(entry.file, framework="pt")
        tensor = (
            self._handles[entry.file].get_slice(name)[slices or slice(None)]
            if entry.shape
            else self._handles[entry.file].get_tensor(name)
        )
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor → file name, from an index file. Raises InputError when it isn't one."""
    try:
        found = json.loads(index.read_text())["weight_map"]
        return {str(name): str(file) for name, file in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{index}: not an index of safetensors files: it needs a table called weight_map") from None


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: dtype in safetensors' naming, shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * ITEM_SIZE[self.dtype]


@dataclass(frozen=True)
class OutputPlan:
    """Where each tensor of a new folder goes. Every rank computes the same plan."""

    files: Mapping[str, bytes]  # file name → its first bytes (length and header)
    places: Mapping[str, tuple[str, int]]  # tensor → (file name, byte offset)
    sizes: Mapping[str, int]  # file name → bytes in all
    index: dict[str, Any] | None  # the index file's content, when there are several files

    @property
    def total_bytes(self) -> int:
        return sum(self.sizes.values())


def plan_output(
    tensors: Mapping[str, TensorSpec], *, max_shard_bytes: float = 5 * 10**9, single: str = SINGLE
) -> OutputPlan:
    """Spreads tensors over files of at most `max_shard_bytes` (a larger tensor has a file of its own), in order.

    `single`: what the file is called when there is only one.
    """
    shards: list[list[str]] = []
    room = 0.0
    for name, spec in tensors.items():
        if not shards or spec.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= spec.nbytes
    files: dict[str, bytes] = {}
    places: dict[str, tuple[str, int]] = {}
    sizes: dict[str, int] = {}
    for number, names in enumerate(shards, 1):
        file = single if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files[file], offsets, sizes[file] = _header({name: tensors[name] for name in names})
        places |= {name: (file, offset) for name, offset in offsets.items()}
    index = None
    if len(shards) > 1:
        total = sum(spec.nbytes for spec in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": {name: file for name, (file, _) in places.items()}}
    return OutputPlan(files, places, sizes, index)


def _header(tensors: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int], int]:
    """A file's first bytes, each tensor's byte offset in the file, the file's size."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position, starts = 0, {}
    # Larger items first keeps every tensor aligned to its item size, which the format's readers rely on.
    for name, spec in sorted(tensors.items(), key=lambda item: -ITEM_SIZE[item[1].dtype]):
        starts[name] = position
        header[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: base + start for name, start in starts.items()}, base + position


def create_files(folder: Path, plan: OutputPlan) -> None:
    """Creates the plan's files at full size with their headers, and the index: one rank's work, before all write."""
    for name, header in plan.files.items():
        with (folder / name).open("wb") as file:
            # Claims the space now: a full disk is found before hours of writing, and not in the middle of a file.
            os.posix_fallocate(file.fileno(), 0, plan.sizes[name])
            file.write(header)
    if plan.index is not None:
        (folder / INDEX).write_text(index_text(plan.index))


def index_text(index: dict[str, Any]) -> str:
    """The index file's text."""
    return json.dumps(index, indent=2) + "\n"


def write_tensor(folder: Path, plan: OutputPlan, name: str, tensor: torch.Tensor, *, index: int | None = None) -> None:
    """Writes one whole tensor (on the CPU, already in its planned dtype) at its place, or slice `index` of axis 0."""
    import torch

    file, offset = plan.places[name]
    data = memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())
    offset += (index or 0) * data.nbytes
    descriptor = os.open(folder / file, os.O_WRONLY)
    try:
        while data:
            written = os.pwrite(descriptor, data, offset)
            data, offset = data[written:], offset + written
    finally:
        os.close(descriptor)
