"""Two nodes watch the batch script's: what they do together, what one alone doesn't do. Slurm's commands and a lost
network are faked; the watchers are processes, and their connections real ones."""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.agent.job import Job
from launch.slurm import watch
from launch.slurm.prepare import Settings, prepare
from tests.launch.forked import Fork, forked

SHOWN = "JobId=7 JobState=RUNNING Restarts=0 Partition=gpu NodeList=n[01-03] ExcNodeList=(null)"
COMMANDS = {  # run in the test's folder; what Slurm says of the job is in a file
    "scontrol": "cat job",
    "sbatch": 'echo "sbatch $*" >>asked; echo 8',
    "scancel": 'echo "scancel $*" >>asked; sed -i s/RUNNING/CANCELLED/ job',
}


class Watchers:
    """Nodes 0 and 1 of two that watch; `deafen` takes the way to the batch script's node from one of them."""

    def __init__(self, place: Path, listener: socket.socket) -> None:
        self.place, self.listener = place, listener
        self.kept: list[socket.socket] = []
        self.run = place / "run"
        settings = Settings(nodes=2, spares=1, gpus_per_node=1, order=[0, 1], requeue=True)
        prepare(self.run, "", settings, job=Job(id="7"), command="")
        (self.run / "job.sh").touch()
        (place / "job").write_text(SHOWN)
        for name, text in COMMANDS.items():
            (place / name).write_text(f"#!/bin/sh\ncd {place}\n{text}\n")
            (place / name).chmod(0o755)
        self.forks = [forked(lambda rank=rank: self._watch(rank), log=place / f"{rank}.log") for rank in range(2)]

    def _watch(self, rank: int) -> int:
        deaf = self.place / f"deaf-{rank}"
        variables = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": str(rank), "SLURMD_NODENAME": f"n{rank}"}
        os.environ.update(variables, PATH=f"{self.place}:{os.environ['PATH']}")
        watch.POLL_SECONDS, watch.AGREE_SECONDS = 0.05, 0.5
        watch.socket.create_connection = lambda address, timeout: _Link(address, deaf)  # type: ignore[assignment]
        return watch.main(["--run", str(self.run), f"--batch=n01:{self.listener.getsockname()[1]}"])

    def deafen(self, rank: int) -> None:
        (self.place / f"deaf-{rank}").touch()

    def heal(self, rank: int) -> None:
        (self.place / f"deaf-{rank}").unlink()

    def hear(self, *, connections: int) -> None:
        """Waits until so many more connections were made."""
        self.listener.settimeout(10)
        for _ in range(connections):
            self.kept.append(self.listener.accept()[0])

    def log(self) -> str:
        path = self.run / "watch.log"
        return path.read_text() if path.exists() else ""

    def until(self, holds: Callable[[], object]) -> None:
        deadline = time.monotonic() + 10
        while not holds():
            assert time.monotonic() < deadline, self.log() + (self.place / "0.log").read_text()
            time.sleep(0.02)

    def asked(self) -> list[str]:
        """What was asked of Slurm."""
        path = self.place / "asked"
        return path.read_text().splitlines() if path.exists() else []

    def codes(self) -> list[int]:
        self.until(lambda: None not in [fork.poll() for fork in self.forks])
        return [fork.poll() or 0 for fork in self.forks]


class _Link(socket.socket):
    """A connection to the batch script that hears nothing while the file `deaf` is there."""

    def __init__(self, address: tuple[str, int], deaf: Path) -> None:
        super().__init__(socket.AF_INET)
        self.deaf = deaf
        if deaf.exists():
            raise OSError(errno.EHOSTUNREACH, "No route to host")
        self.connect(("127.0.0.1", address[1]))

    def recv(self, size: int, flags: int = 0) -> bytes:
        while not self.deaf.exists():
            if select.select([self], [], [], 0.02)[0]:
                return super().recv(size, flags)
        raise OSError(errno.ETIMEDOUT, "Connection timed out")


@pytest.fixture
def watchers(tmp_path: Path) -> Iterator[Watchers]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        found = Watchers(tmp_path, listener)
        try:
            yield found
        finally:
            for fork in found.forks:
                _kill(fork)


def _kill(fork: Fork) -> None:
    if fork.poll() is None:
        os.kill(fork.pid, 9)
        os.waitpid(fork.pid, 0)


def test_one_alone_hears_nothing_and_the_job_goes_on(watchers: Watchers) -> None:
    """For a moment the first, then the second: at no time both, so nobody asks Slurm for anything."""
    watchers.hear(connections=2)
    for rank in (0, 1):
        watchers.deafen(rank)
        watchers.until(
            lambda rank=rank: watchers.log().count(f"n{rank} does not hear the node of the batch script") > 1
        )
        watchers.heal(rank)
        watchers.hear(connections=1)
    assert watchers.asked() == []
    (watchers.place / "job").write_text(SHOWN.replace("RUNNING", "COMPLETED"))
    for connection in watchers.kept:
        connection.close()
    assert (watchers.codes(), watchers.asked()) == ([0, 0], [])


def test_both_hear_nothing_and_one_of_them_acts(watchers: Watchers) -> None:
    """The second one first, which by itself does nothing."""
    watchers.hear(connections=2)
    watchers.deafen(1)
    watchers.until(lambda: "n1 does not hear" in watchers.log())
    assert watchers.asked() == []
    watchers.deafen(0)
    watchers.codes()
    submitted, cancelled = watchers.asked()
    assert submitted.startswith("sbatch --parsable --exclude=n01 ") and cancelled == "scancel 7"
    assert watchers.log().count("n01, the node of the batch script, is lost; job 8 goes on, exclude=n01") == 1


@pytest.mark.parametrize("error", [TimeoutError("timed out"), OSError(errno.EHOSTUNREACH, "No route to host")])
def test_a_node_never_heard_is_not_silent(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    """It may be behind a firewall, which both watchers would take for its end."""

    def connect(*_: object, **__: object) -> socket.socket:
        raise error

    monkeypatch.setattr(watch.socket, "create_connection", connect)
    node = watch.BatchNode("n01", 1, 6.0)
    assert not node.falls_silent()
    node.heard = True
    assert node.falls_silent()
