"""One attempt, as the supervisor sees it: its agents are started, heard, and ended; the result names the culprit.

One thread and one loop. What is known of a node comes through its connection: a closed one means that the agent died
(the node's kernel lives and said so), a silent one that the node, or the way to it, is lost.
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import signal
import socket
import statistics
import subprocess
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.agent.ends import End, read_end, read_tail
from launch.agent.job import Fence, Job, RunFolder, write_json
from launch.agent.ladder import Result
from launch.agent.node import DUMP_SECONDS, SETTLE_SECONDS
from launch.agent.wire import Line
from mcore_swift.errors import EXIT_FAILED, EXIT_INPUT, EXIT_NEVER_RESTART, EXIT_TRY_AGAIN
from mcore_swift.training.checkpoint_folder import checkpoint_step, complete_checkpoints

POLL_SECONDS = 0.1
PROGRESS_SECONDS = 2.0
MANY_RANKS = 512  # a report takes a moment of each rank
REMEMBERED_STEPS = 50  # of each rank, for the report of slow ones
LOST = ("node lost", "agent did not start", "agent died")  # of several, the first explains the others
SLOW = 1.25  # times the median of all ranks
Command = Callable[[Sequence[str], Path], Any]  # starts words with their output into a file; a Popen, or like one


def start_command(words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts srun, ssh or an agent, in a process group of its own: a Ctrl-C is the supervisor's to pass on."""
    with log.open("ab") as output:
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)


@dataclass
class Node:
    """One node's agent."""

    name: str
    line: Line | None = None
    heard: float = 0.0  # CLOCK_MONOTONIC
    done: bool = False
    lost: str | None = None  # what happened to it
    beats: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        return self.done or self.lost is not None


