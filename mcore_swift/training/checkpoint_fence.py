"""The fence around RUN/checkpoints: of two attempts at one run, the older one can't commit a checkpoint any more.

An attempt's unfinished checkpoints lie in a folder of its own, checkpoints/.attempt-K, and are committed by being moved
out of it. Who starts attempt K takes away the folders of all attempts below K first. So a commit of an old attempt is
either done before the new one looks for the newest checkpoint, or fails because its source is gone: the file system
decides, without a lock that a dead node could keep, and without a clock. (On a network file system a client may
remember the folder's handle after it is renamed; the folder is therefore emptied and removed, which ends the handle.)

K is MCORE_SWIFT_ATTEMPT, from launch.agent; a run that was started by hand takes the next free number.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import threading
from pathlib import Path

from mcore_swift.errors import NeverRestart

_NAME = re.compile(r"\.attempt-(\d+)")


class AttemptFolder:
    """This attempt's place for unfinished checkpoints. Used by the first rank alone, but for `path`."""

    def __init__(self, checkpoints: Path, number: int) -> None:
        self.checkpoints, self.number = checkpoints, number
        self._clearing: threading.Thread | None = None

    @property
    def path(self) -> Path:
        return self.checkpoints / f".attempt-{self.number}"

    @classmethod
    def open(cls, checkpoints: Path) -> AttemptFolder:
        """Takes the run over from all earlier attempts. Raises NeverRestart when a later one has done so already."""
        given = os.environ.get("MCORE_SWIFT_ATTEMPT")
        if given is not None:
            folder = cls(checkpoints, int(given))
            folder._make()
        else:
            folder = cls._next(checkpoints)
        # Only now: of two attempts that start at once, each has its folder before it looks for the other's.
        folder._take_over()
        return folder

    @classmethod
    def _next(cls, checkpoints: Path) -> AttemptFolder:
        while True:
            folder = cls(checkpoints, 1 + max([0, *_numbers(checkpoints)]))
            with contextlib.suppress(NeverRestart):  # another run has just taken this number
                folder._make()
                return folder

    def _make(self) -> None:
        try:
            self.path.mkdir()
        except FileExistsError:
            raise NeverRestart(
                f"{self.checkpoints}: attempt {self.number} of this run has been started before"
            ) from None

    def _take_over(self) -> None:
        later = [number for number in _numbers(self.checkpoints) if number > self.number]
        if later:
            shutil.rmtree(self.path, ignore_errors=True)
            raise NeverRestart(
                f"{self.checkpoints}: attempt {max(later)} has taken this run over; this is attempt {self.number}"
            )
        for number in _numbers(self.checkpoints):
            if number < self.number:
                _remove(self.checkpoints / f".attempt-{number}")
        for path in [*self.checkpoints.glob(".step-*"), *self.checkpoints.glob(".dead-*")]:
            shutil.rmtree(path, ignore_errors=True)

    def check(self) -> None:
        """Raises NeverRestart when a later attempt has taken the run over."""
        if not self.path.is_dir():
            newest = max([0, *_numbers(self.checkpoints)])
            raise NeverRestart(
                f"{self.checkpoints}: this is attempt {self.number}, and attempt {newest} has taken the run over:"
                " nothing more is saved"
            )

    def commit(self, folder: Path, final: Path) -> None:
        """Moves a finished checkpoint to its place. Raises NeverRestart instead when the run was taken over."""
        if final.exists():  # of another run, or of an attempt before this one
            self.discard(final)
        self._move(folder, final)

    def discard(self, path: Path) -> None:
        """Takes a checkpoint's name away, so that a kill while it is deleted leaves nothing that looks whole."""
        self._move(path, self.path / f"{path.name}.{secrets.token_hex(4)}")

    def _move(self, source: Path, target: Path) -> None:
        try:
            os.rename(source, target)
        except OSError:
            self.check()
            raise

    def clear(self) -> None:
        """Starts to delete what was discarded, and what a failed save has left: big files take a while."""
        self.settle()
        doomed = list(self.path.glob("*"))  # not what the next save puts there

        def delete() -> None:
            for path in doomed:
                shutil.rmtree(path, ignore_errors=True)

        if doomed:
            self._clearing = threading.Thread(target=delete, name="checkpoint-clearing", daemon=True)
            self._clearing.start()

    def settle(self) -> None:
        """Waits until what `clear` was called for is gone."""
        if self._clearing is not None:
            self._clearing.join()
            self._clearing = None


def _numbers(checkpoints: Path) -> list[int]:
    return [int(match[1]) for path in checkpoints.iterdir() if (match := _NAME.fullmatch(path.name))]


def _remove(path: Path) -> None:
    """Removes an old attempt's folder for good, whatever that attempt still puts into it."""
    dead = path.with_name(f".dead-{path.name[1:]}.{secrets.token_hex(4)}")
    try:
        os.rename(path, dead)
    except FileNotFoundError:  # another attempt was quicker
        return
    for _ in range(100):
        shutil.rmtree(dead, ignore_errors=True)
        if not dead.exists():
            return
    raise NeverRestart(f"{dead}: an old attempt goes on writing, and its folder can't be removed")
