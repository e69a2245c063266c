"""The batch script of a run, and the settings that it hands on to `launch.slurm.job`.

The script is short: options, variables, one exec. Whatever decides something is Python, which tests can reach.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from launch.slurm.site import Site
from mcore_swift.errors import InputError

USR1_SECONDS = 300  # before the time limit: a step, a checkpoint, and Slurm's own delay of up to 30 s
_TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d(:\d\d)?)?")
_ARRAY = re.compile(r"[\d,-]+(:\d+)?(%\d+)?")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of Slurm."""

    name: str
    run: Path
    nodes: int
    gpus_per_node: int
    on_cpu: bool = False  # the ranks need no GPUs
    spares: int = 0
    time: str | None = None  # None: the partition's default
    requeue: bool = True
    array: str | None = None
    swept: bool = False  # each task of the array has a run folder of its own, task-N
    dependency: str | None = None
    options: dict[str, str] = field(default_factory=dict)  # of sbatch: the site's

    def __post_init__(self) -> None:
        if self.time is not None and not _TIME.fullmatch(self.time):
            allowed = "minutes, hours:minutes:seconds or days-hours:minutes:seconds"
            raise InputError(f"--time: found {self.time!r}; it must be {allowed}")
        if self.array is not None and not _ARRAY.fullmatch(self.array):
            raise InputError(f"--array: found {self.array!r}; it must be as sbatch takes it, such as 0-3%1")
        if self.array is not None and not self.swept and not self.array.endswith("%1"):
            raise InputError(
                f"--array: the tasks of {self.array!r} would train one run at the same time; for a chain, in which each"
                " goes on where the one before stopped, end it with %1; for runs that differ, give --sweep"
            )


def directives(request: Request) -> list[str]:
    """The options of sbatch, one a word."""
    log = "%A_%a" if request.array else "%j"
    rows: dict[str, object] = {
        "job-name": request.name,
        "nodes": request.nodes + request.spares,
        "ntasks-per-node": 1,
        "gpus-per-node": None if request.on_cpu else request.gpus_per_node,
        "exclusive": True,
        "mem": 0,
        "time": request.time,
        "signal": f"B:USR1@{USR1_SECONDS}" if _seconds(request.time) > 2 * USR1_SECONDS else "B:USR1@30",
        # Without spares a lost node ends the job anyway, and Slurm requeues it: also when it is the batch script's.
        "no-kill": True if request.spares else None,
        "requeue" if request.requeue else "no-requeue": True,
        "open-mode": "append",
        "output": request.run / f"slurm-{log}.log",
        "array": request.array,
        "dependency": request.dependency,
        **request.options,
    }
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in rows.items() if value is not None]


def render(request: Request, site: Site, *, venv: Path) -> str:
    """The batch script. It refers to nothing but the run's folder and the environment `venv`."""
    run = shlex.quote(str(request.run)) + ('/task-"${SLURM_ARRAY_TASK_ID:?}"' if request.swept else "")
    exports = [f"export {name}={shlex.quote(value)}" for name, value in sorted(site.exported.items())]
    lines = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH {word}" for word in directives(request)),
        "# Written by `mcore-swift launch slurm`. It runs on the job's first node, and again after each requeue.",
        "set -euo pipefail",
        f"run={run}",
        *exports,
        f"export PYTHONPATH={shlex.quote(str(request.run))}/code",
        'cd "$run"',
        f'exec {shlex.quote(str(venv))}/bin/python -m launch.slurm.job --run "$run"',
    ]
    return "\n".join(lines) + "\n"


def _seconds(time: str | None) -> float:
    """A time limit of Slurm's in seconds; endless where there is none."""
    if time is None:
        return float("inf")
    days, _, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days:
        parts += [0] * (3 - len(parts))
    elif len(parts) < 3:
        parts = [0, *parts, 0][:3] if len(parts) == 1 else [0, *parts]
    hours, minutes, seconds = parts
    return int(days or 0) * 86_400 + hours * 3600 + minutes * 60 + seconds
