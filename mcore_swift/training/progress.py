"""The line that a person watches: redrawn in place on a terminal, one plain line an interval in a log file."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mcore_swift.training.callbacks import Callback, RunEnd, RunInfo, StepRecord

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

WARMUP_STEPS = 2  # a process's first steps compile, allocate and connect: they say nothing about its speed


def steady(values: list[float]) -> list[float]:
    """The values of a process's steps without its warm-up steps, or all where there are no others."""
    return values[WARMUP_STEPS:] or values


def format_duration(seconds: float) -> str:
    """H:MM:SS, with days where there are any."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hour}:{minute:02d}:{second:02d}"


def format_rate(value: float) -> str:
    """About three digits from the slowest CPU to the fastest GPU: 0.0123, 12.3, 528, 10,255."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.3g}"


def step_text(record: StepRecord, info: RunInfo, *, eta_seconds: float) -> list[str]:
    """The parts of the line, the most wanted first."""
    width = len(str(info.total_steps))
    mfu = record.mfu(info.peak_flops)
    parts = [
        f"step {record.step:>{width}}/{info.total_steps}",
        f"loss {record.loss:.4f}" + (" (skipped)" if record.skipped else ""),
        f"lr {record.lr:.2e}",
        f"grad norm {record.grad_norm:.3g}",
        *(f"{name} {value:.4g}" for name, value in record.extra.items()),
        f"{format_rate(record.tokens_per_second)} tokens/s/{info.device_unit}",
        f"{format_rate(record.flops_per_second / 1e12)} TFLOP/s/{info.device_unit}",
    ]
    if mfu is not None:
        parts.append(f"MFU {100 * mfu:.1f}%")
    if record.memory_gib is not None:
        parts.append(f"{record.memory_gib:.1f} GiB")
    return [*parts, f"ETA {format_duration(eta_seconds)}"]


# Counts of the data report that a person should not have to look for.
CHANGED_ROWS = {
    "truncated": "were longer than data.sequence_length and were cut",
    "dropped": "were longer than data.sequence_length and were left out",
    "without_loss": "have nothing to learn left after the cut and were left out",
}


class ProgressLine(Callback):
    """Prints to the console (default: standard output), live if it is a terminal and plain otherwise."""

    def __init__(self, *, interval: int, console: Console | None = None) -> None:
        self._interval = interval
        self._given_console = console
        self._live: Live | None = None
        self._seconds: list[float] = []

    def on_start(self, info: RunInfo) -> None:
        from rich.console import Console

        self._info = info
        self._console = self._given_console or Console(highlight=False)
        self._print(
            f"{info.model_name}: {info.num_parameters / 1e6:,.1f} M parameters, {info.layout}, {info.device_name}"
            + (f", resumed after step {info.steps_done}" if info.steps_done else "")
        )
        for name in CHANGED_ROWS:
            if info.data_counts.get(name):
                self._print(f"data: {info.data_counts[name]} rows {CHANGED_ROWS[name]} (data.too_long)")
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = _start_live(self._console)

    def on_step(self, record: StepRecord) -> None:
        self._seconds.append(record.seconds)
        eta_seconds = statistics.median(steady(self._seconds)[-20:]) * (self._info.total_steps - record.step)
        parts = step_text(record, self._info, eta_seconds=eta_seconds)
        if self._live is not None:
            self._live.update(_bar_and_text(record.step, self._info.total_steps, " · ".join(parts)), refresh=True)
            return
        first = record.step == self._info.steps_done + 1
        if first or record.step % self._interval == 0 or record.step == self._info.total_steps:
            self._print(" | ".join(parts))

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        self._print(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))

    def on_checkpoint(self, step: int, path: Path) -> None:
        self._print(f"step {step}: checkpoint {path}")

    def on_end(self, end: RunEnd) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, text: str) -> None:
        # soft_wrap: a log line stays one line, whatever width rich assumes for a file
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._console.file.flush()


def _start_live(console: Console) -> Live:
    from rich.live import Live

    # No refresh thread: ranks fork helpers (data workers, checkpoint writers), and a fork may copy a held lock.
    live = Live(console=console, auto_refresh=False)
    live.start()
    console.show_cursor(True)  # a killed run must not leave the shell without a cursor
    return live


def _bar_and_text(done: int, total: int, text: str) -> Table:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(expand=True)
    grid.add_row(ProgressBar(total=total, completed=done))
    grid.add_row(Text(text))  # wraps on a narrow screen, so that nothing is cut off
    return grid
