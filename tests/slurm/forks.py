"""Agents and ranks on a test cluster's nodes as forks of this process, whose libraries are imported already.

Everything but the import is as in a job. srun starts a task on each node; the task is a few lines (TASK) that hand
their namespaces, output and words to a fork of this process, pass signals on and give its exit code back. That fork is
the agent: it lives in the node's namespaces, dies with the node and with the task, and its ranks are its children.

    with Cluster(nodes=2) as cluster, Forks() as forks:      # site.env: MCORE_SWIFT_VENV={forks.venv}
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.agent import spawn
from tests.launch.forked import Disturbance, Fork, forked, import_once, start_with
from tests.slurm.cluster import PR_SET_PDEATHSIG, Cluster

PR_SET_NAME = 15  # linux/prctl.h
SPACES = ("net", "uts", "pid", "mnt")  # the last: it takes away the paths of the others
TASK = f"""
import json, os, signal, socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect(sys.argv[1])
spaces = [os.open("/proc/self/ns/" + name, os.O_RDONLY) for name in {SPACES}]
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: link.send(bytes([number])))
words = dict(words=sys.argv[2:], environment=dict(os.environ), folder=os.getcwd())
socket.send_fds(link, [json.dumps(words).encode() + b"\\n"], [1, 2, *spaces])
answer = link.recv(1)
os._exit(answer[0] if answer else 1)
"""
PYTHON = """\
#!/bin/sh
case "$1 $2" in
"-m launch.agent" | "-m launch.preflight") exec {python} -S -E {folder}/task.py {folder}/socket "$@" ;;
esac
exec {python} "$@"
"""


class Forks:
    """Serves the tasks of one test. `disturb` is what every rank calls first, with (attempt, rank).

    `venv` is an environment whose Python hands agents and preflights over, and runs everything else.
    """

    def __init__(self, disturb: Disturbance = lambda attempt, rank: None) -> None:
        import_once()
        self.disturb = disturb
        self.venv = Path(tempfile.mkdtemp(prefix="forks"))  # short: it holds a socket
        self.venv.chmod(0o755)
        (self.venv / "bin").mkdir()
        (self.venv / "task.py").write_text(TASK)
        shim = self.venv / "bin" / "python"
        shim.write_text(PYTHON.format(python=sys.executable, folder=self.venv))
        shim.chmod(0o755)
        (self.venv / "bin" / "mcore-swift").symlink_to(Path(sys.executable).with_name("mcore-swift"))
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.venv / "socket"))
        self.listener.listen(128)

    def __enter__(self) -> Forks:
        self.server = forked(self._serve)
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self.server.pid, signal.SIGKILL)
        os.waitpid(self.server.pid, 0)
        self.listener.close()
        shutil.rmtree(self.venv, ignore_errors=True)

    # --- in the server, a fork of this process ------------------------------------------------------------------------

    def _serve(self) -> None:
        _die_with_parent()
        while True:
            connection = self.listener.accept()[0]
            forked(lambda connection=connection: self._guard(connection))
            connection.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass

    def _guard(self, connection: socket.socket) -> None:
        """Starts a task's agent and stands between the two until one of them ends."""
        _die_with_parent()
        self.listener.close()
        text, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 2 + len(SPACES))
        while not text.endswith(b"\n"):
            text += connection.recv(1 << 20)
        *spaces, mounts = descriptors[2:]
        for space in spaces:
            os.setns(space)
        task = json.loads(text)
        agent = forked(lambda: self._work(task, descriptors[:2], mounts))
        while (code := agent.poll()) is None:
            if select.select([connection], [], [], 0.05)[0]:
                _pass_on(connection.recv(16), agent.pid)
        with contextlib.suppress(OSError):
            connection.send(bytes([code if code >= 0 else 128 - code]))

    def _work(self, task: dict[str, Any], outputs: list[int], mounts: int) -> int:
        """What `python -m launch.agent` or `-m launch.preflight` does."""
        _die_with_parent()
        os.setns(mounts)
        for number, descriptor in enumerate(outputs, 1):
            os.dup2(descriptor, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        os.environ.clear()
        os.environ.update(task["environment"])
        os.chdir(task["folder"])
        _, module, *words = task["words"]
        if module == "launch.preflight":
            from launch.preflight.__main__ import main as preflight

            return preflight(words)
        from launch.agent.__main__ import main as agent

        _name("agent")
        spawn.start = start_with(self._named)  # type: ignore[assignment]
        return agent(words)

    def _named(self, attempt: int, rank: int) -> None:
        _name(f"rank-{rank}")
        self.disturb(attempt, rank)


def _pass_on(numbers: bytes, pid: int) -> None:
    """Slurm signals all processes of a step; nothing to read means that it has killed the task."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        for number in numbers or [signal.SIGKILL]:
            for process in [*map(int, children.read_text().split()), pid]:
                os.kill(process, number)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _name(name: str) -> None:
    """What `ps` shows of this process."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode())


def in_head(cluster: Cluster, work: Callable[[], int | None], *, folder: Path, log: Path) -> int:
    """Runs `work` in a fork that is in the cluster's head, in `folder`; returns its exit code."""

    def inside() -> int:
        head = cluster.head()
        spaces = [os.open(f"/proc/{head}/ns/{name}", os.O_RDONLY) for name in SPACES]
        for space in spaces:
            os.setns(space)
        os.environ.update(cluster.environment)
        return _ended(forked(lambda: (os.chdir(folder), work())[1], log=log))

    return _ended(forked(inside))


def _ended(fork: Fork) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(fork.pid, 0)[1])
