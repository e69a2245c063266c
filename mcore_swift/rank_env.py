"""The variables that tell a process which rank it is: torchrun's, translated from srun's, or our own for local ranks.

RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT are what torch's `env://` reads.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping

from mcore_swift.errors import InputError


def joined(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The rank variables of a process that torchrun or srun started; None when this process is to start ranks itself.

    A Slurm step of one task, such as an interactive shell or one task a node, starts its own ranks, and so does a batch
    script: its SLURM_NTASKS counts tasks that nobody started yet.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _torchrun(environment)
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment and int(tasks) > 1:
        return _srun(environment, tasks)
    return None


def local(*, rank: int, ranks: int, port: int) -> dict[str, str]:
    """The variables of one of `ranks` ranks on this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def first_host(nodelist: str) -> str:
    """The first host of Slurm's compressed list: `node[01-03,07]-x,login` gives `node01-x`."""
    first = re.split(r",(?![^\[]*\])", nodelist)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def expand_counts(counts: str) -> list[int]:
    """Slurm's tasks per node, one number a node: `2(x3),1` gives [2, 2, 2, 1]."""
    rows = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(tasks) for tasks, nodes in rows for _ in range(int(nodes or 1))]


def _torchrun(environment: Mapping[str, str]) -> dict[str, str]:
    given = {name: environment[name] for name in local(rank=0, ranks=1, port=0) if name in environment}
    if given["WORLD_SIZE"] == "1":
        return local(rank=0, ranks=1, port=free_port()) | given
    missing = [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in given]
    if missing:
        raise InputError(
            f"RANK={given['RANK']} and WORLD_SIZE={given['WORLD_SIZE']} are set in the environment, but not "
            f"{', '.join(missing)}: start every rank with torchrun or srun, or unset RANK and WORLD_SIZE"
        )
    return given


def _srun(environment: Mapping[str, str], tasks: str) -> dict[str, str]:
    # Not SLURM_LAUNCH_NODE_IPADDR, where srun was typed: rank 0 is on the step's first host.
    hosts = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    tasks_per_node = expand_counts(environment.get("SLURM_STEP_TASKS_PER_NODE", tasks))
    # Below the ephemeral ports (from 32768), and another one for each step: a relaunched step finds its port free.
    port = 20_000 + (101 * int(environment["SLURM_STEP_ID"]) + int(environment["SLURM_JOB_ID"])) % 12_000
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_per_node[int(environment.get("SLURM_NODEID", "0"))]),
        "MASTER_ADDR": environment.get("MASTER_ADDR", first_host(hosts)),
        "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
    }
