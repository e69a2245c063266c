"""A model's tensors under their Hugging Face names, from whatever they are stored in, one at a time, without a model.

`open_source` finds out what a path holds. Nothing is read but headers until a tensor is asked for; nothing in a folder
is executed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from ckpt_tools.archive import read_archive
from ckpt_tools.decode import SCALE_SUFFIX, check_block_size, decode_fp8, scale_shape
from ckpt_tools.stored import Block, Files, Stored, read_rows
from ckpt_tools.torch_dist import checkpoint_folder, dtype_names, read_tensors
from mcore_swift.errors import InputError
from mcore_swift.models.build import ModelSource, read_source
from mcore_swift.models.keys import weight_rules
from mcore_swift.weights import mxfp4
from mcore_swift.weights import safetensors_io as st
from mcore_swift.weights.live import IGNORED_SUFFIXES
from mcore_swift.weights.rules import TensorRule

if TYPE_CHECKING:
    import torch

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ALLOWED = (
    "allowed: a Hugging Face folder (config.json with safetensors or pytorch_model.bin), a Megatron torch_dist"
    " checkpoint (.metadata and metadata.json), a GGUF file"
)


class TensorSource(Protocol):
    """A model on the disk. `read` gives a whole tensor, decoded (FP8, MXFP4 → bf16), in Hugging Face's layout."""

    path: Path
    kind: Literal["hf", "megatron"]
    model: ModelSource
    stored: dict[str, Stored]  # by its own side's names, shapes as they are on the disk

    @property
    def specs(self) -> Mapping[str, st.TensorSpec]:
        """Every tensor under its Hugging Face name: dtype in safetensors' naming, shape with the true vocabulary."""
        ...

    def read(self, name: str) -> torch.Tensor: ...


