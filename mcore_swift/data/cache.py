"""The cache folder: entries that appear complete or not at all, built by one process while the others wait."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mcore_swift.errors import InputError


def default_cache_dir(setting: str | None) -> Path:
    return Path(setting or os.environ.get("MCORE_SWIFT_CACHE") or "~/.cache/mcore_swift").expanduser()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock file PATH.lock, so that one process of a host (of all hosts, on most file systems) is inside."""
    lock = path.with_name(path.name + ".lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = lock.open("w")
    except OSError as error:
        raise InputError(f"data.cache_dir: {lock.parent} can't be written: {error.strerror}") from error
    with handle:
        with contextlib.suppress(OSError):  # no locks on this file system: work is done twice, renames stay atomic
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A scratch folder that becomes `path` in one step at the end, or nothing if the body raises."""
    scratch = Path(tempfile.mkdtemp(prefix=path.name + ".tmp", dir=path.parent))
    try:
        yield scratch
        with contextlib.suppress(OSError):  # another host was first: its folder holds the same
            scratch.rename(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
