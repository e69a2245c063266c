"""The index of a `torch_dist` checkpoint (`.metadata`), read without Megatron and without free unpickling.

What is read may come from anywhere: only the classes of the format itself are allowed.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_swift.errors import DamagedCheckpoint, InputError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

# What a torch.distributed.checkpoint index is made of (torch 2.11); Megatron's own writer adds the ranks' plans.
_ALLOWED = {
    "torch": {"Size", "float32", "float64", "float16", "bfloat16", "uint8", "int8", "int16", "int32", "int64", "bool"},
    "torch.serialization": {"_get_layout"},
    "torch._C": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def read_index(folder: Path) -> Metadata:
    """The checkpoint's index: every tensor's shape, dtype and place. Raises InputError when it can't be read."""
    try:
        with (folder / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
        assert isinstance(metadata.state_dict_metadata, Mapping) and metadata.storage_data is not None
    except FileNotFoundError:
        raise InputError(f"{folder}: not a Megatron checkpoint: it has no .metadata") from None
    except Exception as error:  # unpickling damaged bytes fails in whatever way those bytes lead to
        raise DamagedCheckpoint(f"{folder}/.metadata: this checkpoint's index is damaged: {error}") from None
    return metadata
