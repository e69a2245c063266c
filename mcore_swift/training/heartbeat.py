"""A rank's sign of life, from the training loop itself: a thread would go on beating while training hangs.

MCORE_SWIFT_HEARTBEAT names the file, on a file system of the node's own; launch.agent sets it, reads the file, and
decides when silence is too long. MCORE_SWIFT_STACKS names the file that USR2 makes the process write its Python stacks
into, whatever it hangs in. Without the variables nothing is written.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from mcore_swift.training.callbacks import Callback, RunEnd, RunInfo, StepRecord

STACKS_SIGNAL = signal.SIGUSR2


class Heartbeat(Callback):
    """Replaces one small file at each phase and step: {rank, pid, phase, step, total, seconds, cpu_seconds, …}.

    `seconds` is the last step's wall time, which all ranks share since they wait for each other; `cpu_seconds` what
    this process computed meanwhile. `monotonic` is CLOCK_MONOTONIC, which all processes of a node share.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._scratch = path, path.with_name(f".{path.name}.{os.getpid()}")
        self._values: dict[str, object] = {
            "rank": int(os.environ.get("RANK", "0")),
            "pid": os.getpid(),
            "phase": "start",
            "step": 0,
            "total": None,
            "seconds": None,
            "cpu_seconds": None,
        }
        self._cpu = time.process_time()

    def beat(self, **values: object) -> None:
        self._values |= values
        content = self._values | {"time": time.time(), "monotonic": time.monotonic()}
        self._scratch.write_text(json.dumps(content), encoding="utf-8")
        os.replace(self._scratch, self._path)

    def on_phase(self, phase: str) -> None:
        self.beat(phase=phase)

    def on_start(self, info: RunInfo) -> None:
        self._cpu = time.process_time()
        self.beat(phase="train", step=info.steps_done, total=info.total_steps)

    def on_step(self, record: StepRecord) -> None:
        before, self._cpu = self._cpu, time.process_time()
        self.beat(phase="train", step=record.step, seconds=record.seconds, cpu_seconds=self._cpu - before)

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        self.beat(phase="train")

    def on_end(self, end: RunEnd) -> None:
        self.beat(phase="end")


def start() -> None:
    """Says that this rank lives, and makes it show its stacks on request. Call it before anything slow is imported."""
    stacks = os.environ.get("MCORE_SWIFT_STACKS")
    if stacks:
        file = open(stacks, "a")  # noqa: SIM115  (faulthandler writes into it for as long as the process lives)
        faulthandler.register(STACKS_SIGNAL, file=file, all_threads=True, chain=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [STACKS_SIGNAL])
    for heartbeat in from_environment():
        heartbeat.beat()


def from_environment() -> list[Heartbeat]:
    """The heartbeat that this process was asked for, if any."""
    path = os.environ.get("MCORE_SWIFT_HEARTBEAT")
    return [Heartbeat(Path(path))] if path else []