class Attempt:
    """Starts the agents at `fence.hosts` with `words`, and runs until all of them are done or given up."""

    def __init__(
        self,
        run: RunFolder,
        job: Job,
        fence: Fence,
        words: Sequence[str],
        *,
        listener: socket.socket,
        say: Callable[[str], None],
        stop_requested: Callable[[], bool],
        command: Command = start_command,
    ) -> None:
        self.run_folder, self.job, self.fence, self.words = run, job, fence, words
        self.listener, self.say, self.stop_requested, self.command = listener, say, stop_requested, command
        self.folder = run.make_attempt(fence.attempt)
        self.nodes = {host: Node(host) for host in fence.hosts}
        self.strangers: list[Line] = []  # connected, not introduced
        self.ends: dict[int, End] = {}
        self.steps: dict[int, deque[tuple[int, float, float]]] = defaultdict(lambda: deque(maxlen=REMEMBERED_STEPS))
        self.began = time.monotonic()
        self.failed: float | None = None  # when the first failure was seen
        self.dumped: float | None = None
        self.killed: float | None = None
        self.stopped: float | None = None  # when the agents were asked to stop
        self.progress_written = 0.0

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> Result:
        started, before = time.time(), newest_checkpoint(self.run_folder.path)
        launchers = self._start_agents()
        try:
            while not self._finished():
                self._listen()
                self._check_nodes(launchers)
                self._act()
                self._write_progress(every=PROGRESS_SECONDS if self.job.world_size <= MANY_RANKS else 15.0)
        finally:
            self._send(type="kill")
            self._write_progress(every=0.0)
            gone = any(node.lost == "node lost" for node in self.nodes.values())
            _end_launchers([process for _, process in launchers], at_once=gone)
            for line in [*self.strangers, *(node.line for node in self.nodes.values() if node.line)]:
                line.close()
        after = newest_checkpoint(self.run_folder.path)
        return self._result(started=started, before=before, after=after)

    def _start_agents(self) -> list[tuple[str | None, Any]]:
        """The commands that were started, each with the node that it is for (None: all)."""
        log = self.folder / "launcher.log"
        places: list[str | None] = list(self.nodes) if any("{node}" in word for word in self.words) else [None]
        started = []
        for place in places:
            words = [self._filled(word, place) for word in self.words]
            started.append((place, self.command(words, log)))
        self.say(f"attempt {self.fence.attempt} on {', '.join(self.nodes)}: {shlex.join(words)}")
        return started

    def _filled(self, word: str, node: str | None) -> str:
        values = {
            "run": str(self.run_folder.path),
            "attempt": str(self.fence.attempt),
            "node": node or "",
            "nodes": ",".join(self.fence.hosts),
            "count": str(len(self.fence.hosts)),
        }
        for name, value in values.items():
            word = word.replace("{" + name + "}", value)
        return word

    def _finished(self) -> bool:
        if all(node.over for node in self.nodes.values()):
            return True
        if self.killed is None:
            return False
        return time.monotonic() - self.killed > self.job.grace_seconds + SETTLE_SECONDS + 2.0

    def _listen(self) -> None:
        lines = {node.line: node for node in self.nodes.values() if node.line is not None and not node.over}
        ready = _readable([self.listener, *self.strangers, *lines])
        if self.listener in ready:
            with contextlib.suppress(OSError):
                self.strangers.append(Line(self.listener.accept()[0]))
        for line in [line for line in self.strangers if line in ready]:
            self._introduce(line)
        for line, node in lines.items():
            if line in ready:
                self._hear(node, line.receive())
            line.flush()

    def _introduce(self, line: Line) -> None:
        messages = line.receive()
        if not messages and not line.closed:
            return
        self.strangers.remove(line)
        first = messages[0] if messages else {}
        rank = first.get("node_rank")
        known = first.get("type") == "hello" and first.get("token") == self.fence.token
        if not known or not isinstance(rank, int) or not 0 <= rank < len(self.fence.hosts):
            line.close()
            return
        node = self.nodes[self.fence.hosts[rank]]
        if node.line is not None:  # a second agent in the first one's place
            line.close()
            return
        node.line, node.heard = line, time.monotonic()
        line.send({"type": "welcome"})
        self._hear(node, messages[1:])

    def _hear(self, node: Node, messages: list[dict[str, Any]]) -> None:
        if messages:
            node.heard = time.monotonic()
        for message in messages:
            match message.get("type"):
                case "beat":
                    node.beats = {int(rank): beat for rank, beat in message["ranks"].items()}
                    self._remember(node.beats)
                case "end":
                    end = read_end(message["end"])
                    self.ends[end.rank] = end
                    if end.failed:
                        self._note_failure()
                case "hang":
                    self._dump()
                case "done":
                    node.done = True

    def _remember(self, beats: dict[int, dict[str, Any]]) -> None:
        for rank, beat in beats.items():
            step, seconds, cpu = beat.get("step"), beat.get("seconds"), beat.get("cpu_seconds")
            if step and seconds is not None and (not self.steps[rank] or self.steps[rank][-1][0] != step):
                self.steps[rank].append((step, seconds, cpu or 0.0))

    # --- what is wrong, and what is done about it ---------------------------------------------------------------------

    def _check_nodes(self, launchers: list[tuple[str | None, Any]]) -> None:
        now = time.monotonic()
        ended = {place for place, process in launchers if process.poll() is not None}
        for node in self.nodes.values():
            if node.over:
                continue
            if node.line is None:
                gone = (None in ended or node.name in ended) and now - self.began > 2 * SETTLE_SECONDS
                if gone or now - self.began > self.job.check_in_seconds:
                    self._lose(node, "agent did not start")
            elif node.line.closed:
                self._lose(node, "agent died")
            elif now - node.heard > self.job.lost_seconds:
                self._lose(node, "node lost")

    def _lose(self, node: Node, what: str) -> None:
        node.lost = what
        self.say(f"{node.name}: {what}")
        self._note_failure()

    def _note_failure(self) -> None:
        self.failed = self.failed or time.monotonic()

    def _act(self) -> None:
        now = time.monotonic()
        if self.stop_requested() and self.stopped is None:
            self.stopped = now
            self.say("a stop was asked for: the ranks save and leave")
            self._send(type="stop")
        if self.stopped is not None and now - self.stopped > self.job.stop_seconds:
            self._kill()
        if self.failed is not None and now - self.failed > 2 * SETTLE_SECONDS:
            self._kill()
        if any(node.lost == "node lost" for node in self.nodes.values()):  # nothing more can explain that
            self._kill(at_once=True)
        if self.dumped is not None and now - self.dumped > DUMP_SECONDS:
            self._kill()

    def _dump(self) -> None:
        if self.dumped is None:
            self.dumped = time.monotonic()
            self.say("a rank hangs: every rank is asked for its stacks")
            self._send(type="dump")

    def _kill(self, *, at_once: bool = False) -> None:
        if self.killed is None:
            self.killed = time.monotonic()
            self._send(type="kill", at_once=at_once)

    def _send(self, **message: Any) -> None:
        for node in self.nodes.values():
            if node.line is not None and not node.over:
                node.line.send(message)

    # --- what is told -------------------------------------------------------------------------------------------------

    def _write_progress(self, *, every: float) -> None:
        if time.monotonic() - self.progress_written < every:
            return
        self.progress_written = time.monotonic()
        beats = {rank: beat for node in self.nodes.values() for rank, beat in node.beats.items()}
        phases: dict[str, int] = defaultdict(int)
        for beat in beats.values():
            phases[str(beat.get("phase", "start"))] += 1
        steps = [int(beat.get("step", 0)) for beat in beats.values()]
        value = {
            "time": time.time(),
            "attempt": self.fence.attempt,
            "step": min(steps, default=0),
            "total": next((beat["total"] for beat in beats.values() if beat.get("total")), None),
            "phases": dict(phases),
            "nodes": {
                node.name: node.lost or ("done" if node.done else "up" if node.line else "starting")
                for node in self.nodes.values()
            },
            "slow": slow_ranks(self.steps, ranks_per_node=self.job.ranks_per_node, hosts=self.fence.hosts),
        }
        with contextlib.suppress(OSError):  # a full disk is for the ranks to report
            write_json(self.folder / "progress.json", value)

    def _result(self, *, started: float, before: int, after: int) -> Result:
        ends = sorted((end for end in self.ends.values() if end.failed), key=lambda end: end.blame)
        lost = [node for node in self.nodes.values() if node.lost is not None]
        seen = [int(beat.get("step", 0)) for node in self.nodes.values() for beat in node.beats.values()]
        step = max([0, *seen, *(end.step for end in self.ends.values())])
        where = {"started": started, "ended": time.time(), "checkpoint_before": before, "checkpoint_after": after}
        common = {"attempt": self.fence.attempt, "hosts": self.fence.hosts, **where}
        if lost and not (ends and ends[0].blame[0] == 0):  # the others suffer from it
            # srun ends the other agents, too, when it can't start one.
            node = min(lost, key=lambda node: LOST.index(node.lost or ""))
            message = " | ".join(read_tail(self.folder / "launcher.log")[-3:])
            failed = {"outcome": "failed", "code": EXIT_FAILED, "cause": node.lost, "node": node.name}
            return Result(**common, **failed, message=message, step=step)  # type: ignore[arg-type]
        if ends:
            end = ends[0]
            code = end.code if end.code in (EXIT_INPUT, EXIT_NEVER_RESTART) else EXIT_FAILED
            named = {"rank": end.rank, "node": end.node, "cause": end.cause, "message": end.message}
            return Result(**common, **named, outcome="failed", code=code, step=failed_step(end))  # type: ignore[arg-type]
        missing = self.job.world_size - len(self.ends)
        if missing:
            message = f"{missing} of {self.job.world_size} ranks left no record"
            return Result(**common, outcome="failed", code=EXIT_FAILED, cause="no record", message=message, step=step)
        if any(end.cause == "stopped" for end in self.ends.values()):
            return Result(**common, outcome="stopped", code=EXIT_TRY_AGAIN, step=step)
        return Result(**common, outcome="done", code=0, step=step)