def is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def open_source(path: Path, *, config: Path | None = None) -> HFSource | MegatronSource:
    """The tensors of a Hugging Face folder or a Megatron checkpoint, found from the contents.

    `config`: a Hugging Face folder with the config.json of a Megatron checkpoint that holds none.
    Raises InputError, saying what was found and what is allowed, for anything else and for damaged headers.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; {ALLOWED}")
    if not path.is_dir():
        what = "a GGUF file: convert it to a Hugging Face folder first" if is_gguf(path) else "a file"
        raise InputError(f"{path}: {what}; {ALLOWED}")
    folder = checkpoint_folder(path)
    if (folder / ".metadata").is_file() or (folder / "metadata.json").is_file():
        return MegatronSource(folder, config=config)
    if config is not None:
        raise InputError(f"--config goes with a Megatron checkpoint, and {path} is none")
    if (path / "config.json").is_file():
        return HFSource(path)
    names = sorted(item.name for item in path.iterdir())
    found = f"{', '.join(names[:5])}{' …' if len(names) > 5 else ''}" if names else "nothing"
    raise InputError(f"{path}: not a model: found {found}; {ALLOWED}")


# --- Hugging Face -----------------------------------------------------------------------------------------------------


@dataclass
class HFSource:
    """A Hugging Face folder: safetensors or .bin files, sharded or not. `stored`, `scales`: by tensor name."""

    path: Path
    kind: Literal["hf", "megatron"] = "hf"
    model: ModelSource = field(init=False)
    specs: dict[str, st.TensorSpec] = field(init=False)
    stored: dict[str, Stored] = field(init=False)  # the tensors as they lie in the files
    scales: dict[str, Stored] = field(init=False)  # those of FP8 and MXFP4 tensors, by the name of the tensor
    _files: Files = field(init=False, default_factory=Files)

    def __post_init__(self) -> None:
        self.model = read_source(self.path)
        check_block_size(self.model.raw, self.path)
        found = _folder_tensors(self.path)
        packed = mxfp4.decoded_specs(found, self.path)
        blocks, block_scales = ({n: found.pop(n + end) for n in packed} for end in (mxfp4.BLOCKS, mxfp4.SCALES))
        self.stored = {
            name: stored
            for name, stored in found.items()
            if not name.endswith(IGNORED_SUFFIXES) and not (name.endswith(SCALE_SUFFIX) and _base(name) in found)
        }
        self.scales = {_base(name): stored for name, stored in found.items() if name not in self.stored}
        self.scales = {name: stored for name, stored in self.scales.items() if name in self.stored}
        for name, stored in self.stored.items():
            self._check_fp8(name, stored)
        self.specs = {
            name: st.TensorSpec("BF16" if name in self.scales else stored.dtype, stored.shape)
            for name, stored in self.stored.items()
        }
        self.stored |= blocks
        self.scales |= block_scales
        self.specs |= packed
        if "quantization_config" in self.model.raw:
            raw = {key: value for key, value in self.model.raw.items() if key != "quantization_config"}
            self.model = replace(self.model, raw=raw)

    def _check_fp8(self, name: str, stored: Stored) -> None:
        scales = self.scales.get(name)
        if stored.dtype == "F8_E4M3" and scales is None:
            raise InputError(f"{self.path}: {name} is F8_E4M3, but there is no {name}{SCALE_SUFFIX} with its scales")
        if scales is None:
            return
        if stored.dtype != "F8_E4M3" or scales.dtype != "F32" or len(stored.shape) != 2:
            raise InputError(
                f"{self.path}: {name}{SCALE_SUFFIX} is {scales.dtype} and {name} {stored.dtype}; needed are F32 scales"
                " of an F8_E4M3 matrix"
            )
        if scales.shape != scale_shape(stored.shape):
            raise InputError(
                f"{self.path}: {name}{SCALE_SUFFIX} has shape {list(scales.shape)}; a weight of {list(stored.shape)}"
                f" needs {list(scale_shape(stored.shape))}"
            )

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor; float8 and MXFP4 with their scales applied, bf16."""
        import torch

        if is_mxfp4(self.stored[name]):
            whole = torch.empty(self.specs[name].shape, dtype=torch.bfloat16)
            for expert, own in enumerate(whole):
                own.copy_(read_expert(self.stored[name], self.scales[name], expert, self._files))
            return whole
        values = read_whole(self.stored[name], self._files)
        if name not in self.scales:
            return values
        return decode_fp8(values, read_whole(self.scales[name], self._files))


def _base(name: str) -> str:
    return name.removesuffix(SCALE_SUFFIX)


def is_mxfp4(stored: Stored) -> bool:
    return stored.dtype == "U8"


def read_expert(stored: Stored, scales: Stored | None, expert: int, files: Files) -> torch.Tensor:
    """An expert's slice of a Hugging Face tensor that packs all of a layer's; MXFP4 decoded."""
    values = read_whole(stored.layer(expert), files)
    if scales is None:
        return values
    return mxfp4.decode_mxfp4(values, read_whole(scales.layer(expert), files)).T


def _folder_tensors(folder: Path) -> dict[str, Stored]:
    index = next((name for name in (st.INDEX, BIN_INDEX) if (folder / name).is_file()), None)
    if (folder / st.SINGLE).is_file() and index == BIN_INDEX:
        index = None
    names = _indexed_files(folder / index) if index else [st.SINGLE, BIN]
    for name in names:
        if (folder / name).is_symlink() or (folder / name).exists():
            check_inside(folder, name)
    if index == BIN_INDEX or (index is None and not (folder / st.SINGLE).is_file() and (folder / BIN).is_file()):
        return _bin_tensors(folder, index)
    _check_ranges(entries := st.SafetensorsFolder(folder).entries, folder)
    tensors = {}
    for name, entry in entries.items():
        shape = entry.shape or (1,)
        tensors[name] = Stored(entry.dtype, shape, (Block(entry.file, entry.start, (0,) * len(shape), shape),))
    return tensors


