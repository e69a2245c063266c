"""Starting one rank: in its own session, dead when the agent dies, signals kept until it listens, near its GPU."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from mcore_swift.stop import STOP_SIGNALS
from mcore_swift.training.heartbeat import STACKS_SIGNAL

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Process(Protocol):
    """What the agent needs of a rank's process; its pid is also its session and process group."""

    pid: int

    def poll(self) -> int | None: ...


def start(words: Sequence[str], *, environment: Mapping[str, str], log: Path, cpus: set[int]) -> Process:
    """Starts a rank, whose output is appended to `log`. `cpus`: the only ones it may use; empty: all.

    Raises OSError when it can't be started.
    """
    with log.open("ab") as output:
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
            preexec_fn=child_setup(os.getpid(), cpus),
        )


def child_setup(parent: int, cpus: set[int]) -> Callable[[], None]:
    """What the new process does before it becomes the rank."""

    def setup() -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the kernel was told
            os._exit(1)
        # Kept across exec: what comes before the rank's handlers are there waits, and neither kills it nor is lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, [*STOP_SIGNALS, STACKS_SIGNAL])
        if cpus:
            os.sched_setaffinity(0, cpus)

    return setup


def end(process: Process, number: int) -> None:
    """Sends a signal to the rank and, if it is to end, to all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        if number in (signal.SIGTERM, signal.SIGKILL):
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid, number)


def state(pid: int) -> str:
    """The kernel's letter for what a process does: R runs, S sleeps, D waits for a device, T is stopped; "": gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def gpu_cpus(local_rank: int, *, devices: Path = Path("/sys/bus/pci/devices")) -> set[int]:
    """The CPUs next to the rank's GPU that this process may use; empty where there is no GPU, or nothing is known.

    A GPU's memory and network traffic pass through its own NUMA node. nvidia-smi lists GPUs by PCI address, as
    CUDA_DEVICE_ORDER=PCI_BUS_ID does; a CUDA_VISIBLE_DEVICES of numbers is followed.
    """
    addresses = _gpu_addresses()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        chosen = [word.strip() for word in visible.split(",")]
        if not all(word.isdigit() and int(word) < len(addresses) for word in chosen):
            return set()
        addresses = [addresses[int(word)] for word in chosen]
    if local_rank >= len(addresses):
        return set()
    try:
        near = _cpu_list((devices / addresses[local_rank] / "local_cpulist").read_text())
    except (OSError, ValueError):
        return set()
    return near & os.sched_getaffinity(0)


def _gpu_addresses() -> list[str]:
    """PCI addresses as /sys writes them: 0000:3b:00.0, where nvidia-smi has 00000000:3B:00.0."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=pci.bus_id", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []
    return [address.strip().lower()[-12:] for address in found]


def _cpu_list(text: str) -> set[int]:
    """`0-3,8` → {0, 1, 2, 3, 8}"""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        cpus |= set(range(int(first), int(last or first) + 1))
    return cpus
