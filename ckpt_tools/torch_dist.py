"""Megatron's `torch_dist` folders, read and planned without Megatron, a process group or a model.

A tensor is a list of chunks; each chunk is an archive of torch.save somewhere in a `.distcp` file; `.metadata` says
where. Layers are stacked or apart, keys may have a prefix: what is read comes back under one naming, `GLOBAL_KEYS`'.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ckpt_tools.archive import ALIGNMENT, frame, read_archive
from ckpt_tools.stored import Block, Stored, row_chunks
from mcore_swift.errors import InputError
from mcore_swift.weights.dist_index import read_index
from mcore_swift.weights.safetensors_io import TensorSpec

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

FORMAT = '{"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}'  # metadata.json
COMMON_STATE = "common_state/shard_0_1"  # where Megatron's loader looks for what is not sharded
CHUNK_BYTES = 256 << 20
TRACKER = "latest_checkpointed_iteration.txt"

# How the local layer spec calls what Transformer Engine's fused layers call otherwise.
_RENAMED = (
    (re.compile(r"\.input_layernorm\.(weight|bias)$"), r".self_attention.linear_qkv.layer_norm_\1"),
    (re.compile(r"\.pre_mlp_layernorm\.(weight|bias)$"), r".mlp.linear_fc1.layer_norm_\1"),
)
_STACKED = re.compile(r"decoder\.layers\.(?!\d+\.)")


def checkpoint_folder(path: Path) -> Path:
    """The folder with the tensors: `path`, or the newest iteration where Megatron-LM keeps several there."""
    tracker = path / TRACKER
    if (path / ".metadata").is_file() or not tracker.is_file():
        return path
    text = tracker.read_text(errors="replace").strip()
    if not text.isdigit():
        raise InputError(f"{tracker}: found {text[:40]!r}; expected an iteration's number (name its folder instead)")
    return path / f"iter_{int(text):07d}"


def read_tensors(folder: Path) -> dict[str, Stored]:
    """The model's tensors by global key, one a layer; optimizer state and objects are left aside.

    Raises InputError when the index, or what it says of the files, is damaged.
    """
    index = read_index(folder)
    tensors: dict[str, Stored] = {}
    for key, item in index.state_dict_metadata.items():
        parts = key.split(".")
        if "optimizer" in parts[:2] or not hasattr(item, "chunks") or parts[-1] == "_extra_state":
            continue
        name = canonical(key)
        stored = _tensor(folder, index, key, item)
        if _STACKED.match(name):
            rest = name.removeprefix("decoder.layers.")
            layers = {f"decoder.layers.{i}.{rest}": stored.layer(i) for i in range(stored.shape[0])}
        else:
            layers = {name: stored}
        for name, layer in layers.items():
            if name in tensors:
                raise InputError(f"{folder}/.metadata: {name} is there twice, under different names")
            layer.check(f"{folder}: {key}")
            tensors[name] = layer
    if not tensors:
        raise InputError(f"{folder}: a torch_dist checkpoint without model tensors")
    return tensors


def canonical(key: str) -> str:
    """A global key without the prefixes of other programs, layer norms under Transformer Engine's names."""
    key = re.sub(r"^(model\.|module\.)+", "", key)
    for pattern, name in _RENAMED:
        key = pattern.sub(name, key)
    return key


def _tensor(folder: Path, index: Metadata, key: str, item: Any) -> Stored:
    from torch.distributed.checkpoint.metadata import MetadataIndex

    dtype = dtype_names().get(item.properties.dtype)
    if dtype is None:
        raise InputError(f"{folder}: {key} is {item.properties.dtype}; allowed: {', '.join(dtype_names().values())}")
    blocks = []
    for chunk in item.chunks:
        info = index.storage_data.get(MetadataIndex(key, chunk.offsets))
        if info is None:
            raise InputError(f"{folder}/.metadata: no file is given for a part of {key}: the index is damaged")
        part = read_archive(_inside(folder, info), info.offset, info.length)
        if not isinstance(part, Stored) or part.dtype != dtype or part.shape != (tuple(chunk.sizes) or (1,)):
            raise InputError(f"{folder}/{info.relative_path}: what lies there is not the part of {key} it should be")
        (block,) = part.blocks
        blocks.append(Block(block.file, block.start, tuple(chunk.offsets) or (0,), block.shape))
    return Stored(dtype, tuple(item.size) or (1,), tuple(blocks))


def _inside(folder: Path, info: Any) -> Path:
    """The file of a part, which must lie in the folder. Raises InputError for anything else."""
    name = str(info.relative_path)
    if getattr(info, "transform_descriptors", None):
        raise InputError(f"{folder}: {name} is compressed or encoded ({info.transform_descriptors}), which isn't known")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{folder}/.metadata: it names the file {name}, which is outside the folder")
    return folder / name


