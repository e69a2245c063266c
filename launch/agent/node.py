"""The agent of one node: starts its ranks, watches them, ends them, records how each ended.

One thread, which never waits for anything: a look at every rank, every message, every tenth of a second. With a
supervisor the agent reports and obeys; a failure of its own ranks it acts upon by itself, and so it does when the
supervisor is gone. Without one (`attempt.json` names none) it also decides when a silent rank hangs.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launch.agent import ends, spawn
from launch.agent.ends import End
from launch.agent.job import Fence, Job, RunFolder, read_json
from launch.agent.wire import Line, connect
from mcore_swift.errors import EXIT_FAILED, EXIT_INPUT, EXIT_NEVER_RESTART, EXIT_TRY_AGAIN
from mcore_swift.stop import STOP_SIGNALS
from mcore_swift.training.heartbeat import STACKS_SIGNAL

POLL_SECONDS = 0.1
REPORT_SECONDS = 1.0
SETTLE_SECONDS = 0.5  # after the first failure seen: the rank that caused it may still be on its way out
DUMP_SECONDS = 1.5  # for the ranks to write their stacks


@dataclass
class Rank:
    """A rank as its agent sees it."""

    number: int
    process: spawn.Process
    heartbeat: Path
    started: float  # CLOCK_MONOTONIC
    beat: dict[str, Any]
    hung: str | None = None  # what it hung in
    state: str = ""
    end: End | None = None

    @property
    def phase(self) -> str:
        return str(self.beat.get("phase", "start"))

    @property
    def step(self) -> int:
        return int(self.beat.get("step", 0))

    def look(self) -> None:
        """Reads the newest heartbeat."""
        self.beat = read_json(self.heartbeat) or self.beat

    def silence(self) -> float:
        """Seconds since the last heartbeat."""
        return time.monotonic() - float(self.beat.get("monotonic", self.started))


class Agent:
    """One node's part of an attempt."""

    def __init__(self, run: RunFolder, job: Job, fence: Fence, *, node: str, node_rank: int) -> None:
        self.run_folder, self.job, self.fence = run, job, fence
        self.node, self.node_rank = node, node_rank
        self.folder = run.make_attempt(fence.attempt)
        shared_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.local = Path(tempfile.mkdtemp(prefix="mcore-swift-", dir=shared_memory))  # not on the network: many writes
        self.ranks: list[Rank] = []
        self.line: Line | None = None
        self.asked_to_stop = False
        self.failed_since: float | None = None  # when the first failure was seen
        self.ending: float | None = None  # when TERM was sent
        self.killed = False
        self.reported = 0.0
        self.dumped: float | None = None

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Runs the ranks to their ends; returns the agent's exit code."""
        before = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        try:
            self._connect()
            self._start()
            while any(rank.end is None for rank in self.ranks):
                self._wait()
                self._hear()
                self._reap()
                self._watch()
            self._keep_heartbeats()
            code = self.code()
            self._tell(type="done", code=code)
            if self.line is not None:
                self.line.drain(self.job.lost_seconds)
            self._say(f"all ranks have ended; exit code {code}")
            return code
        finally:
            self._kill_all()
            shutil.rmtree(self.local, ignore_errors=True)
            for number, handler in before.items():
                signal.signal(number, handler)

    def code(self) -> int:
        """0: all are done; 75: all stopped on request; 2 or 93: what the first failure says; else 1."""
        found = [rank.end for rank in self.ranks if rank.end is not None]
        failed = sorted((end for end in found if end.failed), key=lambda end: end.blame)
        if failed:
            return failed[0].code if failed[0].code in (EXIT_INPUT, EXIT_NEVER_RESTART) else EXIT_FAILED
        return EXIT_TRY_AGAIN if any(end.cause == "stopped" for end in found) else 0

    def _on_signal(self, number: int, frame: object) -> None:
        self.asked_to_stop = True

    def _wait(self) -> None:
        watched = [self.line] if self.line is not None and not self.line.closed else []
        select.select(watched, [], [], POLL_SECONDS)

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk must not end the agent, too
            print(f"{time.strftime('%H:%M:%S')} agent {self.node}: {text}", flush=True)

    # --- the supervisor -----------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        if self.fence.supervisor is None:
            return
        self.line = connect(self.fence.supervisor, seconds=self.job.lost_seconds)
        self._tell(type="hello", token=self.fence.token, node=self.node, node_rank=self.node_rank, pid=os.getpid())
        self._wait_for_welcome()

    def _wait_for_welcome(self) -> None:
        """Raises OSError when the supervisor doesn't want this agent: there is another one in its place."""
        assert self.line is not None
        deadline = time.monotonic() + self.job.check_in_seconds
        while time.monotonic() < deadline and not self.line.closed:
            messages = self.line.receive()
            for message in messages:
                self._obey(message)
            if any(message.get("type") == "welcome" for message in messages):
                return
            self._wait()
        raise OSError(f"the supervisor at {self.fence.supervisor} does not want this agent")

    def _tell(self, **message: Any) -> None:
        if self.line is not None:
            self.line.send(message)

    def _hear(self) -> None:
        if self.line is None:
            return
        for message in self.line.receive():
            self._obey(message)
        self.line.flush()
        if self.line.closed:
            self._say("the supervisor is gone: ending the ranks")
            self.line = None
            self._end_ranks()

    def _obey(self, message: Mapping[str, Any]) -> None:
        match message.get("type"):
            case "stop":
                self.asked_to_stop = True
            case "dump":
                self._dump()
            case "kill":
                self._end_ranks(at_once=message.get("at_once", False))

    # --- the ranks ----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        for local_rank in range(self.job.ranks_per_node):
            number = self.node_rank * self.job.ranks_per_node + local_rank
            process = spawn.start(
                self.job.rank_command(self.run_folder.path, self.fence.skip_steps),
                environment=self._environment(number, local_rank),
                log=self.folder / f"rank-{number}.log",
                cpus=spawn.gpu_cpus(local_rank),
            )
            heartbeat = self.local / f"rank-{number}.json"
            self.ranks.append(Rank(number, process, heartbeat, time.monotonic(), {}))
        first, last = self.ranks[0], self.ranks[-1]
        self._say(f"attempt {self.fence.attempt}: ranks {first.number} to {last.number} are started")
        self._tell(type="started", pids={rank.number: rank.process.pid for rank in self.ranks})

    def _environment(self, number: int, local_rank: int) -> dict[str, str]:
        host, _, port = self.fence.master.rpartition(":")
        stacks = self.folder / "stacks"
        return {
            **os.environ,
            "PYTHONUNBUFFERED": "1",  # the last words of a rank that crashes must reach its log
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            # NCCL's flight recorder: the last collectives of each rank, written when one of them times out.
            "TORCH_FR_BUFFER_SIZE": "2000",
            "TORCH_FR_DUMP_TEMP_FILE": str(stacks / "nccl-rank-"),
            "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
            **self.job.environment,
            "RANK": str(number),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(self.job.world_size),
            "LOCAL_WORLD_SIZE": str(self.job.ranks_per_node),
            "GROUP_RANK": str(self.node_rank),
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
            "MCORE_SWIFT_ATTEMPT": str(self.fence.attempt),
            "MCORE_SWIFT_HEARTBEAT": str(self.local / f"rank-{number}.json"),
            "MCORE_SWIFT_STACKS": str(stacks / f"rank-{number}.txt"),
        }

    def _reap(self) -> None:
        """Notes which ranks have ended; the first failure starts the end of the others."""
        for rank in self._running():
            code = rank.process.poll()
            if code is not None:
                self._record(rank, code)
        failed = any(rank.end is not None and rank.end.failed for rank in self.ranks)
        if failed and self.failed_since is None:
            self.failed_since = time.monotonic()
        if self.failed_since is not None and time.monotonic() - self.failed_since > SETTLE_SECONDS:
            self._end_ranks()
        grace = self.job.grace_seconds
        if self.ending is not None and not self.killed and time.monotonic() - self.ending > grace:
            self._kill_all()

    def _watch(self) -> None:
        """Looks at heartbeats, passes on a request to stop, and reports."""
        for rank in self._running():
            rank.look()
        if self.asked_to_stop:
            self.asked_to_stop = False
            self._say("asked to stop: the ranks save and leave")
            self._tell(type="stopping")
            for rank in self._running():
                spawn.end(rank.process, signal.SIGUSR1)
        if self.line is None:
            self._judge_alone()
        now = time.monotonic()
        if now - self.reported >= REPORT_SECONDS:
            self.reported = now
            self._find_hangs()
            beats = {rank.number: rank.beat | {"silence": rank.silence()} for rank in self._running()}
            self._tell(type="beat", ranks=beats)

    def _find_hangs(self) -> bool:
        """Marks the ranks that have been silent for too long; tells the supervisor when there is a new one."""
        found = False
        for rank in self._running():
            allowed = self.job.timeout(rank.phase)
            if rank.hung is None and self.ending is None and allowed is not None and rank.silence() > allowed:
                rank.hung = f"no sign of life for {rank.silence():.0f} s in phase {rank.phase} after step {rank.step}"
                found = True
                self._say(f"rank {rank.number}: {rank.hung}")
        if found:
            self._tell(type="hang")
        return any(rank.hung for rank in self._running())

    def _judge_alone(self) -> None:
        if self._find_hangs():
            self._dump()
        if self.dumped is not None and time.monotonic() - self.dumped > DUMP_SECONDS:
            self._end_ranks()

    def _dump(self) -> None:
        """Has every rank write its stacks, and notes what the kernel says of it."""
        if self.dumped is not None:
            return
        self.dumped = time.monotonic()
        program = shutil.which("py-spy")
        for rank in self._running():
            rank.state = spawn.state(rank.process.pid)
            spawn.end(rank.process, STACKS_SIGNAL)
            if program is not None:  # it sees C frames, and processes that answer no signal
                with (self.folder / "stacks" / f"rank-{rank.number}.py-spy.txt").open("wb") as file:
                    command = [program, "dump", "--nonblocking", "--pid", str(rank.process.pid)]
                    subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL)

    def _end_ranks(self, *, at_once: bool = False) -> None:
        """TERM to all that still run; KILL follows after the grace, or at once if they hang anyway."""
        if self.ending is None:
            self.ending = time.monotonic()
            for rank in self._running():
                spawn.end(rank.process, signal.SIGKILL if at_once or self.dumped is not None else signal.SIGTERM)

    def _kill_all(self) -> None:
        """KILL to the ranks and to whatever they have started."""
        self.killed = True
        for rank in self._running():
            spawn.end(rank.process, signal.SIGKILL)

    def _running(self) -> list[Rank]:
        return [rank for rank in self.ranks if rank.end is None]

    def _record(self, rank: Rank, code: int) -> None:
        """Writes how the rank ended."""
        rank.look()
        tail = ends.read_tail(self.folder / f"rank-{rank.number}.log")
        by_agent = self.ending is not None
        cause, message = ends.describe(code, tail, by_agent=by_agent, hung=rank.hung)
        step = rank.step
        stacks = self.folder / "stacks" / f"rank-{rank.number}.txt"
        dump = stacks.read_text(errors="replace") if self.dumped is not None and stacks.is_file() else ""
        rank.end = End(
            rank=rank.number,
            node=self.node,
            pid=rank.process.pid,
            code=code if code >= 0 else None,
            signal=signal.Signals(-code).name if code < 0 else None,
            cause=cause,
            message=message,
            phase=rank.phase,
            step=step,
            time=time.time(),
            by_agent=by_agent,
            state=rank.state,
            in_collective=ends.in_collective(dump),
            tail=tail,
        )
        spawn.end(rank.process, signal.SIGKILL)  # what it has started and not ended
        with contextlib.suppress(OSError):  # a full disk: the supervisor still hears of it
            rank.end.write(self.folder)
        self._say(f"rank {rank.number} ended: {cause}" + (f": {message}" if message else ""))
        self._tell(type="end", **{"end": asdict(replace(rank.end, tail=tail[-5:]))})

    def _keep_heartbeats(self) -> None:
        for rank in self.ranks:
            with contextlib.suppress(OSError):
                shutil.copyfile(rank.heartbeat, self.folder / "heartbeat" / rank.heartbeat.name)
