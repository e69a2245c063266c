"""Megatron's `torch_dist` checkpoints, a layer below files and runs: snapshot, write in the background, read in place.

The format is torch.distributed.checkpoint's plus Megatron's metadata.json; `megatron.core.dist_checkpointing.load`
reads it. Megatron's asynchronous writer (deprecated there; a manager process and a fork a rank) is not used: a copy of
the rank's own shards, written by a thread, is simpler, and dies with its rank.

What is read may come from anywhere, so it is never unpickled freely: only the classes of the format itself are allowed.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import zlib
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict_loader import load as load_in_place
from torch.distributed.checkpoint.storage import WriteResult

from mcore_swift import parallel
from mcore_swift.errors import DamagedCheckpoint, InputError, nearest
from mcore_swift.weights.host_copies import HostCopies
from mcore_swift.weights.live import ADAPTERS, sharded_state

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.nn import Module

Item = ShardedTensor | ShardedObject
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}  # metadata.json


@dataclass(frozen=True)
class ModelItems:
    """What a rank's model holds of the global tensors; the tensors are views of the parameters."""

    parts: dict[int, list[ShardedTensor]]  # id of a parameter → its parts (a gated fc1 has two)
    objects: list[tuple[Module, str, ShardedObject]]  # Transformer Engine's extra state: chunk, its key there, object

    def tensors(self) -> list[ShardedTensor]:
        return [part for parts in self.parts.values() for part in parts]

    def everything(self) -> list[Item]:
        return [*self.tensors(), *(item for _, _, item in self.objects)]


def model_items(chunks: Sequence[Module]) -> ModelItems:
    """This rank's shards of the model's global tensors. `chunks` may be wrapped in Megatron's DDP."""
    parts: dict[int, list[ShardedTensor]] = {}
    objects = []
    for chunk in chunks:
        chunk = getattr(chunk, "module", chunk)
        adapted = hasattr(chunk, "adapters")  # then the model itself is frozen but for a few modules
        for name, item in sharded_state(chunk).items():
            if adapted and not item.key.startswith(ADAPTERS) and not getattr(item.data, "requires_grad", False):
                continue  # it stays where it came from
            if isinstance(item, ShardedObject):
                objects.append((chunk, name, item))
                continue
            parts[id(item.data)] = parts_of(item, item.data.detach())
    return ModelItems(parts, objects)


def parts_of(item: ShardedTensor | ShardedTensorFactory, data: torch.Tensor) -> list[ShardedTensor]:
    """What a checkpoint has of one of the model's tensors, as views of `data`, which stands for it."""
    local = replace(item, data=data)
    built = nested_values(local.build()) if isinstance(local, ShardedTensorFactory) else [local]
    return [_with_every_axis(part) for part in built]


def _with_every_axis(part: ShardedTensor) -> ShardedTensor:
    """An expert's tensor with its place in the stack as a first axis of length 1, as the checkpoint has it."""
    if not part.prepend_axis_num:
        return part
    assert part.data is not None
    shape = (1,) * part.prepend_axis_num + tuple(part.local_shape)
    return replace(part, data=part.data.view(shape), local_shape=shape, prepend_axis_num=0)


# --- writing ----------------------------------------------------------------------------------------------------------


class _CheckedStream:
    """A file that is written from its beginning to its end, and the CRC-32 of what was."""

    def __init__(self, file: Any) -> None:
        self.file, self.crc = file, 0
        self.tell, self.flush, self.close = file.tell, file.flush, file.close

    def write(self, data: Any) -> int:
        self.crc = zlib.crc32(data, self.crc)
        return self.file.write(data)

    def fileno(self) -> int:
        self.file.flush()  # torch syncs without
        return self.file.fileno()


class _CheckedFiles(FileSystem):
    """torch's file system; `checksums` has the CRC-32 of every file that was written, by name."""

    def __init__(self) -> None:
        self.checksums: dict[str, int] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any]:
        with super().create_stream(path, mode) as file:
            stream = _CheckedStream(file)
            yield stream if mode == "wb" else file
        self.checksums[Path(path).name] = stream.crc


