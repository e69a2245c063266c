"""`python -m launch.slurm.watch`: runs on two nodes of a job, and saves it when its first node is lost.

Slurm needs `SlurmdTimeout`, minutes, to see that a node is lost, and a job that it requeues waits for that, too. So
where all who watch hear nothing of the node any more, one of them submits the job's successor without it and cancels
the job. A single one of two that hears nothing has lost the way to the node: it does nothing, and tries to reach the
node again.

A job with spares is submitted with --no-kill, so that Slurm doesn't end it for a lost node that a spare can replace.
Slurm then keeps it even when the node of its batch script is lost (22.05 says "Removing failed node" and "This should
never happen"): with nothing left in it, it would stand still until its time limit. Who watches requeues it then.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.agent.job import RunFolder
from launch.slurm.hosts import expand
from launch.slurm.job import again, field, may_requeue, say, shown_job, this_start
from launch.slurm.prepare import read_settings
from mcore_swift.errors import EXIT_FAILED

POLL_SECONDS = 5.0
AGREE_SECONDS = 5.0  # in which all who watch a node notice that it is lost


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.slurm.watch", allow_abbrev=False)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--batch", metavar="HOST:PORT", required=True, help="what the job's first node listens at")
    arguments = parser.parse_args(argv)
    # What it prints would go through the node that is lost.
    with (arguments.run / "watch.log").open("a", buffering=1) as log, contextlib.redirect_stdout(log):
        return _watch(arguments.run, *arguments.batch.rsplit(":", 1))


def _watch(run: Path, host: str, port: str) -> int:
    batch, listening = BatchNode(host, int(port), RunFolder(run).job().lost_seconds), True
    while (listed := _job_nodes()) is not None:
        if listed and host not in listed:
            return _save(run, host)
        listening = listening and batch.falls_silent()
        if listening and _all_say_so(run):
            return _save(run, host, [host])
        # Not listening: the script has ended, and Slurm will end this step, too.
        time.sleep(POLL_SECONDS)
    return 0


class BatchNode:
    """The job's first node, as far as this one hears it."""

    def __init__(self, host: str, port: int, seconds: float) -> None:
        self.address, self.seconds = (host, port), seconds
        self.heard = False

    def falls_silent(self) -> bool:
        """Returns when the connection has ended or can't be made; whether that is for the silence of a node once heard.

        A node that was never heard may be behind a firewall.
        """
        try:
            with socket.create_connection(self.address, timeout=self.seconds if self.heard else 30) as connection:
                self.heard = True
                connection.settimeout(None)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option, value in ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1)):
                    connection.setsockopt(socket.IPPROTO_TCP, option, value)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * self.seconds))
                connection.recv(1)
        except OSError as error:
            return self.heard and (isinstance(error, TimeoutError) or error.errno == errno.EHOSTUNREACH)
        return False


def _all_say_so(run: Path) -> bool:
    """Whether everybody who watches says that the node is silent, now: a word counts as long as it is waited on."""
    told = this_start(run) / "silent"
    told.mkdir(exist_ok=True)
    mine = told / os.environ["SLURM_PROCID"]
    mine.touch()
    deadline = time.monotonic() + AGREE_SECONDS
    while len(list(told.iterdir())) < int(os.environ["SLURM_NTASKS"]):
        if time.monotonic() > deadline:
            mine.unlink()
            say(f"{os.environ['SLURMD_NODENAME']} does not hear the node of the batch script, others do")
            return False
        time.sleep(0.1)
    return True


def _job_nodes() -> list[str] | None:
    """The nodes that this start of the job still has; [] where Slurm does not answer, None where it has ended."""
    shown = shown_job()
    if not shown:
        return []
    same = field(shown, "Restarts") == os.environ.get("SLURM_RESTART_COUNT", "0")
    return expand(field(shown, "NodeList")) if same and field(shown, "JobState") == "RUNNING" else None


def _save(run: Path, host: str, exclude: Sequence[str] = ()) -> int:
    """Sends the job back to the queue, or ends it where that is not wanted: it would stand still."""
    settings = read_settings(run)
    reason = f"{host}, the node of the batch script, is lost"
    if may_requeue(settings):
        return again(run, settings, reason, exclude, nobody_left=True)
    say(f"{reason}; cancelled")
    subprocess.run(["scancel", os.environ["SLURM_JOB_ID"]], check=False)
    return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
