"""What torch.save writes, taken apart without torch.load: where in the file each tensor's bytes lie.

A saved file is an uncompressed zip archive: data.pkl describes the tensors, data/N are their storages. Its pickle is
read by an unpickler that knows tensors and plain containers only: nothing in it is ever executed. A part of a
`torch_dist` file is such an archive, and so is pytorch_model.bin.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import struct
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

from ckpt_tools.stored import Block, Stored
from mcore_swift.errors import InputError

# torch's storage classes → safetensors' names.
STORAGES = {
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "Float8_e4m3fnStorage": "F8_E4M3",
}
LOCAL_HEADER = 30  # bytes of a zip member's local header before its name and extra field


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of the pickle: dtype, its storage's key, and offset, shape, stride in elements."""

    dtype: str
    storage: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _rebuild(storage: tuple[str, str], offset: int, shape: Any, stride: Any, *_: Any) -> SavedTensor:
    return SavedTensor(*storage, offset, tuple(shape), tuple(stride))


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("torch", "Size"): tuple,
            ("collections", "OrderedDict"): collections.OrderedDict,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no file of tensors needs; it was not run")
        return known[module, name]

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        kind, dtype, key, *_ = pid
        if kind != "storage" or dtype not in STORAGES.values():
            raise pickle.UnpicklingError(f"unknown storage {pid!r}")
        return dtype, str(key)


class _Window(io.RawIOBase):
    """Bytes [start, start + length) of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = (0, self._position, self._length)[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._position)
        size = left if size is None or size < 0 else min(size, left)
        self._file.seek(self._start + self._position)
        data = self._file.read(size)
        self._position += len(data)
        return data


def read_archive(path: Path, start: int = 0, length: int | None = None) -> Any:
    """The content of an archive at bytes [start, start + length) of `path`, with `Stored` in place of tensors.

    Raises InputError when it isn't one, is truncated, needs code to be run, or holds tensors that aren't contiguous.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if length is not None and (start < 0 or start + length > size):
                raise ValueError(f"bytes {start} to {start + length} are asked for, the file has {size}: truncated")
            window = _Window(file, start, size if length is None else length)
            with zipfile.ZipFile(cast(Any, window)) as archive:
                members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
                data = archive.read(members["data.pkl"])
            content = _Unpickler(io.BytesIO(data)).load()
            places = {
                name.removeprefix("data/"): (start + _data_start(window, info), info.file_size)
                for name, info in members.items()
                if name.startswith("data/")
            }
        if isinstance(content, SavedTensor):
            return _stored(content, places, path)
        return {name: _stored(item, places, path) for name, item in content.items() if isinstance(item, SavedTensor)}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{path}: not a file of torch.save, or damaged: it has no {error}") from None
    except Exception as error:  # a damaged archive or pickle fails in whatever way its bytes lead to
        hint = "; files of torch < 1.6 are not zip archives" if isinstance(error, zipfile.BadZipFile) else ""
        raise InputError(f"{path}: not a file of torch.save, or damaged: {error}{hint}") from None


def _data_start(window: _Window, info: zipfile.ZipInfo) -> int:
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")
    window.seek(info.header_offset)
    header = window.read(LOCAL_HEADER)
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    return info.header_offset + LOCAL_HEADER + name_length + extra_length


def _stored(tensor: SavedTensor, places: dict[str, tuple[int, int]], path: Path) -> Stored:
    from mcore_swift.weights.safetensors_io import ITEM_SIZE

    expected, step = [], 1
    for size in reversed(tensor.shape):
        expected.insert(0, step)
        step *= size
    if any(n != 1 and have != want for n, have, want in zip(tensor.shape, tensor.stride, expected, strict=True)):
        raise ValueError(f"a tensor of shape {list(tensor.shape)} is not contiguous (strides {list(tensor.stride)})")
    start, size = places[tensor.storage]
    item = ITEM_SIZE[tensor.dtype]
    if tensor.offset < 0 or (tensor.offset + math.prod(tensor.shape)) * item > size:
        raise ValueError(f"a tensor of shape {list(tensor.shape)} is larger than its storage of {size} bytes")
    shape = tensor.shape or (1,)
    block = Block(path, start + tensor.offset * item, (0,) * len(shape), shape)
    return Stored(tensor.dtype, shape, (block,))


# --- writing ----------------------------------------------------------------------------------------------------------

ALIGNMENT = 64  # of the data, as torch.save aligns it


class _Storage:
    """Stands for a storage while a tensor is pickled."""

    def __init__(self, dtype: str, size: int) -> None:
        self.dtype, self.size = dtype, size


class _Tensor:
    def __init__(self, dtype: str, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape = dtype, shape

    def __reduce__(self) -> tuple[Any, ...]:
        from torch._utils import _rebuild_tensor_v2

        strides = tuple(math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))
        storage = _Storage(self.dtype, math.prod(self.shape))
        return _rebuild_tensor_v2, (storage, 0, self.shape, strides, False, collections.OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        import torch

        name = next(name for name, dtype in STORAGES.items() if dtype == obj.dtype)
        return "storage", getattr(torch, name), "0", "cpu", obj.size


@lru_cache(maxsize=1024)  # the experts of a model have few shapes and tens of thousands of chunks
def frame(dtype: str, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """What stands before and after a tensor's bytes in an archive that torch.load reads; for less than 4 GiB.

    The first part is a multiple of ALIGNMENT long. The data's checksum is left 0: torch does not look at it (its own
    `torch.serialization.set_crc32_options(False)` leaves it out too), and computing it would halve the speed.
    """
    from mcore_swift.weights.safetensors_io import ITEM_SIZE

    pickled = io.BytesIO()
    _Pickler(pickled, protocol=2).dump(_Tensor(dtype, shape))
    size = math.prod(shape) * ITEM_SIZE[dtype]
    assert size < 1 << 32, "zip64 is not written: cut the tensor into chunks"
    members = [
        ("data.pkl", pickled.getvalue()),
        (".format_version", b"1"),
        ("byteorder", b"little"),
        ("version", b"3\n"),
    ]
    head, directory = b"", b""
    for name, data in members:
        local, entry = _member(f"archive/{name}", len(data), zlib.crc32(data), offset=len(head))
        head, directory = head + local + data, directory + entry
    bare = LOCAL_HEADER + len("archive/data/0")
    padding = -(len(head) + bare + 4) % ALIGNMENT
    local, entry = _member("archive/data/0", size, 0, offset=len(head), padding=padding)
    head, directory = head + local, directory + entry
    end = struct.pack(
        "<IHHHHIIH", 0x06054B50, 0, 0, len(members) + 1, len(members) + 1, len(directory), len(head) + size, 0
    )
    return head, directory + end


def _member(name: str, size: int, checksum: int, *, offset: int, padding: int | None = None) -> tuple[bytes, bytes]:
    """A stored member's local header and its entry in the directory (APPNOTE.TXT 4.3.7 and 4.3.12)."""
    extra = b"" if padding is None else struct.pack("<HH", 0x4246, padding) + b"Z" * padding
    common = struct.pack("<HHHHIII", 0, 0, 0, 0x21, checksum, size, size)  # 1980-01-01: the same bytes each time
    local = struct.pack("<IH", 0x04034B50, 20) + common + struct.pack("<HH", len(name), len(extra))
    entry = struct.pack("<IHH", 0x02014B50, 20, 20) + common
    entry += struct.pack("<HHHHHII", len(name), 0, 0, 0, 0, 0, offset)
    return local + name.encode() + extra, entry + name.encode()
