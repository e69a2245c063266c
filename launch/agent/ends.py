"""How a rank ended: what its exit code, its signal and its last lines say, as one record that others can trust.

srun and ssh report codes of their own (143 for a rank's 7, 0 after a lost node); these records are what counts.
"""

from __future__ import annotations

import os
import re
import signal
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launch.agent.job import write_json
from mcore_swift.errors import EXIT_INPUT, EXIT_NEVER_RESTART, EXIT_TRY_AGAIN

TAIL_BYTES = 64 << 10
TAIL_LINES = 40
MESSAGE_LENGTH = 400

# The first row whose pattern is found decides; the line of the error itself is searched before the lines around it.
CAUSES: list[tuple[str, str]] = [
    ("not finite", r"step \d+: loss .*: not finite"),
    ("disk full", r"No space left on device|Disk quota exceeded|File too large"),
    ("CUDA out of memory", r"CUDA out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED"),
    ("out of memory", r"MemoryError|Cannot allocate memory|DefaultCPUAllocator: can't allocate"),
    ("port in use", r"EADDRINUSE|[Aa]ddress already in use"),
    ("NCCL timeout", r"Watchdog caught collective operation timeout|NCCL.{0,80}time(d )?out"),
    ("lost a peer", r"ncclRemoteError|ncclSystemError|[Cc]onnection (was )?(closed|reset|refused)|Broken pipe"),
    ("lost a peer", r"remote process exited|DistNetworkError|DistStoreError|Timed out waiting .*(client|recv|store)"),
    ("CUDA error", r"CUDA error|CUBLAS_STATUS|CUDNN_STATUS|uncorrectable ECC|device-side assert|NCCL error"),
]
# Sorted by how much they explain: what a rank suffers when another one is gone comes last.
EXPLAINS = ("never restart", "wrong input", "disk full", "hang", "CUDA error", "CUDA out of memory", "out of memory")
SUFFERS = ("NCCL timeout", "lost a peer", "ended with the others", "stopped", "done")


@dataclass(frozen=True, kw_only=True)
class End:
    """rank-R.end.json"""

    rank: int
    node: str
    pid: int
    code: int | None  # exit code; None: ended by a signal, or never started
    signal: str | None  # its name
    cause: str
    message: str  # one line
    phase: str
    step: int  # the last finished one
    time: float  # Unix seconds
    by_agent: bool = False  # the agent sent the signal
    state: str = ""  # the kernel's letter for the process when it hung
    in_collective: bool | None = None  # whether its stacks, taken when it hung, are of one who waits for others
    tail: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return self.cause not in ("done", "stopped")

    @property
    def blame(self) -> tuple[int, int, float]:
        """Sorts ends: the one that explains the others first."""
        kind = 0 if self.cause in EXPLAINS else 2 + SUFFERS.index(self.cause) if self.cause in SUFFERS else 1
        # Of ranks that hang together: one that doesn't run at all, one that waits for nobody, one that is behind.
        suspect = 0 if self.state in ("T", "D") else 1 if self.in_collective is False else 2
        return kind, suspect if self.cause == "hang" else self.step if kind == 0 else 0, self.time

    def write(self, folder: Path) -> None:
        write_json(folder / f"rank-{self.rank}.end.json", asdict(self))


def read_end(values: dict[str, Any]) -> End:
    """The record from its JSON."""
    return End(**values)


def describe(code: int, tail: list[str], *, by_agent: bool, hung: str | None) -> tuple[str, str]:
    """(cause, message) of a rank. `code` as subprocess gives it: negative is a signal. `hung`: what it hung in."""
    if hung is not None:
        return "hang", hung
    if by_agent and code in (-signal.SIGTERM, -signal.SIGKILL):
        return "ended with the others", "it still ran when another rank had failed"
    message = last_error(tail)
    fixed = {0: "done", EXIT_TRY_AGAIN: "stopped", EXIT_NEVER_RESTART: "never restart"}
    if code in fixed:
        return fixed[code], message
    for text in (message, "\n".join(tail)):
        for cause, pattern in CAUSES:
            if re.search(pattern, text):
                return cause, message
    if code == EXIT_INPUT:
        return "wrong input", message
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}", f"{name} (out of memory?)" if code == -signal.SIGKILL else message or name
    return f"exit code {code}", message


def last_error(tail: list[str]) -> str:
    """The line that says what went wrong: the last one of an exception or of our own, else the last one at all."""
    error = re.compile(r"(mcore-swift: |\w[\w.]*(Error|Exception|Exit|Interrupt|Failure)\b)")
    lines = [line.strip() for line in tail if line.strip()]
    found = [line for line in lines if error.match(line)] or lines
    return found[-1][:MESSAGE_LENGTH] if found else ""


def read_tail(log: Path) -> list[str]:
    """The last lines of a log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
    except OSError:
        return []


def in_collective(stacks: str) -> bool | None:
    """Whether a process waits for other ranks, from faulthandler's dump of its threads; None: there is no dump."""
    if "File " not in stacks:
        return None
    return bool(re.search(r"torch/distributed/|pipeline_parallel/p2p_communication", stacks))
