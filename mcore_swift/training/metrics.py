"""metrics.jsonl: the run's one numeric record, a line a step, exact enough to compare two runs bit by bit.

Other outputs may be lossy or live; this file is what tests, plots and the summary read. A resumed run continues it, and
each step stands in it once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from mcore_swift.errors import InputError
from mcore_swift.training.callbacks import Callback, RunEnd, RunInfo, StepRecord

FILE_NAME = "metrics.jsonl"


def step_row(record: StepRecord, *, peak_flops: float | None) -> dict[str, object]:
    """The values of one step under their public names, which are the keys of metrics.jsonl."""
    row: dict[str, object] = {
        "step": record.step,
        "loss": record.loss,
        "lr": record.lr,
        "grad_norm": record.grad_norm,
        "tokens_per_second_per_gpu": record.tokens_per_second,
        "tflops_per_gpu": record.flops_per_second / 1e12,
        "mfu": record.mfu(peak_flops),
        "memory_gib": record.memory_gib,
        "seconds": record.seconds,
        "tokens": record.tokens,
        "loss_tokens": record.loss_tokens,
        "skipped": record.skipped,
    }
    assert not row.keys() & record.extra.keys(), f"extra metrics shadow a step's own: {sorted(record.extra)}"
    return row | dict(record.extra)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl in order; a torn last line (the process was killed while writing) is left out."""
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {error}; expected one JSON object a line.") from None
    return rows


class MetricsFile(Callback):
    """Writes RUN/metrics.jsonl, every line flushed at once.

    Floats are written as `repr` writes them, so reading gives the same double back. JSON has no inf and NaN: they
    become null. Rows of steps that a resumed run will do again are dropped from the file before the first step.
    """

    def on_start(self, info: RunInfo) -> None:
        assert info.run_dir is not None
        self._peak_flops = info.peak_flops
        path = info.run_dir / FILE_NAME
        kept = _rows_until(path, info.steps_done)
        self._evaluated = {row["step"] for row in kept if "loss" not in row}
        _replace(path, kept)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def on_step(self, record: StepRecord) -> None:
        self._write(step_row(record, peak_flops=self._peak_flops))

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        assert all(name.startswith("eval_") for name in metrics), f"evaluation metrics start with eval_: {metrics}"
        if step in self._evaluated:  # evaluated before the checkpoint that this run resumed from
            return
        self._evaluated.add(step)
        self._write({"step": step, **metrics})

    def on_end(self, end: RunEnd) -> None:
        self._file.close()

    def _write(self, row: Mapping[str, object]) -> None:
        self._file.write(_to_line(row))
        self._file.flush()


def _rows_until(path: Path, steps_done: int) -> list[dict[str, Any]]:
    """Rows of `path` that a run continuing after `steps_done` steps keeps; none for a run that starts anew."""
    if steps_done == 0 or not path.exists():
        return []
    return [row for row in read_metrics(path) if row["step"] <= steps_done]


def _replace(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the rows so that a kill leaves either the old file or the new one."""
    scratch = path.with_name(path.name + ".new")
    scratch.write_text("".join(map(_to_line, rows)), encoding="utf-8")
    os.replace(scratch, path)


def _to_line(row: Mapping[str, object]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
