"""The ladder with real supervisors, agents and ranks; what the ranks do is a few lines (programs.RANK)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.agent.job import read_json
from launch.status import run_status
from tests.launch.programs import agent_words, assert_no_orphans, log, prepared, rank_starts, run_here


def verdict(run: Path, attempt: int) -> dict[str, Any]:
    found = read_json(run / f"attempt-{attempt}" / "verdict.json")
    assert found is not None, log(run, attempt, "batch.log")
    return found


def test_a_crash_is_named_and_restarted_in_time(tmp_path: Path) -> None:
    folder = prepared(tmp_path, {"1": {"rank": 1, "at": 3, "do": "crash"}})
    assert run_here(folder) == 0, log(tmp_path, 1, "batch.log")
    assert verdict(tmp_path, 1)["line"] == "attempt 1 died: rank 1 on local, CUDA out of memory at step 3; restarting"
    assert verdict(tmp_path, 2)["line"] == "attempt 2 is done: step 6"
    assert_no_orphans(tmp_path)
    end = read_json(tmp_path / "attempt-1" / "rank-1.end.json")
    assert end is not None and end["code"] == 1 and end["phase"] == "train" and end["step"] == 3
    assert end["message"].startswith("RuntimeError: CUDA out of memory")
    other = read_json(tmp_path / "attempt-1" / "rank-0.end.json")
    assert other is not None and other["cause"] in ("ended with the others", "stopped")
    starts = rank_starts(tmp_path)
    assert [start[1:3] for start in sorted(starts, key=lambda x: x[1:])] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    first, second = ({start[3] for start in starts if start[1] == attempt} for attempt in (1, 2))
    assert len(first) == len(second) == 1 and first != second  # a port of its own for each attempt
    again = min(start[0] for start in starts if start[1] == 2)
    assert again - end["time"] < 5
    found = run_status(tmp_path, now=time.time())
    assert (found["state"], found["attempts"], found["checkpoint"]) == ("done", 2, 6)
    assert found["last_verdict"] == "attempt 2 is done: step 6"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["hang", "SIGSTOP"])
def test_a_hang_is_found_with_its_stacks(tmp_path: Path, how: str) -> None:
    folder = prepared(tmp_path, {"1": {"rank": 1, "at": 2, "do": how}}, timeouts={"train": 2.0})
    assert run_here(folder) == 0, log(tmp_path, 1, "batch.log")
    found = verdict(tmp_path, 1)
    assert found["line"] == "attempt 1 died: rank 1 on local, hang at step 2; restarting"
    end = read_json(tmp_path / "attempt-1" / "rank-1.end.json")
    assert end is not None and end["state"] == ("T" if how == "SIGSTOP" else "S")
    stacks = (tmp_path / "attempt-1" / "stacks" / "rank-1.txt").read_text()
    assert ("in <module>" in stacks) == (how == "hang")  # one that is stopped can't answer
    beat = read_json(tmp_path / "attempt-1" / "heartbeat" / "rank-1.json")
    assert beat is not None and beat["step"] == 2
    again = min(start[0] for start in rank_starts(tmp_path) if start[1] == 2)
    assert again - beat["time"] < 2 + 5
    assert_no_orphans(tmp_path)


@pytest.mark.slow
def test_a_killed_agent_takes_its_ranks_along(tmp_path: Path) -> None:
    folder = prepared(tmp_path, {"1": {"rank": 0, "at": 1, "do": "kill the agent"}})
    assert run_here(folder) == 0, log(tmp_path, 1, "batch.log")
    assert verdict(tmp_path, 1)["line"].startswith("attempt 1 died: local, agent died")
    assert_no_orphans(tmp_path)


@pytest.mark.slow
def test_a_spare_takes_the_place_of_a_node_that_fails_twice(tmp_path: Path) -> None:
    plan = {attempt: {"rank": 2, "at": 3, "do": "crash"} for attempt in ("1", "2")}
    folder = prepared(tmp_path, plan, nodes=2, ranks_per_node=2, max_without_progress=3)
    assert run_here(folder, ["n1", "n2", "n3"]) == 0, log(tmp_path, 1, "batch.log")
    assert verdict(tmp_path, 1)["hosts"] == ["n1", "n2"]
    assert verdict(tmp_path, 2)["line"].endswith("rank 2 on n2, CUDA out of memory at step 3; restarting on n3")
    assert verdict(tmp_path, 3)["hosts"] == ["n1", "n3"] and verdict(tmp_path, 2)["exclude"] == ["n2"]
    assert_no_orphans(tmp_path)


@pytest.mark.slow
def test_stopped_on_request_and_taken_up(tmp_path: Path) -> None:
    folder = prepared(tmp_path, {}, environment={"STEPS": "40"})
    command = [sys.executable, "-m", "launch.supervise", "--run", str(tmp_path), "--hosts", "local"]
    command += ["--address", "127.0.0.1", "--", *agent_words()]
    with subprocess.Popen(command) as supervisor:
        while not (tmp_path / "checkpoints").is_dir():
            time.sleep(0.02)
        supervisor.send_signal(signal.SIGUSR1)
        assert supervisor.wait(timeout=30) == 75
    assert verdict(tmp_path, 1)["action"] == "requeue"
    ends = [read_json(tmp_path / "attempt-1" / f"rank-{rank}.end.json") for rank in (0, 1)]
    assert [end and end["code"] for end in ends] == [75, 75]
    prepared(tmp_path, {}, environment={"STEPS": "8"})
    assert run_here(folder) == 0 and verdict(tmp_path, 2)["outcome"] == "done"
    assert_no_orphans(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("do", "code", "attempts"), [("exit 2", 2, 1), ("exit 93", 93, 1), ("crash", 1, 2)])
def test_what_is_not_restarted(tmp_path: Path, do: str, code: int, attempts: int) -> None:
    """Wrong input and never-restart at once; a crash before the first checkpoint after two attempts."""
    plan = {str(attempt): {"rank": 1, "at": 1, "do": do} for attempt in range(1, 9)}
    assert run_here(prepared(tmp_path, plan)) == code
    assert len(list(tmp_path.glob("attempt-*/verdict.json"))) == attempts
    last = verdict(tmp_path, attempts)
    assert last["action"] == "stop" and last["rank"] == 1
    if do == "crash":
        assert last["line"].endswith("stopping: no checkpoint progress in 2 attempts")
    assert_no_orphans(tmp_path)


@pytest.mark.slow
def test_the_data_of_a_bad_step_is_left_out(tmp_path: Path) -> None:
    folder = prepared(tmp_path, {"1": {"rank": 0, "at": 3, "do": "nan"}}, bad_steps="rewind")
    assert run_here(folder) == 0
    assert verdict(tmp_path, 1)["line"] == (
        "attempt 1 died: rank 0 on local, not finite at step 4; restarting without the data of step 4"
    )
    assert folder.fence().skip_steps == [4]
    words = folder.job().__class__().rank_command(tmp_path, folder.fence().skip_steps)
    assert words[-2:] == ["--schedule.skip_steps", "[4]"]


@pytest.mark.slow
def test_ranks_die_with_the_supervisor_and_the_next_one_goes_on(tmp_path: Path) -> None:
    folder = prepared(tmp_path, {"1": {"rank": 0, "at": 3, "do": "hang"}})
    command = [sys.executable, "-m", "launch.supervise", "--run", str(tmp_path), "--hosts", "local"]
    command += ["--address", "127.0.0.1", "--", *agent_words()]
    with subprocess.Popen(command) as supervisor:
        while not (tmp_path / "checkpoints").is_dir():
            time.sleep(0.02)
        supervisor.kill()
    assert_no_orphans(tmp_path)
    assert run_here(folder) == 0
    assert verdict(tmp_path, 1)["cause"] == "the supervisor died" and verdict(tmp_path, 2)["outcome"] == "done"


@pytest.mark.slow
def test_signals_before_the_handlers_are_kept(tmp_path: Path) -> None:
    """A rank that is asked to stop while it still imports stops when it can; it neither dies nor forgets."""
    slow = "import time; time.sleep(1.5)\nfrom mcore_swift import stop\nstop.FLAG.install()\n"
    slow += "import sys\nsys.exit(75 if stop.FLAG.received else 3)"
    folder = prepared(tmp_path, {}, command=[sys.executable, "-c", slow], ranks_per_node=1)
    command = [sys.executable, "-m", "launch.supervise", "--run", str(tmp_path), "--hosts", "local"]
    command += ["--address", "127.0.0.1", "--", *agent_words()]
    with subprocess.Popen(command) as supervisor:
        while "are started" not in log(tmp_path, 1, "node-local.log"):
            time.sleep(0.02)
        os.kill(supervisor.pid, signal.SIGTERM)
        assert supervisor.wait(timeout=30) == 75
    assert folder.verdicts()[0]["outcome"] == "stopped"
