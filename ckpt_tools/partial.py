"""A conversion's result while it is made: `.DST.partial` with a journal, a lock, and the rename that makes it DST."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ckpt_tools.source import HFSource, MegatronSource
from ckpt_tools.torch_dist import CheckpointPlan
from ckpt_tools.transfer import Transfer
from mcore_swift.errors import InputError
from mcore_swift.training.checkpoint_folder import MANIFEST, sync
from mcore_swift.weights.hf_folder import copy_metadata

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
JOURNAL = "journal"
LOCK_PATIENCE = 2.0  # seconds


@dataclass(frozen=True)
class Part:
    """A set of tensors, and the folder of its files while they are written: the weights, or an optimizer's state."""

    source: HFSource | MegatronSource
    bulk: Transfer
    layout: CheckpointPlan
    folder: Path

    @property
    def journal(self) -> Path:
        return self.folder / JOURNAL


@dataclass(frozen=True)
class Job:
    """Parts that appear together as `destination`; the first is the weights, its folder the partial one."""

    source: HFSource | MegatronSource
    destination: Path
    dtype: str | None
    parts: list[Part]

    @property
    def partial(self) -> Path:
        return self.parts[0].folder


@contextlib.contextmanager
def locked(destination: Path) -> Iterator[None]:
    """Holds the lock of `destination`; the kernel lets go of it when the process dies. Raises InputError if held."""
    path = destination.with_name(f".{destination.name}.lock")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        held = _try_lock(descriptor, path)
        if not held:
            raise InputError(
                f"{destination}: another conversion is writing it; wait for that one, or choose another DST"
            )
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, path: Path) -> bool:
    """Locks the file. A killed run's workers, which hold the lock too, take a moment to die: they are waited for."""
    deadline = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.stat(path).st_ino == os.fstat(descriptor).st_ino  # else its holder has just removed it
        except FileNotFoundError:
            return False
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)


def fingerprint_of(job: Job) -> str:
    """Says whether a partial folder was begun for the same result: the source's files and what is planned from them."""
    sources = [part.source for part in job.parts]
    tensors = [stored for source in sources for stored in (*source.stored.values(), *source.scales.values())]
    files = {block.file for stored in tensors for block in stored.blocks}
    stats = {str(path.resolve()): path.stat() for path in files}
    content: dict[str, Any] = {
        "files": sorted((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats.items()),
        "sizes": [part.layout.sizes for part in job.parts],
        "config": job.source.model.raw,
        "dtype": job.dtype,
        "tensors": [(name, item.dtype, item.shape) for part in job.parts for name, item in part.layout.tensors.items()],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def prepare(job: Job, fingerprint: str) -> None:
    """Creates the files at full size, with everything but the tensors; leaves a folder begun for the same result."""
    mark = job.partial / JOURNAL / "begun"
    if mark.is_file() and mark.read_text() == fingerprint:
        return
    shutil.rmtree(job.partial, ignore_errors=True)
    for part in job.parts:
        part.journal.mkdir(parents=True)
        _allocate(part.folder, part.layout)
    mark.with_suffix(".new").write_text(fingerprint)
    os.rename(mark.with_suffix(".new"), mark)


def _allocate(folder: Path, layout: CheckpointPlan) -> None:
    for name, size in layout.sizes.items():
        with (folder / name).open("wb") as file:
            # Claims the space now: a full disk is found before hours of writing, and not in the middle of a file.
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
            file.truncate(size)
            for owner, start, data in layout.fixed:
                if owner == name:
                    file.seek(start)
                    file.write(data)


def finish(job: Job) -> None:
    """Writes the small files and gives the folder its name."""
    for part in job.parts:
        for name, content in part.layout.small.items():
            (part.folder / name).write_bytes(content)
        shutil.rmtree(part.journal)
    to_megatron = job.parts[0].bulk.to_megatron
    home = job.partial / "hf" if to_megatron else job.partial
    home.mkdir(exist_ok=True)
    dtype = DTYPES[job.dtype] if job.dtype else "BF16" if job.source.scales else None
    copy_metadata(job.source.model, home, dtype=dtype)
    if to_megatron:
        _write_manifest(job.partial)
    for path in (*job.partial.rglob("*"), job.partial):  # a power cut must not leave a folder that only looks whole
        sync(path)
    os.rename(job.partial, job.destination)


def _write_manifest(folder: Path) -> None:
    """What the trainer looks for in a checkpoint: that it is in full, and that it holds weights only."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    manifest = {
        "format": 1,
        "step": 0,
        "loader": {},
        "samples": 0,
        "optimizer_step": None,
        "plan": None,
        "recipe": "",
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
        "files": {path.relative_to(folder).as_posix(): path.stat().st_size for path in files},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
