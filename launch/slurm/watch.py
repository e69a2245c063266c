"""`python -m launch.slurm.watch`: runs on two nodes of a job with spares, and saves it when its first node is lost.

Such a job is submitted with --no-kill, so that Slurm doesn't end it for a lost node that a spare can replace. Slurm
then keeps it even when the node of its batch script is lost (22.05 says "Removing failed node" and "This should never
happen"): with nothing left in it, it would stand still until its time limit.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.slurm.hosts import expand
from launch.slurm.job import again, field, may_requeue, say, shown_job
from launch.slurm.prepare import Settings, read_settings
from mcore_swift.errors import EXIT_FAILED

KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))  # seconds, seconds, times
POLL_SECONDS = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.slurm.watch", allow_abbrev=False)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--batch", metavar="HOST:PORT", required=True, help="what the job's first node listens at")
    arguments = parser.parse_args(argv)
    host, _, port = arguments.batch.rpartition(":")
    _wait(host, int(port))
    # The script has ended, and Slurm will end this step, too; or its node is gone, and Slurm will find that out.
    while (listed := _job_nodes()) is not None:
        if listed and host not in listed:
            return _save(read_settings(arguments.run), host)
        time.sleep(POLL_SECONDS)
    return 0


def _wait(host: str, port: int) -> None:
    """Returns when the connection has ended, in whichever way."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=30) as connection:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        connection.recv(1)


def _job_nodes() -> list[str] | None:
    """The nodes that this start of the job still has; [] where Slurm does not answer, None where it has ended."""
    shown = shown_job()
    if not shown:
        return []
    same = field(shown, "Restarts") == os.environ.get("SLURM_RESTART_COUNT", "0")
    return expand(field(shown, "NodeList")) if same and field(shown, "JobState") == "RUNNING" else None


def _save(settings: Settings, host: str) -> int:
    """Sends the job back to the queue, or ends it where that is not wanted: it would stand still."""
    reason = f"{host}, the node of the batch script, is lost"
    if may_requeue(settings):
        return again(settings, reason)
    say(f"{reason}; cancelled")
    subprocess.run(["scancel", os.environ["SLURM_JOB_ID"]], check=False)
    return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
