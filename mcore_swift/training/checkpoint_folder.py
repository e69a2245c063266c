"""Checkpoint folders as they lie on the disk: which are complete, whose model they hold, whether they are in full.

Nothing heavy is imported here: the command line asks `is_checkpoint` before a platform is chosen.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_swift.errors import DamagedCheckpoint, InputError

if TYPE_CHECKING:
    from mcore_swift.models.build import ModelSource

MANIFEST = "mcore_swift.json"
STEP_FOLDER = re.compile(r"step-(\d{8,})")
# config.json keys that say nothing about the model's tensors or mathematics.
COSMETIC = {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "_name_or_path"}


def sync(path: Path) -> None:
    """Returns when the file's, or the folder's, content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a Megatron checkpoint folder (complete or not)."""
    return (path / "metadata.json").is_file() and (path / ".metadata").is_file()


def checkpoint_source(path: Path) -> Path:
    """The folder with config.json and tokenizer inside the checkpoint `path`."""
    if not (path / "hf" / "config.json").is_file():
        raise InputError(f"{path}: this Megatron checkpoint has no hf/config.json, so its model is not known")
    return path / "hf"


def checkpoint_step(path: Path) -> int:
    """The step that the name of a complete checkpoint says."""
    return int(path.name.removeprefix("step-"))


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in RUN/checkpoints, the oldest first."""
    try:
        paths = list(folder.iterdir())
    except OSError:
        return []
    found = [path for path in paths if STEP_FOLDER.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found, key=checkpoint_step)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all there in full; {} for one that another program wrote."""
    if not (path / MANIFEST).is_file():
        return {}
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        sizes = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{path / MANIFEST}: damaged: {error}") from None
    for name, size in sizes.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes, {size} were written"
            raise DamagedCheckpoint(f"{path}: this checkpoint is damaged: {name} {state}")
    return manifest


# What an adapter is: with another value the numbers in a checkpoint would mean something else.
ADAPTER_KEYS = (
    *("name", "path", "targets", "rank", "alpha", "rslora", "dora", "share_a", "modules_to_save", "init"),
    *("several", "activation", "layers", "first_tokens", "last_tokens"),
)


def check_adapter(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raises InputError naming the first key in which the checkpoint's adapters are others than the run's.

    `theirs` and `ours`: the adapter sections of the two recipes.
    """
    for key in ADAPTER_KEYS:
        if key in theirs and theirs[key] != ours[key]:
            raise InputError(
                f"{path}: adapter.{key} is {theirs[key]!r} there, {ours[key]!r} in this recipe; a run goes on with the"
                " adapters that it was started with: give the same, or choose another checkpoint.dir"
            )


def check_config(path: Path, source: ModelSource) -> None:
    """Raises InputError naming the first key in which the checkpoint's config.json is another model's than `source`."""
    from mcore_swift.models.build import read_source

    theirs = read_source(checkpoint_source(path)).config.to_dict()
    ours = source.config.to_dict()
    for key in [*ours, *theirs]:
        if key not in COSMETIC and ours.get(key) != theirs.get(key):
            raise InputError(
                f"{path}: a checkpoint of another model: {key} is {theirs.get(key)} there, {ours.get(key)} in"
                f" {source.folder}; choose another checkpoint.dir, or the model that this run was started with"
            )
