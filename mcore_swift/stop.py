"""Requests to stop: USR1 (the job's time is nearly up) and TERM (preemption). The run saves and leaves with code 75.

This must be in place before anything slow is imported: a signal whose handler is not there yet kills the process
without a word. Nothing but the standard library's `signal` is needed for it. Whoever starts ranks may block the signals
first (launch.agent does): one that comes before the handler then waits for it.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass
class StopFlag:
    """Set by a signal; the ranks agree on it at the next step's end."""

    received: int = 0
    installed: bool = False

    def install(self) -> None:
        """Listens from now on, and takes what was blocked until now."""
        for number in STOP_SIGNALS:
            signal.signal(number, self.receive)
        self.installed = True
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def receive(self, number: int, frame: object) -> None:
        self.received = number

    def agreed(self, device: torch.device) -> int:
        """The signal that any rank of the job has received, 0 for none. Collective."""
        import torch
        import torch.distributed as dist

        flag = torch.tensor(self.received, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag.item())


FLAG = StopFlag()  # a process has one handler for each signal, and so one flag


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Listens inside; leaves the process as it was."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    FLAG.install()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        FLAG.received, FLAG.installed = 0, False
