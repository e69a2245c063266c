"""The run folder and its two small files: job.json (how a run is started) and attempt.json (the fence).

Every file that another process reads is written beside its place and renamed into it.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
import zlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mcore_swift.errors import InputError, nearest

PORTS = 20_000, 12_000  # the first and how many: below those that the kernel hands out
ATTEMPT_FOLDER = re.compile(r"\.?attempt-(\d+)")

# Seconds without a new heartbeat after which a rank of that phase counts as hung. None: never.
PHASE_SECONDS: dict[str, float | None] = {
    "start": 600.0,  # until the first heartbeat: imports from a cold file system
    "load": 1800.0,  # process groups, data, weights, a checkpoint
    "train": 600.0,  # one step
    "evaluate": 1800.0,
    "save": 1800.0,
    "export": 3600.0,
    "end": 600.0,  # this rank is done and others are not
}


def write_json(path: Path, value: object) -> None:
    """Replaces the file at once: who reads it finds the old content or the new one. Raises OSError."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any] | None:
    """The file's object; None when it isn't there or isn't whole (a full disk, another program)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


@dataclass(frozen=True, kw_only=True)
class Job:
    """job.json. Times are in seconds."""

    nodes: int = 1  # that an attempt runs on
    ranks_per_node: int = 1
    id: str = ""  # the scheduler's job id, or any text: it decides the port
    spares: int = 0  # nodes asked for beyond `nodes`; what counts is the list of hosts that supervise gets
    command: list[str] = field(default_factory=list)  # of each rank; []: mcore-swift train with RUN/recipe.yaml
    overrides: list[str] = field(default_factory=list)  # words added to that train command
    environment: dict[str, str] = field(default_factory=dict)  # of each rank, over the agent's own
    max_restarts: int = 10  # inside one job, swaps included
    max_attempts: int = 100  # of the whole run, requeues included
    max_without_progress: int = 2  # failed attempts in a row that left no newer checkpoint
    bad_steps: str = "stop"  # rewind: a step of NaN or infinite loss is left out in the next attempt
    max_rewinds: int = 3
    timeouts: dict[str, float | None] = field(default_factory=dict)  # a phase's seconds, over PHASE_SECONDS
    check_in_seconds: float = 120.0  # for all agents of an attempt to report
    lost_seconds: float = 6.0  # of silence, after which a node, or the supervisor, counts as lost
    grace_seconds: float = 2.0  # between TERM and KILL when an attempt has failed
    stop_seconds: float = 900.0  # for the step under way and the checkpoint when asked to stop
    backoff_seconds: float = 5.0  # before the second restart in a row without progress; doubles, at most 300

    def timeout(self, phase: str) -> float | None:
        """Seconds that a rank may be silent in `phase`; None: for ever."""
        return {**PHASE_SECONDS, **self.timeouts}.get(phase, PHASE_SECONDS["load"])

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    def rank_command(self, run: Path, skip_steps: list[int]) -> list[str]:
        """The words that start one rank."""
        if self.command:
            return self.command
        words = [sys.executable, "-m", "mcore_swift.cli", "train", str(run / "recipe.yaml")]
        words += ["--checkpoint.dir", str(run), *self.overrides]
        return [*words, "--schedule.skip_steps", json.dumps(skip_steps)] if skip_steps else words


def job_of(
    *,
    nodes: int,
    ranks_per_node: int,
    max_restarts: int,
    step_timeout: int | None,
    bad_steps: str,
    spares: int = 0,
    environment: dict[str, str] | None = None,
) -> Job:
    """job.json from the command line's options; a scheduler's job id comes later."""
    return Job(
        id=secrets.token_hex(4),
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        spares=spares,
        max_restarts=max_restarts,
        bad_steps=bad_steps,
        timeouts={} if step_timeout is None else {"train": float(step_timeout)},
        environment=environment or {},
    )


@dataclass(frozen=True, kw_only=True)
class Fence:
    """attempt.json: which attempt is the run's, on which nodes, and where its parts find each other."""

    attempt: int
    token: str  # what an agent shows the supervisor
    hosts: list[str]  # in rank order
    master: str  # HOST:PORT of the ranks' rendezvous
    supervisor: str | None = None  # HOST:PORT; None: the agents are on their own
    skip_steps: list[int] = field(default_factory=list)


class RunFolder:
    """Where everything of a run lies."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    def attempt(self, number: int) -> Path:
        return self.path / f"attempt-{number}"

    def attempts(self) -> list[int]:
        """The numbers of the attempts so far, the first one first."""
        if not self.path.is_dir():
            return []
        return sorted(number for number in map(_number, self.path.iterdir()) if number)

    def next_attempt(self) -> int:
        """A number above every attempt's, those that were started by hand included (checkpoints/.attempt-K)."""
        checkpoints = self.path / "checkpoints"
        by_hand = [_number(path) for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
        return 1 + max([0, *self.attempts(), *by_hand])

    def make_attempt(self, number: int) -> Path:
        folder = self.attempt(number)
        for name in ("heartbeat", "stacks"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        return folder

    # --- the two files ------------------------------------------------------------------------------------------------

    def write_job(self, job: Job) -> None:
        write_json(self.path / "job.json", asdict(job))

    def job(self) -> Job:
        """Raises InputError when job.json is missing or wrong."""
        return Job(**_checked(self.path / "job.json", Job))

    def write_fence(self, fence: Fence) -> None:
        write_json(self.path / "attempt.json", asdict(fence))

    def fence(self) -> Fence:
        """Raises InputError when attempt.json is missing or damaged."""
        return Fence(**_checked(self.path / "attempt.json", Fence))

    def verdicts(self) -> list[dict[str, Any]]:
        """The verdicts of the attempts that have one, the first one first."""
        found = [read_json(self.attempt(number) / "verdict.json") for number in self.attempts()]
        return [verdict for verdict in found if verdict is not None]


def master_port(job_id: str, attempt: int) -> int:
    """The port of the ranks' rendezvous: another one for each attempt, so that a restart finds its own free."""
    first, count = PORTS
    return first + (zlib.crc32(job_id.encode()) + 101 * attempt) % count


def _number(path: Path) -> int:
    match = ATTEMPT_FOLDER.fullmatch(path.name)
    return int(match[1]) if match else 0


def _checked(path: Path, kind: type[Job] | type[Fence]) -> dict[str, Any]:
    value = read_json(path)
    if value is None:
        raise InputError(f"{path}: missing, or not a JSON object; `mcore-swift launch` writes it")
    names = [field.name for field in fields(kind)]
    for name in value:
        if name not in names:
            raise InputError(f"{path}: unknown key {name!r}.{nearest(name, names)}")
    return value
