"""What is decided and read, without processes: causes, blame, the ladder's limits, CPUs near a GPU, the status page."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from launch.agent.attempt import slow_ranks
from launch.agent.ends import End, describe
from launch.agent.job import Job, RunFolder, master_port, write_json
from launch.agent.ladder import Result, backoff, decide, sentence
from launch.agent.spawn import gpu_cpus
from launch.agent.wire import Line, connect, listen
from launch.local import checked_recipe
from launch.ssh import read_hosts
from launch.status import run_status
from mcore_swift.errors import InputError

TRACEBACK = 'Traceback (most recent call last):\n  File "a.py", line 1, in f\n'


@pytest.mark.parametrize(
    ("code", "text", "cause"),
    [
        (0, "", "done"),
        (75, "mcore-swift: stopped: SIGUSR1 was received", "stopped"),
        (93, "mcore-swift: not to be started again: …", "never restart"),
        (2, "mcore-swift: error: parallel.tp: found 0", "wrong input"),
        (2, "mcore-swift: error: checkpoint.dir: … could not be written: No space left on device", "disk full"),
        (1, TRACEBACK + "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20 MiB", "CUDA out of memory"),
        (1, TRACEBACK + "MemoryError", "out of memory"),
        (1, TRACEBACK + "RuntimeError: step 7: loss nan, gradient norm nan: not finite. The last", "not finite"),
        (1, TRACEBACK + "torch.AcceleratorError: CUDA error: an illegal memory access", "CUDA error"),
        (-6, "[rank0]: Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3)", "NCCL timeout"),
        (1, TRACEBACK + "RuntimeError: [gloo/transport/tcp/pair.cc] Connection closed by peer [n2]", "lost a peer"),
        (1, TRACEBACK + "KeyError: 'x'", "exit code 1"),
        (-11, "", "killed by SIGSEGV"),
        (-9, "all is well", "killed by SIGKILL"),
    ],
)
def test_causes(code: int, text: str, cause: str) -> None:
    found, message = describe(code, text.splitlines(), by_agent=False, hung=None)
    assert found == cause
    assert "Traceback" not in message and "File" not in message


def end(rank: int, cause: str, moment: float, **values: Any) -> End:
    common = {"node": f"n{rank}", "pid": 1, "code": 1, "signal": None, "message": "", "phase": "train", "step": 8}
    return End(**{**common, **values}, rank=rank, cause=cause, time=moment)


def test_blame_goes_to_the_cause_not_to_who_suffers() -> None:
    def culprit(*ends: End) -> int:
        return min(ends, key=lambda end: end.blame).rank

    assert culprit(end(0, "lost a peer", 1), end(1, "exit code 1", 2)) == 1
    assert culprit(end(0, "exit code 1", 1), end(1, "exit code 1", 2)) == 0
    assert culprit(end(0, "killed by SIGKILL", 1), end(1, "CUDA out of memory", 2)) == 1
    assert culprit(end(0, "ended with the others", 1), end(1, "lost a peer", 2)) == 1
    waiting, working = {"in_collective": True, "state": "S"}, {"in_collective": False, "state": "S"}
    assert culprit(end(0, "hang", 1, **waiting), end(1, "hang", 2, **working)) == 1
    assert culprit(end(0, "hang", 1, **working), end(1, "hang", 2, in_collective=None, state="T")) == 1


def failed(attempt: int, **values: Any) -> Result:
    common: dict[str, Any] = {"outcome": "failed", "code": 1, "cause": "exit code 1", "rank": 3, "node": "n2"}
    common |= {"step": 840, "hosts": ["n1", "n2"], "checkpoint_before": 0, "checkpoint_after": 800}
    return Result(**{**common, **values}, attempt=attempt)


def choose(result: Result, *earlier: Result, hosts: str = "n1 n2 n5", **values: Any) -> Any:
    job = Job(nodes=2, ranks_per_node=2, **values.pop("job", {}))
    common: dict[str, Any] = {"hosts": hosts.split(), "bad": [], "restarts": 0}
    return decide(job, result, earlier=[asdict(e) for e in earlier], **{**common, **values})


def test_the_ladder() -> None:
    assert choose(failed(1)).hosts == ["n1", "n2"]
    swapped = choose(failed(2, cause="CUDA error"))
    assert swapped.hosts == ["n1", "n5"] and swapped.exclude == ["n2"]
    line = sentence(failed(2, rank=13, cause="CUDA out of memory"), choose(failed(2), failed(1)))
    assert line == "attempt 2 died: rank 13 on n2, CUDA out of memory at step 840; restarting on n5"
    assert choose(failed(1, cause="CUDA error"), hosts="n1 n2").hosts == ["n1", "n2"]  # no spare
    full = choose(failed(1, cause="disk full"))  # also where it was not the trainer's own check that found it
    assert (full.action, full.code) == ("stop", 2)
    away = choose(failed(1, cause="agent did not start", rank=None), hosts="n1 n2")
    assert (away.action, away.exclude) == ("requeue", ["n2"])
    lost = choose(failed(1, cause="node lost", rank=None), hosts="n1 n2")
    assert (lost.action, lost.code, lost.exclude) == ("requeue", 75, ["n2"])
    assert sentence(failed(1, cause="node lost", rank=None), lost) == (
        "attempt 1 died: n2, node lost at step 840; to be requeued: 1 healthy nodes are left, 2 are needed"
    )
    again = choose(failed(3, cause="node lost", node="n1"), bad=["n2"], hosts="n1 n2 n5 n6")
    assert again.hosts == ["n5", "n6"]


def test_the_ladder_ends() -> None:
    assert choose(failed(1, code=2, cause="disk full")).code == 2
    assert choose(failed(1, code=93)).code == 93
    assert choose(failed(1), restarts=10).reason == "max_restarts 10 reached"
    assert choose(failed(1), job={"max_attempts": 1}).reason == "max_attempts 1 reached"
    idle = {"checkpoint_before": 800, "checkpoint_after": 800}
    assert choose(failed(2, **idle), failed(1)).action == "restart"
    stuck = choose(failed(3, **idle), failed(2, **idle))
    assert (stuck.action, stuck.code, stuck.reason) == ("stop", 1, "no checkpoint progress in 2 attempts")
    assert choose(failed(1), stop_requested=True).code == 75
    assert choose(failed(1, cause="not finite")).reason == "it would happen again"
    rewind = choose(failed(1, cause="not finite", step=7), job={"bad_steps": "rewind"}, skip_steps=[5])
    assert rewind.action == "restart" and rewind.skip_steps == [5, 7]
    again = choose(failed(1, cause="not finite", step=7), job={"bad_steps": "rewind"}, skip_steps=[7])
    assert again.action == "stop"
    assert [backoff(Job(), idle) for idle in (0, 1, 2, 3, 4, 20)] == [0, 0, 5, 10, 20, 300]


def test_ports_differ_between_attempts_and_stay_in_their_range() -> None:
    ports = [master_port("4711", attempt) for attempt in range(1, 100)]
    assert len(set(ports)) == len(ports) and all(20_000 <= port < 32_000 for port in ports)


def test_cpus_of_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = sorted(os.sched_getaffinity(0))
    for address, cpus in (("0000:3b:00.0", f"{mine[0]}"), ("0000:af:00.0", f"{mine[-1]},900-903")):
        (tmp_path / address).mkdir()
        (tmp_path / address / "local_cpulist").write_text(cpus + "\n")
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 00000000:3B:00.0\necho 00000000:AF:00.0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [gpu_cpus(rank, devices=tmp_path) for rank in (0, 1, 2)] == [{mine[0]}, {mine[-1]}, set()]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [gpu_cpus(rank, devices=tmp_path) for rank in (0, 1)] == [{mine[-1]}, set()]


def test_slow_ranks() -> None:
    steps = {rank: deque([(step, 1.0, 2.0 if rank == 3 else 1.0) for step in range(5)]) for rank in range(4)}
    report = slow_ranks(steps, ranks_per_node=2, hosts=["n1", "n2"])
    assert report["seconds"] == {"median": 1.0, "slow": []}
    assert report["cpu_seconds"]["slow"] == [{"rank": 3, "node": "n2", "seconds": 2.0, "ratio": 2.0}]


def test_status_of_a_running_attempt(tmp_path: Path) -> None:
    folder, now = RunFolder(tmp_path), time.time()
    folder.write_job(Job())
    attempt = folder.make_attempt(1)
    write_json(attempt / "progress.json", {"time": now, "step": 10, "total": 30, "phases": {"train": 2}})
    rows = [{"step": step, "loss": 2.0, "seconds": 0.5} for step in range(1, 11)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = run_status(tmp_path, now=folder.path.joinpath("job.json").stat().st_ctime + 10)
    assert found["state"] == "running" and found["eta_seconds"] == 10.0 and found["goodput"] == pytest.approx(0.5)
    assert run_status(tmp_path, now=now + 60)["state"] == "dead"
    with pytest.raises(InputError, match=r"job\.json: missing"):
        run_status(tmp_path / "nothing", now=now)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("resume", "never", "checkpoint.resume: never can't be launched"),
        ("dir", "null", "checkpoint.dir: a launched run needs a folder"),
    ],
)
def test_recipes_that_cannot_survive(tmp_path: Path, key: str, value: str, message: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{path: {tmp_path}, init: random}}\ndata: {{train: synthetic, format: synthetic}}\n"
        f"schedule: {{steps: 2}}\ncheckpoint: {{dir: {tmp_path}}}\n"
    )
    assert checked_recipe(recipe, []).checkpoint.dir == str(tmp_path)
    with pytest.raises(InputError, match=message):
        checked_recipe(recipe, [f"--checkpoint.{key}", value])


def test_long_messages_and_wrong_ones(tmp_path: Path) -> None:
    with listen("127.0.0.1") as listener:
        ours = connect(f"127.0.0.1:{listener.getsockname()[1]}", seconds=5)
        listener.setblocking(True)
        theirs = Line(listener.accept()[0])
        message = {"type": "end", "text": "é" * 3_000_000}
        ours.send(message)  # more than the kernel takes at once
        sender = threading.Thread(target=ours.drain, args=(10,))
        sender.start()
        found: list[Any] = []
        while not found and not theirs.closed:
            found = theirs.receive()
        sender.join()
        assert found == [message]
        ours.connection.setblocking(True)
        ours.connection.sendall(b"GET / HTTP/1.1\r\n")
        while not theirs.closed:
            assert theirs.receive() == []


def test_bad_files(tmp_path: Path) -> None:
    write_json(tmp_path / "job.json", {"nodes": 1, "rank_per_node": 2})
    with pytest.raises(InputError, match=r"job.json: unknown key 'rank_per_node'. Did you mean 'ranks_per_node'\?"):
        RunFolder(tmp_path).job()
    (tmp_path / "hosts").write_text("# two\nn1 slots=8\n\nn2  # the second\n")
    assert read_hosts(tmp_path / "hosts") == ["n1", "n2"]
