"""Launching real training in forks of this process, whose libraries are imported already: all starts at once.

Everything else is as in a run: supervisor, agent and ranks are processes of their own, ranks die with their agent,
signals are blocked until they are listened to, output goes into the logs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from launch.agent import spawn
from launch.agent.job import Job
from launch.local import AGENT, checked_recipe, prepare
from launch.supervise import supervise
from tests.distributed.harness import prepared

Disturbance = Callable[[int, int], None]  # what a rank does first, by (attempt, rank)


class Fork:
    """A child process, with what is used of subprocess.Popen."""

    def __init__(self, pid: int) -> None:
        self.pid, self._code = pid, None

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code: int | None = os.waitstatus_to_exitcode(status) if pid else None
        return self._code


def forked(work: Callable[[], int | None], *, log: Path | None = None) -> Fork:
    """Runs `work` in a child that leads a session of its own and has the signals' defaults, as after an exec."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                signal.signal(number, signal.SIG_DFL)
            if log is not None:
                _write_into(log)
            code = work() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):  # a full disk; nothing of the parent's may run on in here
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    return Fork(pid)


def _write_into(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))


def run(
    recipe: Path,
    folder: Path,
    disturb: Disturbance = lambda attempt, rank: None,
    overrides: Sequence[str] = (),
    **job: Any,
) -> int:
    """Launches the recipe on two local ranks at TP2; returns the supervisor's exit code."""
    import_once()

    def launch() -> int:
        spawn.start = start_with(disturb)  # type: ignore[assignment]
        resolved = checked_recipe(recipe, ["--checkpoint.dir", str(folder), "--parallel.tp", "2", *overrides])
        defaults = {"ranks_per_node": 2, "grace_seconds": 0.5}
        found = prepare(resolved, Job(**{**defaults, **job}))
        words = [sys.executable, *AGENT, "--node", "local"]
        return supervise(found.path, hosts=["local"], address="127.0.0.1", words=words, command=_agent)

    supervisor = forked(launch, log=folder.with_suffix(".log"))
    return os.waitstatus_to_exitcode(os.waitpid(supervisor.pid, 0)[1])


def import_once() -> None:
    """What every rank would import for itself otherwise."""
    prepared()
    import datasets  # noqa: F401
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    from transformers import AutoTokenizer, Qwen2Config  # noqa: F401

    import mcore_swift.training.trainer  # noqa: F401


def _agent(words: Sequence[str], log: Path) -> Fork:
    from launch.agent.__main__ import main

    return forked(lambda: main(words[3:]), log=log)


def start_with(disturb: Disturbance) -> Callable[..., Fork]:
    """launch.agent.spawn.start, by a fork."""

    def start(words: Sequence[str], *, environment: Mapping[str, str], log: Path, cpus: set[int]) -> Fork:
        setup = spawn.child_setup(os.getpid(), cpus)

        def rank() -> int:
            setup()
            os.environ.clear()
            os.environ.update(environment)
            (log.parents[1] / "pids").mkdir(exist_ok=True)
            (log.parents[1] / "pids" / str(os.getpid())).touch()
            disturb(int(environment["MCORE_SWIFT_ATTEMPT"]), int(environment["RANK"]))
            from mcore_swift.cli import main

            return main(words[3:])

        return forked(rank, log=log)

    return start


def at_step(step: int, deed: Callable[[], object]) -> None:
    """Has this rank do something at the beginning of a step of the run (counted from 1)."""
    from mcore_swift.training.trainer import Trainer

    original = Trainer._step

    def disturbed(self: Trainer) -> None:
        if self.step + 1 == step:
            deed()
        original(self)

    Trainer._step = disturbed  # type: ignore[method-assign]


def crash() -> NoReturn:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
