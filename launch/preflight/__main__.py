"""`python -m launch.preflight`: one task of a step over all nodes; writes what it found to FOLDER/NODE.json."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from launch.agent.job import write_json
from launch.preflight import node
from launch.preflight.limits import Limits, read_limits
from mcore_swift.errors import EXIT_INPUT, InputError

SHARE = 0.2  # of the preflight's seconds, for each of the speed stages


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.preflight", allow_abbrev=False)
    parser.add_argument("--folder", type=Path, required=True, help="where the nodes' reports go")
    parser.add_argument("--hosts", required=True, help="all nodes, with commas between")
    parser.add_argument("--clock", required=True, metavar="HOST:PORT", help="what clocks are compared with")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that a node must have; 0: a test of the CPU")
    known = ", ".join(f"{field.name}={field.default}" for field in fields(Limits))
    parser.add_argument("--limit", metavar="NAME=VALUE", action="append", default=[], help=f"defaults: {known}")
    options = parser.parse_args(argv)
    me = os.environ.get("SLURMD_NODENAME") or platform.node()
    try:
        limits = read_limits(options.limit)
    except InputError as error:
        print(f"preflight: error: {error}", file=sys.stderr)
        return EXIT_INPUT
    report = examine(me, options.hosts.split(","), options.folder, options.clock, options.gpus, limits)
    try:
        write_json(options.folder / f"{me}.json", report)
    except OSError as error:
        print(f"preflight: {me}: {options.folder}: {error.strerror}", file=sys.stderr)
    return 0


def examine(me: str, hosts: list[str], folder: Path, clock: str, gpus: int, limits: Limits) -> dict[str, Any]:
    """This node's report, see `judge.Report`. What is wrong with the node is in it, never an exception."""
    start = time.monotonic()
    problems = node.problems(folder, limits)
    versions = node.versions()
    if gpus:
        wrong, found = node.gpus(gpus)
        problems, versions = [*problems, *wrong], {**versions, **found}
    skew = None
    try:
        skew = node.clock_skew(clock)
    except (OSError, ValueError) as error:
        problems.append(f"the batch node's clock at {clock} can't be reached: {error}")
    speeds, pairs = _speeds(me, hosts, gpus, folder.name, limits)
    if "error" in speeds:
        problems.append(f"matrix product or all-reduce within the node: {speeds['error']}")
    return {
        "node": me,
        "problems": problems,
        "versions": versions,
        "skew": skew,
        "speeds": {name: value for name, value in speeds.items() if name != "error"},
        "pairs": pairs,
        "seconds": round(time.monotonic() - start, 2),
    }


def _speeds(
    me: str, hosts: list[str], gpus: int, key: str, limits: Limits
) -> tuple[dict[str, float | str], dict[str, dict[str, float | str]]]:
    from launch.preflight import speed

    try:
        import torch.distributed  # noqa: F401  (once, before the forks)
    except ImportError as error:
        return {"error": str(error)}, {}
    share = limits.seconds * SHARE
    speeds = speed.node(gpus=gpus, port=speed.port_of(key, me), seconds=share)
    pairs: dict[str, dict[str, float | str]] = {}
    for number, round in enumerate(speed.rounds(hosts)):
        for first, second in round:
            if me in (first, second):
                other = second if me == first else first
                port = speed.port_of(key, number, first)
                pairs[other] = speed.pair(first, second, me, gpus=gpus, port=port, seconds=share)
    return speeds, pairs


if __name__ == "__main__":
    sys.exit(main())