@dataclass
class PendingWrite:
    """A snapshot of this rank's shards on its way to `folder`."""

    folder: Path
    writer: FileSystemWriter
    planner: MCoreSavePlanner
    plan: SavePlan
    metadata: Metadata | None  # on the first rank
    results: Sequence[WriteResult] = ()

    def write(self) -> None:
        """Writes and syncs this rank's file. No communication, nothing shared with training: made for a thread."""
        self.results = self.writer.write_data(self.plan, self.planner).wait()

    @property
    def checksums(self) -> dict[str, int]:
        """CRC-32 of the file that `write` has written, by name."""
        assert isinstance(self.writer.fs, _CheckedFiles)
        return dict(self.writer.fs.checksums)

    def finish(self) -> None:
        """Writes the index, once every rank's `write` has returned. Collective; raises OSError on all ranks."""
        gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(list(self.results), gathered, dst=0)

        def write_index() -> None:
            assert self.metadata is not None and gathered is not None
            self.writer.finish(self.metadata, gathered)
            (self.folder / "metadata.json").write_text(json.dumps(FORMAT))

        parallel.on_first_rank(write_index)


class Saver:
    """Prepares the saves of a run, and keeps what doesn't change from one to the next.

    That is: how data parallel ranks share out what several of them hold, the ranks' plans as they were merged, and the
    memory that snapshots lie in.
    """

    def __init__(self) -> None:
        self._sharing = FullyParallelSaveStrategyWrapper(None, parallel.dp_group(), do_cache_distribution=True)  # type: ignore[arg-type]
        self._copies = HostCopies()
        self._planned: _Planned | None = None

    def prepare(self, items: Iterable[Item], folder: Path) -> PendingWrite:
        """Copies this rank's share of `items` to the host's memory and plans where it goes. Collective.

        Training may change the tensors as soon as this returns. The `PendingWrite` of the call before must have been
        written: its memory is used again. `folder` must exist and hold no checkpoint.
        """
        state = mcore_to_pyt_state_dict(self._snapshot(self._share(items)), False)
        planner = MCoreSavePlanner(
            dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False
        )
        first = dist.get_rank() == 0
        writer = FileSystemWriter(folder, sync_files=True, thread_count=1, per_thread_copy_ahead=0)
        writer.fs = _CheckedFiles()
        planner.set_up_planner(state, is_coordinator=first)
        writer.set_up_storage_writer(first)
        local = planner.create_local_plan()
        if not parallel.on_all_ranks(self._planned is not None and self._planned.local == local):
            self._planned = _Planned(local, *_global_plan(local, planner, writer))
        assert self._planned is not None
        plan = planner.finish_plan(self._planned.whole)
        return PendingWrite(folder, writer, planner, plan, self._planned.metadata)

    def _share(self, items: Iterable[Item]) -> list[Item]:
        """What of `items` this rank writes."""
        wanted: dict[str, Item] = {str(number): item for number, item in enumerate(items)}
        # Megatron's loader wants a place for what is not sharded; there is nothing here that is not.
        wanted["common"] = ShardedObject("common_state", {}, (1,), (0,), replica_id=dist.get_rank())
        if dist.get_world_size(parallel.dp_group()) > 1:
            self._sharing.apply_saving_parallelization(wanted)
        return [item for item in wanted.values() if is_main_replica(item.replica_id)]

    def _snapshot(self, items: Sequence[Item]) -> dict[str, list[Any]]:
        """The items, by key, with their data copied; objects are serialized for the plan, which copies them too."""
        tensors = [item for item in items if isinstance(item, ShardedTensor)]
        copies = iter(self._copies.take([item.data for item in tensors if item.data is not None]))
        by_key: dict[str, list[Any]] = {}
        for item in items:
            copied = replace(item, data=next(copies)) if isinstance(item, ShardedTensor) else item
            by_key.setdefault(_storage_key(item), []).append(copied)
        return by_key


@dataclass(frozen=True)
class _Planned:
    """This rank's plan, and what became of it when all ranks' plans were merged."""

    local: SavePlan
    whole: SavePlan
    metadata: Metadata | None  # on the first rank


def _global_plan(
    plan: SavePlan, planner: MCoreSavePlanner, writer: FileSystemWriter
) -> tuple[SavePlan, Metadata | None]:
    """Merges the ranks' plans on the first rank, which checks that they cover each tensor exactly once."""
    first = dist.get_rank() == 0
    plans: list[Any] | None = [None] * dist.get_world_size() if first else None
    dist.gather_object(plan, plans, dst=0)
    merged: list[Any] = [None]

    def merge() -> None:
        assert plans is not None
        whole, metadata = planner.create_global_plan(plans)
        merged[0] = writer.prepare_global_plan(whole), metadata

    parallel.on_first_rank(merge)
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, merged[0][0] if first else None, src=0)
    return mine[0], merged[0][1] if first else None