def dtype_names() -> dict[Any, str]:
    """torch's dtypes that model tensors have → safetensors' names. A function, since importing torch takes seconds."""
    import torch

    return {
        torch.float32: "F32",
        torch.bfloat16: "BF16",
        torch.float16: "F16",
        torch.float64: "F64",
        torch.int64: "I64",
        torch.uint8: "U8",
    }


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass
class CheckpointPlan:
    """Where each tensor of a new checkpoint goes, and everything around the tensors' own bytes."""

    sizes: dict[str, int] = field(default_factory=dict)  # file → bytes
    fixed: list[tuple[str, int, bytes]] = field(default_factory=list)  # file, byte offset, content
    tensors: dict[str, Stored] = field(default_factory=dict)
    small: dict[str, bytes] = field(default_factory=dict)  # whole small files


def plan_checkpoint(
    tensors: Mapping[str, TensorSpec], folder: Path, *, max_shard_bytes: int = 5 * 10**9, chunk_bytes: int = CHUNK_BYTES
) -> CheckpointPlan:
    """Plans a checkpoint of whole tensors under global keys, cut along axis 0 into chunks of about `chunk_bytes`.

    A file has at most `max_shard_bytes` (more where one chunk is larger).
    """
    plan, places = CheckpointPlan(), {}
    number, position = 0, 0
    for key, spec in tensors.items():
        blocks = []
        row_bytes = spec.nbytes // max(spec.shape[0], 1)
        for first, last in row_chunks(0, spec.shape[0], row_bytes, budget=min(chunk_bytes, max_shard_bytes)):
            shape = (last - first, *spec.shape[1:])
            head, tail = frame(spec.dtype, shape)
            length = len(head) + (last - first) * row_bytes + len(tail)
            if position and position + length > max_shard_bytes:
                number, position = number + 1, 0
            name, offset = f"__0_{number}.distcp", (first, *(0 for _ in spec.shape[1:]))
            data = position + len(head)
            plan.fixed += [(name, position, head), (name, position + length - len(tail), tail)]
            places[key, offset] = name, position, length, shape
            blocks.append(Block(folder / name, data, offset, shape))
            position += length + -length % ALIGNMENT
            plan.sizes[name] = position
        plan.tensors[key] = Stored(spec.dtype, spec.shape, tuple(blocks))
    name, objects = f"__0_{number}.distcp", {}
    for keys, content in (([COMMON_STATE], [{}]), (extra_states(tensors), [None])):
        data = _saved(content)
        plan.fixed.append((name, position, data))
        objects |= dict.fromkeys(keys, (name, position, len(data)))
        position += len(data)
    plan.sizes[name] = position
    index = _index(tensors, places, objects)
    plan.small = {".metadata": pickle.dumps(index), "metadata.json": FORMAT.encode()}
    return plan


def extra_states(keys: Iterable[str]) -> list[str]:
    """The objects that Megatron's linear layers and Transformer Engine's attention ask for next to their tensors.

    They hold FP8 scales where there are any. A model without them is content with None, but not with nothing: its
    loader refuses a checkpoint that lacks a key.
    """
    modules = [key.removesuffix(".weight") for key in keys if ".linear_" in key and key.endswith(".weight")]
    modules += [name.replace("linear_qkv", "core_attention") for name in modules if name.endswith("linear_qkv")]
    return [f"{module}._extra_state/shard_0_1" for module in modules]


def _index(
    tensors: Mapping[str, TensorSpec],
    places: Mapping[tuple[str, tuple[int, ...]], tuple[str, int, int, tuple[int, ...]]],
    objects: Mapping[str, tuple[str, int, int]],
) -> Metadata:
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    torch_dtypes = {name: dtype for dtype, name in dtype_names().items()}
    items: dict[str, Any] = {key: BytesStorageMetadata() for key in objects}
    storage = {MetadataIndex(key): _StorageInfo(*place) for key, place in objects.items()}
    for (key, offset), (file, position, length, shape) in places.items():
        spec = tensors[key]
        if key not in items:
            items[key] = TensorStorageMetadata(TensorProperties(torch_dtypes[spec.dtype]), torch.Size(spec.shape), [])
        where = MetadataIndex(key, torch.Size(offset), len(items[key].chunks))
        items[key].chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(shape)))
        storage[where] = _StorageInfo(file, position, length)
    return Metadata(items, storage_data=storage)


def _saved(content: Any) -> bytes:
    import torch

    data = io.BytesIO()
    torch.save(content, data)
    return data.getvalue()
