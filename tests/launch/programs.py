"""A training program of a few lines, with the trainer's manners: heartbeats, signals, exit codes, checkpoints.

Attempts are real processes: supervisor, agents, ranks. What a rank does when is told by RUN/plan.json:
{"K": {"rank": 1, "at": 3, "do": "crash"}} for attempt K.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.agent.job import Job, RunFolder, write_json
from launch.supervise import supervise

RANK = """
import json, os, sys, time, signal
from mcore_swift import stop
stop.FLAG.install()
from mcore_swift.training import heartbeat
heartbeat.start()
from pathlib import Path
run, rank, attempt = Path(sys.argv[1]), int(os.environ["RANK"]), os.environ["MCORE_SWIFT_ATTEMPT"]
(run / "pids").mkdir(exist_ok=True)
(run / "pids" / str(os.getpid())).write_text(f"{time.time()} {attempt} {rank} {os.environ['MASTER_PORT']}")
plan = json.loads((run / "plan.json").read_text()).get(attempt, {})
beats = heartbeat.from_environment()
saved = sorted((run / "checkpoints").glob("step-*")) if (run / "checkpoints").is_dir() else []
step = int(saved[-1].name[5:]) if saved else 0
steps = int(os.environ.get("STEPS", "6"))
exec(compile(os.environ["TOGETHER"], "/torch/distributed/together.py", "exec"))
while step < steps:
    for beat in beats:
        beat.beat(phase="train", step=step, total=steps, seconds=0.05, cpu_seconds=0.05)
    if plan.get("rank") == rank and plan["at"] == step:
        what = plan["do"]
        if what == "crash":
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        if what == "nan":
            raise RuntimeError(f"step {step + 1}: loss nan, gradient norm nan: not finite.")
        if what == "hang":
            time.sleep(600)
        if what == "SIGSTOP":
            os.kill(os.getpid(), signal.SIGSTOP)
        if what == "kill the agent":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(600)
        if what.startswith("exit"):
            print("mcore-swift: error: parallel.tp: found 0", file=sys.stderr)
            sys.exit(int(what.split()[1]))
    time.sleep(0.05)
    step += 1
    stopping = together(step)
    if rank == 0 and step % 2 == 0:
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "mcore_swift.json").write_text("{}")
    if stopping:
        sys.exit(75)
for beat in beats:
    beat.beat(phase="end", step=step)
"""

# A collective, to those who look at stacks: all ranks wait for each other and agree on whether to stop.
TOGETHER = """
def together(step):
    (run / "sync").mkdir(exist_ok=True)
    scratch = run / "sync" / f"new-{attempt}-{rank}"
    scratch.write_text(str(stop.FLAG.received))
    scratch.rename(run / "sync" / f"{attempt}-{step}-{rank}")
    files = [run / "sync" / f"{attempt}-{step}-{other}" for other in range(int(os.environ["WORLD_SIZE"]))]
    while not all(file.exists() for file in files):
        time.sleep(0.005)
    return any(int(file.read_text()) for file in files)
"""


def prepared(run: Path, plan: dict[str, Any], **job: Any) -> RunFolder:
    """A run folder whose ranks are RANK programs."""
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "plan.json", plan)
    folder = RunFolder(run)
    job["environment"] = {"TOGETHER": TOGETHER, **job.get("environment", {})}
    defaults = {"ranks_per_node": 2, "command": [sys.executable, "-c", RANK, str(run)], "grace_seconds": 0.5}
    folder.write_job(Job(**{**defaults, **job}))
    return folder


def agent_words() -> list[str]:
    return [sys.executable, "-m", "launch.agent", "--run", "{run}", "--attempt", "{attempt}", "--node", "{node}"]


def run_here(folder: RunFolder, hosts: Sequence[str] = ("local",)) -> int:
    """Supervises in this process; the agents are processes of their own, one for each of the made-up hosts."""
    return supervise(folder.path, hosts=hosts, address="127.0.0.1", words=agent_words())


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that ended but was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def rank_starts(run: Path) -> list[tuple[float, int, int, int, int]]:
    """(Unix seconds, attempt, rank, port, pid) of every rank that was started, in order."""
    rows = [(path.read_text().split(), int(path.name)) for path in (run / "pids").iterdir()]
    return sorted((float(row[0]), int(row[1]), int(row[2]), int(row[3]), pid) for row, pid in rows)


def assert_no_orphans(run: Path) -> None:
    """No rank of the run lives; a moment is left for those that the kernel ends."""
    deadline = time.monotonic() + 5
    pids = [start[-1] for start in rank_starts(run)]
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in pids if is_alive(pid)]


def log(run: Path, attempt: int, name: str) -> str:
    path = run / f"attempt-{attempt}" / name
    return path.read_text() if path.is_file() else f"(no {os.fspath(path)})"
