"""Megatron's `torch_dist` folders, read and planned without Megatron, a process group or a model.

A tensor is a list of chunks; each chunk is an archive of torch.save somewhere in a `.distcp` file; `.metadata` says
where. Layers are stacked or apart, keys may have a prefix: what is read comes back under one naming, `GLOBAL_KEYS`'.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
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

# A layer's norms: alone, or fused into the linear layer after it, where a layer has that one. Transformer Engine fuses
# what can be; Megatron's local spec writes the names of both kinds whatever there is.
_NORMS = (
    ("input_layernorm.", "self_attention.linear_qkv"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1"),
    ("self_attention.q_layernorm.", "self_attention.linear_q_up_proj"),
    ("self_attention.kv_layernorm.", "self_attention.linear_kv_up_proj"),
)
_HAS_EXTRA_STATE = re.compile(r"\.(linear_\w+|eh_proj|\w*norm)\.weight$")
_STATE = re.compile(r"optimizer\.state\.(?P<state>\w+)\.(?P<key>.+)")  # as the trainer names them
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


def read_tensors(folder: Path, *, state: str | None = None) -> dict[str, Stored]:
    """The model's tensors by global key, one a layer; optimizer state and objects are left aside.

    With `state`, one of `optimizer_states`, that state of each parameter under the parameter's key instead.
    Raises InputError when the index, or what it says of the files, is damaged.
    """
    index = read_index(folder)
    tensors: dict[str, Stored] = {}
    own = {key: key for key, item in index.state_dict_metadata.items() if _is_model_tensor(key, item)}
    if state is not None:
        found = [(key, _STATE.fullmatch(key)) for key in index.state_dict_metadata]
        own = {key: match["key"] for key, match in found if match and match["state"] == state}
    items = {key: index.state_dict_metadata[key] for key in own}
    placed = canonical(own.values())
    names = {key: placed[parameter] for key, parameter in own.items()}
    for key, item in items.items():
        name = names[key]
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


def _is_model_tensor(key: str, item: Any) -> bool:
    parts = key.split(".")
    return "optimizer" not in parts[:2] and hasattr(item, "chunks") and parts[-1] != "_extra_state"


def optimizer_bytes(index: Metadata) -> int:
    """Bytes of the checkpoint's optimizer state."""
    sizes = (
        math.prod(item.size) * item.properties.dtype.itemsize  # type: ignore[union-attr]
        for key, item in index.state_dict_metadata.items()
        if "optimizer" in key.split(".")[:2] and hasattr(item, "chunks")
    )
    return sum(sizes)


def optimizer_states(index: Metadata) -> list[str]:
    """The names of what the checkpoint's optimizer holds of each parameter: exp_avg, exp_avg_sq, fp32_param …."""
    matches = (_STATE.fullmatch(key) for key, item in index.state_dict_metadata.items() if hasattr(item, "chunks"))
    return sorted({match["state"] for match in matches if match})


def canonical(keys: Iterable[str]) -> dict[str, str]:
    """Each global key → itself without the prefixes of other programs, layer norms under Transformer Engine's names."""
    names = {key: re.sub(r"^(model\.|module\.)+", "", key) for key in keys}
    found = set(names.values())
    return {key: _fused_norm(name, found) for key, name in names.items()}


def _fused_norm(name: str, found: Collection[str]) -> str:
    """A norm's name: that of the fused layer where the model has the linear layer, and its own where it hasn't."""
    for alone, linear in _NORMS:
        for old, new in ((alone, f"{linear}.layer_norm_"), (f"{linear}.layer_norm_", alone)):
            layer, there, rest = name.partition(f".{old}")
            if there and (f"{layer}.{linear}.weight" in found) == (old == alone):
                return f"{layer}.{new}{rest}"
    return name


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
    tensors: Mapping[str, TensorSpec],
    folder: Path,
    *,
    stacks: Collection[str] = (),
    max_shard_bytes: int = 5 * 10**9,
    chunk_bytes: int = CHUNK_BYTES,
) -> CheckpointPlan:
    """Plans a checkpoint of whole tensors under global keys, cut by rows into chunks of about `chunk_bytes`.

    stacks: keys of tensors [experts, rows, …]; each expert has chunks of its own, so that a rank reads only those of
    its experts. A file has at most `max_shard_bytes` (more where one chunk is larger).
    """
    plan, places = CheckpointPlan(), {}
    number, position = 0, 0
    for key, spec in tensors.items():
        blocks = []
        for offset, shape in _chunks(spec, key in stacks, min(chunk_bytes, max_shard_bytes)):
            head, tail = frame(spec.dtype, shape)
            length = len(head) + TensorSpec(spec.dtype, shape).nbytes + len(tail)
            if position and position + length > max_shard_bytes:
                number, position = number + 1, 0
            name = f"__0_{number}.distcp"
            data = position + len(head)
            plan.fixed += [(name, position, head), (name, position + length - len(tail), tail)]
            places[key, offset] = name, position, length, shape
            blocks.append(Block(folder / name, data, offset, shape))
            position += length + -length % ALIGNMENT
            plan.sizes[name] = position
        plan.tensors[key] = Stored(spec.dtype, spec.shape, tuple(blocks))
    name, objects = f"__0_{number}.distcp", {}
    experts = {key: tensors[key].shape[0] for key in stacks}
    for keys, content in (([COMMON_STATE], [{}]), (extra_states(tensors, experts), [None])):
        data = _saved(content)
        plan.fixed.append((name, position, data))
        objects |= dict.fromkeys(keys, (name, position, len(data)))
        position += len(data)
    plan.sizes[name] = position
    index = _index(tensors, places, objects)
    plan.small = {".metadata": pickle.dumps(index), "metadata.json": FORMAT.encode()}
    return plan


def _chunks(spec: TensorSpec, stack: bool, budget: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, shape) of the chunks of a tensor, in the order of its rows."""
    slices = spec.shape[0] if stack else 1
    rows, *inner = spec.shape[stack:]
    row_bytes = spec.nbytes // max(slices * rows, 1)
    for number in range(slices):
        leading, one = ((number,), (1,)) if stack else ((), ())
        for first, last in row_chunks(0, rows, row_bytes, budget=budget):
            yield (*leading, first, *(0 for _ in inner)), (*one, last - first, *inner)


def extra_states(keys: Iterable[str], stacks: Mapping[str, int]) -> list[str]:
    """The objects that Megatron's linear layers, Transformer Engine's norms and attention ask for beside their tensors.

    They hold FP8 scales where there are any. A model without them is content with None, but not with nothing: its
    loader refuses a checkpoint that lacks a key. stacks: number of experts by key; each expert has its own.
    """
    modules = {key.removesuffix(".weight"): stacks.get(key, 1) for key in keys if _HAS_EXTRA_STATE.search(key)}
    attention = [name.removesuffix("linear_proj") for name in modules if name.endswith(".linear_proj")]
    modules |= {f"{name}core_attention": 1 for name in attention}
    return [f"{name}._extra_state/shard_{i}_{count}" for name, count in modules.items() for i in range(count)]


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
