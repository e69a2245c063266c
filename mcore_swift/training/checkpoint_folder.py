"""Checkpoint folders as they lie on the disk: which are complete, whose model they hold, whether they are in full.

Nothing heavy is imported here: the command line asks `is_checkpoint` before a platform is chosen.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_swift.errors import DamagedCheckpoint, InputError

if TYPE_CHECKING:
    from mcore_swift.models.build import ModelSource

MANIFEST = "mcore_swift.json"
CHECKSUMS = "crc32"  # the manifest's key for CRC-32 of every other file, by name; with its own, of all its other keys
BLOCK_BYTES = 2**24
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


def write_manifest(folder: Path, values: Mapping[str, Any], checksums: Mapping[str, int]) -> None:
    """Writes the record that makes `folder` a checkpoint: `values`, and every file's size and checksum.

    `checksums`: of the files whose writers know them; the others are read.
    """
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    found = {name: checksums[name] if name in checksums else checksum(path) for name, path in files.items()}
    sizes = {name: path.stat().st_size for name, path in files.items()}
    whole = json.loads(json.dumps({**values, "files": sizes, CHECKSUMS: found}))  # as it will be read
    whole[CHECKSUMS][MANIFEST] = _own_checksum(whole)
    (folder / MANIFEST).write_text(json.dumps(whole, indent=1))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all there in full; {} for one that another program wrote.

    Raises DamagedCheckpoint. What the files hold is not looked at: see `damage`.
    """
    if not (path / MANIFEST).is_file():
        return {}
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        sizes = manifest["files"]
        intact = CHECKSUMS not in manifest or manifest[CHECKSUMS].pop(MANIFEST) == _own_checksum(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path / MANIFEST}: damaged: {error}") from None
    if not intact:
        raise DamagedCheckpoint(f"{path / MANIFEST}: damaged: it is not what was written")
    for name, size in sizes.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes, {size} were written"
            raise DamagedCheckpoint(f"{path}: this checkpoint is damaged: {name} {state}")
    return manifest


def check_contents(path: Path, manifest: Mapping[str, Any], *, share: int, shares: int) -> None:
    """Reads one of `shares` shares of the files; raises DamagedCheckpoint naming the first that isn't as written.

    Share R has what rank R of as many ranks wrote.
    """
    names = [name for name in checked_files(manifest) if _writer(name) % shares == share]
    for problem in damage(path, names, manifest):
        raise DamagedCheckpoint(f"{path}: this checkpoint is damaged: {problem}")


def checked_files(manifest: Mapping[str, Any]) -> list[str]:
    """Names of the files with a checksum; none where an earlier version wrote the checkpoint."""
    return list(manifest.get(CHECKSUMS, {}))


def _writer(name: str) -> int:
    """The rank that wrote a file: `__3_0.distcp` and `rng/00003.pt` are rank 3's; without a number, the first one's."""
    number = re.search(r"\d+", name)
    return int(number[0]) if number else 0


def damage(path: Path, names: Iterable[str], manifest: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with those of the files `names` that don't hold what was written."""
    for name in names:
        written = manifest[CHECKSUMS][name]
        try:
            found = checksum(path / name)
        except OSError as error:
            yield f"{name} can't be read: {error.strerror or error}"
            continue
        if found != written:
            yield f"{name} is not what was written: its CRC-32 is {found:08x}, was {written:08x}"


def checksum(path: Path) -> int:
    """CRC-32 of a file (some 4 GB a second, if the disk gives them). It sees every flipped bit or two."""
    crc, block = 0, bytearray(BLOCK_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            crc = zlib.crc32(memoryview(block)[:count], crc)
    return crc


def _own_checksum(values: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


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
