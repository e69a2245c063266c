"""`python -m launch.supervise --run RUN --hosts A,B -- WORDS…`: attempts, until the run is done or given up.

Runs where the batch script runs, imports nothing heavy, and keeps everything it must remember in the run folder: a
requeued job's supervisor goes on from what it finds there.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import secrets
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from launch.agent.attempt import Attempt, Command, newest_checkpoint, start_command
from launch.agent.job import Fence, RunFolder, master_port, read_json, write_json
from launch.agent.ladder import Decision, Result, decide, sentence
from launch.agent.wire import listen
from mcore_swift.errors import EXIT_FAILED, EXIT_INPUT, EXIT_NEVER_RESTART, EXIT_TRY_AGAIN, InputError
from mcore_swift.stop import STOP_SIGNALS

LOCAL = ("127.0.0.1", "localhost")
RESERVE, RESERVED_BYTES = ".reserve", 32 << 10  # room for the verdict on a disk that is full by then


class Supervisor:
    """One job's part of a run."""

    def __init__(
        self, run: RunFolder, *, hosts: Sequence[str], address: str, words: Sequence[str], command: Command
    ) -> None:
        self.run_folder, self.job = run, run.job()
        self.hosts, self.address, self.words, self.command = list(hosts), address, words, command
        self.stop_asked = False
        self.bad: list[str] = []  # hosts given up in this job
        self.log: TextIO | None = None
        if len(self.hosts) < self.job.nodes:
            raise InputError(f"{run.path}: {self.job.nodes} nodes are needed, {len(self.hosts)} hosts were given")
        if len(set(self.hosts)) < len(self.hosts):
            raise InputError(f"the hosts {', '.join(self.hosts)} are not all different")

    def run(self) -> int:
        """Returns the exit code for the scheduler (launch/README.md)."""
        before = {number: signal.signal(number, self._on_signal) for number in (*STOP_SIGNALS, signal.SIGINT)}
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection for each node
        try:
            with listen(self.address) as listener:
                self._close_open_attempts()
                return self._attempts(listener)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _attempts(self, listener: socket.socket) -> int:
        hosts, restarts, skip_steps = self.hosts[: self.job.nodes], 0, _skip_steps(self.run_folder)
        supervisor = f"{self.address}:{listener.getsockname()[1]}"
        while True:
            earlier = self.run_folder.verdicts()
            if not self._still_ours(earlier):
                return EXIT_NEVER_RESTART
            fence = self._new_fence(hosts, supervisor, skip_steps)
            result = self._one(fence, listener)
            decision = decide(
                self.job,
                result,
                earlier=earlier,
                hosts=self.hosts,
                bad=self.bad,
                restarts=restarts,
                skip_steps=skip_steps,
                stop_requested=self.stop_asked,
            )
            self._tell(result, decision)
            if decision.action != "restart":
                return decision.code
            hosts, restarts, skip_steps, self.bad = decision.hosts, restarts + 1, decision.skip_steps, decision.exclude
            if not self._wait(decision.delay):
                return EXIT_TRY_AGAIN

    def _new_fence(self, hosts: list[str], supervisor: str, skip_steps: list[int]) -> Fence:
        number = self.run_folder.next_attempt()
        self.run_folder.make_attempt(number)
        master, port = ("127.0.0.1" if self.address in LOCAL else hosts[0]), master_port(self.job.id, number)
        while self.address in LOCAL and not _is_free(port):  # another run on this machine
            port += 1
        fence = Fence(
            attempt=number,
            token=secrets.token_hex(16),
            hosts=hosts,
            master=f"{master}:{port}",
            supervisor=supervisor,
            skip_steps=skip_steps,
        )
        self.run_folder.write_fence(fence)
        self.current = number
        return fence

    def _one(self, fence: Fence, listener: socket.socket) -> Result:
        folder = self.run_folder.attempt(fence.attempt)
        with contextlib.suppress(OSError):
            (folder / RESERVE).write_bytes(secrets.token_bytes(RESERVED_BYTES))
        with (folder / "batch.log").open("a", encoding="utf-8") as self.log:
            attempt = Attempt(
                self.run_folder,
                self.job,
                fence,
                self.words,
                listener=listener,
                say=self._say,
                stop_requested=lambda: self.stop_asked,
                command=self.command,
            )
            return attempt.run()

    def _tell(self, result: Result, decision: Decision) -> None:
        line = sentence(result, decision)
        verdict = {**asdict(decision), "next_hosts": decision.hosts, **asdict(result)}
        verdict |= {"code": decision.code, "line": line}
        folder = self.run_folder.attempt(result.attempt)
        with contextlib.suppress(OSError):
            (folder / RESERVE).unlink()
        with (folder / "batch.log").open("a", encoding="utf-8") as self.log:
            try:
                write_json(folder / "verdict.json", verdict)
            except OSError as error:
                self._say(f"verdict.json can't be written: {error.strerror}")
            self._say(line)
            if result.message:
                self._say(f"  {result.message}")
        self.log = None

    def _still_ours(self, earlier: list[dict[str, Any]]) -> bool:
        """Whether no other job's supervisor has started an attempt since ours."""
        current = getattr(self, "current", None)
        newest = read_json(self.run_folder.path / "attempt.json")
        if current is None or newest is None or newest.get("attempt") == current:
            return True
        self._say(f"attempt {newest.get('attempt')} was started by another supervisor: this one leaves the run to it")
        return False

    def _close_open_attempts(self) -> None:
        """Gives a verdict to the last attempt of a supervisor that died before it could."""
        attempts = self.run_folder.attempts()
        if not attempts or (self.run_folder.attempt(attempts[-1]) / "verdict.json").exists():
            return
        newest, last = newest_checkpoint(self.run_folder.path), attempts[-1]
        before = max([0, *(verdict.get("checkpoint_after", 0) for verdict in self.run_folder.verdicts())])
        progress = read_json(self.run_folder.attempt(last) / "progress.json") or {}
        result = Result(
            attempt=last,
            outcome="failed",
            code=EXIT_FAILED,
            cause="the supervisor died",
            node=self._place_of(last),
            step=int(progress.get("step", 0)),
            checkpoint_before=before,
            checkpoint_after=newest,
            ended=float(progress.get("time", 0.0)),
        )
        self._tell(result, Decision(action="restart", reason="going on in this job"))

    def _place_of(self, attempt: int) -> str | None:
        """The host that the attempt's supervisor ran on, where the fence still says so."""
        fence = read_json(self.run_folder.path / "attempt.json") or {}
        if fence.get("attempt") != attempt or fence.get("supervisor") is None:
            return None
        return str(fence["supervisor"]).rpartition(":")[0]

    def _wait(self, seconds: float) -> bool:
        """Waits; False when a stop was asked for meanwhile."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.stop_asked:
            time.sleep(0.1)
        return not self.stop_asked

    def _on_signal(self, number: int, frame: object) -> None:
        self.stop_asked = True

    def _say(self, text: str) -> None:
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}"
        for stream in (sys.stdout, self.log):
            with contextlib.suppress(OSError):  # a full disk must not end the supervisor, too
                print(line, file=stream, flush=True)


def _skip_steps(run: RunFolder) -> list[int]:
    """The steps whose data earlier attempts found bad."""
    verdicts = run.verdicts()
    return list(verdicts[-1].get("skip_steps", [])) if verdicts else []


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def supervise(
    run: Path, *, hosts: Sequence[str], address: str, words: Sequence[str], command: Command = start_command
) -> int:
    """Drives the run in this process. Raises InputError when the folder or the hosts are wrong."""
    return Supervisor(RunFolder(run), hosts=hosts, address=address, words=words, command=command).run()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.supervise", allow_abbrev=False)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--hosts", required=True, help="A,B,C in rank order; those beyond job.json's nodes are spares")
    parser.add_argument("--address", default=socket.gethostname(), help="of this host, for the agents")
    parser.add_argument("words", nargs="+", metavar="WORD", help="the command that starts an attempt's agents")
    arguments = parser.parse_args(argv)
    hosts = [host for host in arguments.hosts.split(",") if host]
    try:
        return supervise(arguments.run, hosts=hosts, address=arguments.address, words=arguments.words)
    except InputError as error:
        print(f"supervise: error: {error}", file=sys.stderr)
        return EXIT_INPUT
    except OSError as error:  # the run folder can't be written any more
        print(f"supervise: error: {error}", file=sys.stderr)
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
