"""Real training that is disturbed, found out, and restarted: the losses are those of a run that was left alone."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.agent.job import read_json
from tests.launch.forked import at_step, crash, run
from tests.launch.programs import is_alive
from tests.training.test_resume import numbers, recipe  # noqa: F401  (a fixture)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:  # noqa: F811
    """(step, loss, gradient norm, learning rate) of every step."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run(recipe, folder) == 0, folder.with_suffix(".log").read_text()
    return numbers(folder)


def lines(folder: Path) -> list[str]:
    found = [read_json(path) for path in sorted(folder.glob("attempt-*/verdict.json"))]
    return [verdict["line"] for verdict in found if verdict is not None]


def told(folder: Path) -> str:
    logs = [folder.with_suffix(".log"), *sorted(folder.glob("attempt-*/*.log"))]
    return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in logs)


def assert_no_rank_lives(folder: Path) -> None:
    deadline = time.monotonic() + 5
    pids = [int(path.name) for path in (folder / "pids").iterdir()]
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_alive, pids))


def damage_newest(folder: Path) -> None:
    """The checkpoint of step 10 loses the end of a file."""
    file = next((folder / "checkpoints" / "step-00000010").glob("*.distcp"))
    os.truncate(file, file.stat().st_size - 100)


def stop_self() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def kill_agent() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


@pytest.mark.parametrize(
    ("deed", "line"),
    [
        pytest.param(
            crash, "attempt 1 died: rank 1 on local, CUDA error at step 12; restarting", marks=pytest.mark.nightly
        ),
        pytest.param(
            stop_self, "attempt 1 died: rank 1 on local, hang at step 12; restarting", marks=pytest.mark.nightly
        ),
        pytest.param(kill_agent, "attempt 1 died: local, agent died at step", marks=pytest.mark.nightly),
    ],
    ids=["crash", "hang", "agent killed"],
)
def test_disturbed(
    recipe: Path,  # noqa: F811
    undisturbed: list[tuple[Any, ...]],
    tmp_path: Path,
    deed: Callable[[], None],
    line: str,
) -> None:
    folder = tmp_path / "run"

    def disturb(attempt: int, rank: int) -> None:
        if attempt == 1 and rank == 1:
            at_step(13, deed)

    assert run(recipe, folder, disturb, timeouts={"train": 5.0}) == 0, told(folder)
    assert lines(folder)[0].startswith(line) and lines(folder)[1] == "attempt 2 is done: step 20", lines(folder)
    assert numbers(folder) == undisturbed
    assert_no_rank_lives(folder)


@pytest.mark.nightly
def test_a_damaged_checkpoint_is_passed_over(
    recipe: Path,  # noqa: F811
    undisturbed: list[tuple[Any, ...]],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"

    def disturb(attempt: int, rank: int) -> None:
        if attempt == 1 and rank == 1:
            at_step(13, lambda: (damage_newest(folder), crash()))

    assert run(recipe, folder, disturb) == 0, told(folder)
    log = (folder / "attempt-2" / "rank-0.log").read_text()
    assert "step-00000010: this checkpoint is damaged: " in log and "; going on from step-00000005" in log
    assert "resumed after step 5" in log
    assert numbers(folder) == undisturbed


@pytest.mark.nightly
def test_stopped_and_taken_up(
    recipe: Path,  # noqa: F811
    undisturbed: list[tuple[Any, ...]],
    tmp_path: Path,
) -> None:
    """USR1 to the agent: all ranks stop after one step, save, and leave with 75; the next start goes on there."""
    folder = tmp_path / "run"

    def disturb(attempt: int, rank: int) -> None:
        if attempt == 1 and rank == 1:
            at_step(8, lambda: (os.kill(os.getppid(), signal.SIGUSR1), time.sleep(0.5)))

    assert run(recipe, folder, disturb) == 75, told(folder)
    ends = [read_json(folder / "attempt-1" / f"rank-{rank}.end.json") for rank in (0, 1)]
    assert [(end or {}).get("code") for end in ends] == [75, 75]
    assert len({(end or {}).get("step") for end in ends}) == 1
    assert run(recipe, folder) == 0
    assert numbers(folder) == undisturbed


@pytest.mark.nightly
def test_killed_at_any_moment_of_a_save(
    recipe: Path,  # noqa: F811
    undisturbed: list[tuple[Any, ...]],
    tmp_path: Path,
) -> None:
    """Each of the first attempts is killed somewhere in its first save; what is left is always good to go on from."""
    folder, kills = tmp_path / "run", 3

    def disturb(attempt: int, rank: int) -> None:
        if attempt > kills or rank != attempt % 2:
            return
        from mcore_swift.training.checkpoint import CheckpointManager

        save, delay = CheckpointManager.save, random.Random(attempt).random() * 0.08

        def dying(self: Any, *args: Any, **kwargs: Any) -> None:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
            save(self, *args, **kwargs)
            time.sleep(delay / 2)

        CheckpointManager.save = dying  # type: ignore[method-assign]

    assert run(recipe, folder, disturb, max_without_progress=kills + 1, backoff_seconds=0.0) == 0, told(folder)
    assert len(lines(folder)) == kills + 1 and all("killed by SIGKILL" in line for line in lines(folder)[:kills])
    assert numbers(folder) == undisturbed
    assert_no_rank_lives(folder)


@pytest.mark.nightly
def test_a_full_disk_ends_the_run_and_harms_nothing(
    recipe: Path,  # noqa: F811
    undisturbed: list[tuple[Any, ...]],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"

    def disturb(attempt: int, rank: int) -> None:
        if attempt == 1 and rank == 1:
            at_step(8, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY)))

    assert run(recipe, folder, disturb) == 2, told(folder)
    assert "disk full at step" in lines(folder)[0] and lines(folder)[0].endswith("stopping: to be put right first")
    assert run(recipe, folder) == 0
    assert numbers(folder) == undisturbed


@pytest.mark.nightly
def test_through_ssh(
    recipe: Path,  # noqa: F811
    undisturbed: list[tuple[Any, ...]],
    tmp_path: Path,
) -> None:
    """The command itself, every process started anew; the two hosts are this one, and ssh runs the words here."""
    (tmp_path / "hosts").write_text("127.0.0.1\nlocalhost\n")
    program = tmp_path / "ssh"
    program.write_text('#!/bin/sh\nshift\nexec sh -c "$*"\n')
    program.chmod(0o755)
    command = [sys.executable, "-m", "mcore_swift.cli", "launch", "ssh", str(tmp_path / "hosts"), str(recipe)]
    command += ["--ssh", str(program), "--ranks-per-node", "1", "--address", "127.0.0.1", "--parallel.tp", "2"]
    command += ["--checkpoint.dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert numbers(tmp_path / "run") == undisturbed
    assert {path.name for path in (tmp_path / "run" / "attempt-1").glob("node-*.log")} == {
        "node-127.0.0.1.log",
        "node-localhost.log",
    }