def _indexed_files(index: Path) -> list[str]:
    """The files that an index names, which must be plain names inside the folder."""
    try:
        names = list(dict.fromkeys(str(name) for name in json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{index}: not an index of weight files: it needs a table called weight_map") from None
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise InputError(f"{index}: it names the file {name!r}; allowed are files inside the folder")
    return names


def check_inside(folder: Path, name: str) -> None:
    """Refuses a link that leads out of the folder, but into the blobs of the hub's cache that it is a snapshot of."""
    target, home = (folder / name).resolve(), folder.resolve()
    allowed = [home] + ([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])
    if not any(target.is_relative_to(place) for place in allowed):
        raise InputError(f"{folder / name}: a link to {target}, outside the folder; put the file itself there")


def _check_ranges(entries: Mapping[str, st.Entry], folder: Path) -> None:
    """Raises InputError when a header's byte ranges are reversed, overlap, or lie in the header itself."""
    last: dict[Path, tuple[int, str]] = {}
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        end, other = last.get(entry.file, (8, "the header"))
        if entry.start < end or entry.end < entry.start:
            raise InputError(f"{entry.file}: damaged header: {name} overlaps {other}")
        if any(not isinstance(size, int) or size < 0 for size in entry.shape):
            raise InputError(f"{entry.file}: damaged header: {name} has shape {list(entry.shape)}")
        last[entry.file] = entry.end, name


def _bin_tensors(folder: Path, index: str | None) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for name in _indexed_files(folder / index) if index else [BIN]:
        content = read_archive(folder / name)
        if not isinstance(content, dict) or not content:
            raise InputError(f"{folder / name}: no table of tensors; expected is a state_dict saved by torch.save")
        tensors |= content
    if index:
        for name in json.loads((folder / index).read_text())["weight_map"]:
            if name not in tensors:
                raise InputError(f"{folder / index}: tensor {name} is listed, but in none of the files")
    return tensors


# --- Megatron ---------------------------------------------------------------------------------------------------------


@dataclass
class MegatronSource:
    """A Megatron checkpoint, by global key: `stored`, the vocabulary padded as it was saved; `rules`; `rows`, the same
    as the rules speak of it: without an axis of experts. `state`: not the weights, but what the optimizer holds of
    each under this name; of weights that it doesn't train there is none."""

    path: Path
    config: Path | None = None
    state: str | None = None
    kind: Literal["hf", "megatron"] = "megatron"
    model: ModelSource = field(init=False)
    specs: dict[str, st.TensorSpec] = field(init=False)
    stored: dict[str, Stored] = field(init=False)
    rules: dict[str, TensorRule] = field(init=False)
    rows: dict[str, Stored] = field(init=False)
    scales: dict[str, Stored] = field(init=False, default_factory=dict)  # there are none
    _files: Files = field(init=False, default_factory=Files)

    def __post_init__(self) -> None:
        _check_format(self.path)
        self.model = read_source(_config_folder(self.path, self.config))
        self.stored = read_tensors(self.path, state=self.state)
        self.rules = weight_rules(self.model)
        found = {key: rule for key, rule in self.rules.items() if key in self.stored and _fits(rule, self.stored[key])}
        self.rows = {key: as_rows(rule, self.stored[key]) for key, rule in found.items()}
        self._where = {name: (rule, part) for rule in found.values() for part, name in rule.parts()}
        self.specs = {
            name: st.TensorSpec(self.rows[rule.key].dtype, self.shape(rule, part))
            for name, (rule, part) in self._where.items()
        }

    def shape(self, rule: TensorRule, part: int) -> tuple[int, ...]:
        """The shape of a part of a global tensor."""
        if rule.packed:
            return rule.hf_shapes(self.stored[rule.key].shape)[part]
        rows, *inner = self.rows[rule.key].shape
        if rule.rows:
            rows = rule.rows[part]
        elif rule.vocabulary:
            rows = min(rows, self.model.vocab_size)
        return (rows, *inner)

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor, put together from its rows in the global one."""
        rule, part = self._where[name]
        if rule.packed:
            return self._read_packed(rule)
        stored, shape = self.rows[rule.key], self.shape(rule, part)
        out = np.empty(shape[0] * stored.row_bytes, np.uint8)
        for first, last, target in part_segments(rule, part, 0, shape[0]):
            piece = out[target * stored.row_bytes : (target + last - first) * stored.row_bytes]
            read_rows(stored, first, last, piece, self._files)
        return as_tensor(out, stored.dtype, shape)

    def _read_packed(self, rule: TensorRule) -> torch.Tensor:
        import torch

        stored = self.stored[rule.key]
        whole = torch.empty(self.shape(rule, 0), dtype=torch_dtype(stored.dtype))
        for expert, own in enumerate(whole):
            own.copy_(rule.pack(read_whole(stored.layer(expert), self._files)))
        return whole


def _fits(rule: TensorRule, stored: Stored) -> bool:
    """Whether a tensor has the axis of experts that its rule says it has."""
    return not rule.stack or (len(stored.shape) > 1 and stored.shape[0] == rule.stack)


def as_rows(rule: TensorRule, stored: Stored) -> Stored:
    """A global tensor as its rule speaks of it: a stack of experts [experts, rows, …] is [experts · rows, …]."""
    return stored.merged() if rule.stack else stored


def part_segments(rule: TensorRule, part: int, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Where rows [start, stop) of a part lie in the global tensor: the inverse of `TensorRule.segments`.

    Yields (first, last, target): rows [first, last) of the global tensor are rows [target, …) counted from `start`.
    """
    if not rule.rows:
        yield start, stop, 0
        return
    block = [rows // rule.groups for rows in rule.rows]
    before, own = sum(block[:part]), block[part]
    for group in range(start // own, -(-stop // own)):
        low, high = max(start, group * own), min(stop, (group + 1) * own)
        first = group * sum(block) + before + low - group * own
        yield first, first + high - low, low - start


def _check_format(folder: Path) -> None:
    path = folder / "metadata.json"
    if not path.is_file():
        raise InputError(f"{folder}: an incomplete Megatron checkpoint: it has .metadata, but no metadata.json")
    try:
        backend = json.loads(path.read_text())["sharded_backend"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged: {error}") from None
    if backend != "torch_dist":
        raise InputError(f"{path}: sharded_backend {backend!r} is not supported; allowed: 'torch_dist'")


def _config_folder(folder: Path, config: Path | None) -> Path:
    if config is not None:
        return config
    if not (folder / "hf" / "config.json").is_file():
        raise InputError(
            f"{folder}: this Megatron checkpoint has no hf/config.json, so its model is not known; name a Hugging Face"
            " folder of the same model with --config FOLDER (its config.json and tokenizer are used)"
        )
    return folder / "hf"


# --- tensors ----------------------------------------------------------------------------------------------------------


def read_whole(stored: Stored, files: Files | None = None) -> torch.Tensor:
    """A whole tensor as it is stored."""
    files = files or Files()
    out = np.empty(stored.nbytes, np.uint8)
    read_rows(stored, 0, stored.shape[0], out, files)
    return as_tensor(out, stored.dtype, stored.shape)


def as_tensor(data: np.ndarray, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Raw bytes, uint8 [n], as a tensor that shares their memory."""
    import torch

    assert data.size == math.prod(shape) * st.ITEM_SIZE[dtype]
    return torch.from_numpy(data).view(torch_dtype(dtype)).view(shape)


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's bytes, uint8 [n]; a copy where it is not contiguous."""
    import torch

    return tensor.contiguous().flatten().view(torch.uint8).numpy()


def torch_dtype(name: str) -> Any:
    import torch

    known = {code: dtype for dtype, code in dtype_names().items()} | {"F8_E4M3": torch.float8_e4m3fn}
    if name not in known:
        raise InputError(f"tensors of dtype {name} can't be read; allowed: {', '.join(known)}")
    return known[name]
