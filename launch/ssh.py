"""`mcore-swift launch ssh HOSTFILE RECIPE`: several machines without a scheduler; their agents are started through ssh.

The machines share the run's folder, the working directory and the Python environment, at the same paths.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.agent.job import job_of
from launch.local import AGENT, checked_recipe, prepare
from launch.supervise import supervise
from mcore_swift.errors import InputError


def launch_ssh(
    hostfile: Path,
    path: Path,
    *,
    overrides: Sequence[str] = (),
    ranks_per_node: int | None,
    spares: int,
    address: str | None,
    ssh: str,
    **options: Any,
) -> int:
    """Trains the recipe on the hosts; returns the exit code (launch/README.md)."""
    hosts, recipe = read_hosts(hostfile), checked_recipe(path, overrides)
    if spares >= len(hosts):
        raise InputError(f"--spares {spares}: {hostfile} has {len(hosts)} hosts, and one must be left to train on")
    job = job_of(nodes=len(hosts) - spares, ranks_per_node=ranks_per_node or _gpus(), spares=spares, **options)
    folder = prepare(recipe, job)
    words = [*shlex.split(ssh), "{node}", remote_command()]
    return supervise(folder.path, hosts=hosts, address=address or socket.gethostname(), words=words)


def read_hosts(hostfile: Path) -> list[str]:
    """The first word of each line. Raises InputError when there is none."""
    try:
        lines = [line.split("#")[0].split() for line in hostfile.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise InputError(f"{hostfile}: the list of hosts can't be read: {error.strerror}") from None
    hosts = [words[0] for words in lines if words]
    if not hosts:
        raise InputError(f"{hostfile}: no host; expected one a line")
    return hosts


def remote_command() -> str:
    """What the host's shell runs: this Python, here, with the variables that decide what is imported."""
    kept = [f"{name}={os.environ[name]}" for name in ("PYTHONPATH", "HF_HUB_OFFLINE") if name in os.environ]
    words = ["env", *kept, sys.executable, *AGENT, "--node", "{node}"]
    return f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(words)}"


def _gpus() -> int:
    from mcore_swift.platform import select

    count = select("auto").device_count()
    if not count:
        raise InputError("--ranks-per-node: this machine has no GPU to count; say how many ranks a host gets")
    return count