def _readable(watched: Sequence[Any]) -> set[Any]:
    """Those of the sockets that have something; waits a moment for it. poll, since select ends at 1024 files."""
    poll, known = select.poll(), {item.fileno(): item for item in watched}
    for descriptor in known:
        poll.register(descriptor, select.POLLIN)
    return {known[descriptor] for descriptor, _ in poll.poll(1000 * POLL_SECONDS)}


def failed_step(end: End) -> int:
    """The step that the rank failed in, or after which it did."""
    import re

    named = re.search(r"step (\d+): loss", end.message)
    return int(named[1]) if named else end.step


def slow_ranks(
    steps: dict[int, deque[tuple[int, float, float]]], *, ranks_per_node: int, hosts: Sequence[str]
) -> dict[str, Any]:
    """Median step and CPU seconds over all ranks, and the ranks that are far above in one of them.

    Ranks that exchange gradients take the same time for a step, whoever is slow: the CPU time tells who computes more.
    """
    report: dict[str, Any] = {}
    for index, name in ((1, "seconds"), (2, "cpu_seconds")):
        medians = {rank: statistics.median(row[index] for row in rows) for rank, rows in steps.items() if rows}
        if not medians:
            continue
        middle = statistics.median(medians.values())
        slow = [
            {"rank": rank, "node": hosts[rank // ranks_per_node], "seconds": value, "ratio": round(value / middle, 2)}
            for rank, value in sorted(medians.items())
            if middle > 0 and value > SLOW * middle
        ]
        report[name] = {"median": middle, "slow": slow}
    return report


def newest_checkpoint(run: Path) -> int:
    """The step of the newest complete checkpoint, 0 for none."""
    return max(map(checkpoint_step, complete_checkpoints(run / "checkpoints")), default=0)


def _end_launchers(processes: Sequence[Any], *, at_once: bool) -> None:
    """TERM, a second later KILL; at once where a node is lost, since srun would wait for it."""
    for number, seconds in ((signal.SIGTERM, 0.0 if at_once else 1.0), (signal.SIGKILL, 5.0)):
        for process in processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
        deadline = time.monotonic() + seconds
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.02)