def _storage_key(item: Item) -> str:
    return item.unique_key if isinstance(item, ShardedObject) else item.key


# --- reading ----------------------------------------------------------------------------------------------------------


class _Reader(FileSystemReader):
    """torch's reader with an index that has been read already (and not by free unpickling)."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self.metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


class _Planner(MCoreLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def check_fits(items: Iterable[ShardedTensor], index: Metadata, folder: Path, *, same_dtype: bool) -> None:
    """Raises InputError naming the first of `items` that the checkpoint lacks or has in another shape (or dtype)."""
    for item in items:
        found = index.state_dict_metadata.get(item.key)
        if not isinstance(found, TensorStorageMetadata):
            hint = nearest(item.key, list(index.state_dict_metadata))
            raise InputError(f"{folder}: a checkpoint of another model: it has no tensor {item.key}.{hint}")
        # Vocabulary padding depends on the tensor parallel size, so these tensors may differ in their rows.
        start = 1 if item.allow_shape_mismatch else 0
        if tuple(found.size[start:]) != tuple(item.global_shape[start:]):
            raise InputError(
                f"{folder}: a checkpoint of another model: {item.key} has shape {list(found.size)},"
                f" this model needs {list(item.global_shape)}"
            )
        if same_dtype and found.properties.dtype != item.dtype:
            raise InputError(
                f"{folder}: {item.key} was saved as {found.properties.dtype}, this run holds it as {item.dtype};"
                " resuming needs the same precision.dtype"
            )


def read(items: Iterable[Item], folder: Path, index: Metadata) -> dict[str, Any]:
    """Fills the tensors of `items` in place, each rank for itself; returns what the objects hold, by `unique_key`.

    Rows of vocabulary padding that the checkpoint lacks become 0. Raises DamagedCheckpoint when a file is.
    """
    by_key: dict[str, list[Any]] = {}
    for item in items:
        by_key.setdefault(_storage_key(item), []).append(item)
    tensors = [item for group in by_key.values() for item in group if isinstance(item, ShardedTensor)]
    planner = _Planner(
        shapes_validation_sharded_tensors=[item for item in tensors if not item.allow_shape_mismatch],
        allow_shape_mismatch_sharded_tensors={item.key: item for item in tensors if item.allow_shape_mismatch},
        flatten_state_dict=False,
        flatten_sharded_tensors=False,
    )
    objects = {key: None for key, group in by_key.items() if isinstance(group[0], ShardedObject)}
    state = mcore_to_pyt_state_dict(by_key, True)
    try:
        load_in_place(state, storage_reader=_Reader(folder, index), planner=planner, no_dist=True)
    except Exception as error:  # torch wraps whatever goes wrong inside in a type of its own
        raise DamagedCheckpoint(f"{folder}: this checkpoint is damaged: {_innermost(error)}") from error
    return {key: state[key][0] for key in objects}  # type: ignore[index]


def _innermost(error: BaseException) -> str:
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return f"{type(error).__name__}: {error}"


# --- shards of flattened tensors --------------------------------------------------------------------------------------


def boxes(shape: Sequence[int], start: int, stop: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cuts elements [start, stop) of a row-major tensor into rectangles, in order: (offset, shape) of each.

    A checkpoint holds rectangles; the distributed optimizer shards by element. A matrix gives at most three: the end of
    a row, whole rows, the beginning of a row.
    """
    if start >= stop:
        return []
    if len(shape) == 1:
        return [((start,), (stop - start,))]
    inner = math.prod(shape[1:])
    (first, begin), (last, end) = divmod(start, inner), divmod(stop, inner)
    if first == last:
        return [((first, *offset), (1, *size)) for offset, size in boxes(shape[1:], begin, end)]
    found = []
    if begin:
        found += [((first, *offset), (1, *size)) for offset, size in boxes(shape[1:], begin, inner)]
        first += 1
    if first < last:
        found.append(((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
    return found + [((last, *offset), (1, *size)) for offset, size in boxes(shape[1:], 0, end)]
