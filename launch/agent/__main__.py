"""`python -m launch.agent --run RUN --attempt K`: one a node, started by srun, ssh or the supervisor itself."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launch.agent.job import Fence, RunFolder
from launch.agent.node import Agent
from mcore_swift.errors import EXIT_FAILED, EXIT_INPUT, EXIT_NEVER_RESTART, InputError

STALE_SECONDS = 30.0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the node's part of an attempt; returns the exit code (launch/README.md)."""
    arguments = _parser().parse_args(argv)
    name: str = arguments.node or os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    try:
        folder = RunFolder(arguments.run)
        job, fence = folder.job(), read_fence(folder, arguments.attempt)
        if fence.attempt != arguments.attempt:
            print(f"agent {name}: attempt {arguments.attempt} was overtaken: {folder.path} is at {fence.attempt}")
            return EXIT_NEVER_RESTART
        if arguments.rendezvous is not None:
            fence = replace(fence, master=arguments.rendezvous)
        if arguments.nodes is not None:
            job = replace(job, nodes=arguments.nodes)
        node_rank = arguments.node_rank if arguments.node_rank is not None else find_node(name, fence)
        _log_to(folder.make_attempt(fence.attempt) / f"node-{name}.log")
        return Agent(folder, job, fence, node=name, node_rank=node_rank).run()
    except InputError as error:
        print(f"agent {name}: error: {error}", file=sys.stderr)
        return EXIT_INPUT
    except OSError as error:  # the supervisor can't be reached, the command can't be started
        print(f"agent {name}: error: {error}", file=sys.stderr)
        return EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.agent", allow_abbrev=False)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--node", metavar="NAME", help="default: $SLURMD_NODENAME, else the host's name")
    parser.add_argument("--node-rank", metavar="I", type=int, help="default: the name's place in attempt.json")
    parser.add_argument("--nodes", metavar="N", type=int, help="default: job.json's")
    parser.add_argument("--rendezvous", metavar="HOST:PORT", help="of the ranks; default: attempt.json's")
    return parser


def read_fence(folder: RunFolder, attempt: int) -> Fence:
    """attempt.json; waits a moment for a network file system that still shows the one before."""
    deadline = time.monotonic() + STALE_SECONDS
    while (fence := folder.fence()).attempt < attempt and time.monotonic() < deadline:
        time.sleep(0.5)
    return fence


def find_node(name: str, fence: Fence) -> int:
    """The node's place among the attempt's hosts, with or without its domain."""
    for names, wanted in ((fence.hosts, name), ([host.split(".")[0] for host in fence.hosts], name.split(".")[0])):
        if names.count(wanted) == 1:
            return names.index(wanted)
    raise InputError(f"node {name!r} is not one of attempt {fence.attempt}'s hosts {', '.join(fence.hosts)}")


def _log_to(path: Path) -> None:
    """Standard output and error go into the node's log: the scheduler may lose its own copy with the node."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
