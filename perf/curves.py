"""Curves of runs from their metrics.jsonl, one panel a metric, as a PNG.

    python -m perf.curves RUN… --out FILE.png [--metrics loss accuracy margin]

Thin lines are the training steps' own batches (a running mean over ten steps), lines with dots the held-out data.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mcore_swift.errors import EXIT_INPUT, InputError
from mcore_swift.training.metrics import FILE_NAME, read_metrics

METRICS = ("loss", "accuracy", "margin", "reward_chosen", "reward_rejected")  # drawn where a run has them
WINDOW = 10  # training steps in the running mean
LEVELS = {"accuracy": 0.5, "margin": 0.0, "reward_chosen": 0.0, "reward_rejected": 0.0}  # what knows nothing has

Rows = list[dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.curves", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folders with metrics.jsonl")
    parser.add_argument("--out", metavar="FILE.png", required=True, type=Path)
    parser.add_argument("--metrics", nargs="+", help=f"default: {' '.join(METRICS)}, as far as the runs have them")
    given = parser.parse_args(argv)
    try:
        draw({run.name: read_run(run) for run in given.runs}, given.out, metrics=given.metrics)
    except InputError as error:
        print(f"curves: error: {error}", file=sys.stderr)
        return EXIT_INPUT
    return 0


def read_run(folder: Path) -> Rows:
    path = folder / FILE_NAME
    if not path.is_file():
        raise InputError(f"{folder} has no {FILE_NAME}: it must be a run's checkpoint.dir")
    return read_metrics(path)


def draw(runs: dict[str, Rows], path: Path, *, metrics: Sequence[str] | None = None) -> None:
    """Draws `metrics` of the runs, by name. Raises InputError for a metric that no run has, and names those it has."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    there = {name.removeprefix("eval_") for rows in runs.values() for row in rows for name in row} - {"step"}
    wanted = list(metrics or (name for name in METRICS if name in there))
    missing = [name for name in wanted if name not in there]
    if missing or not wanted:
        has = ", ".join(sorted(there)) or "nothing"
        raise InputError(f"no {', '.join(missing or METRICS)} in {', '.join(runs)}; there is {has}")
    figure = Figure(figsize=(3.6 * len(wanted), 3.0), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)  # the canvas of a file, so no display is looked for
    for number, name in enumerate(wanted, start=1):
        axes = figure.add_subplot(1, len(wanted), number)
        for colour, (run, rows) in enumerate(runs.items()):
            steps, values = _points(rows, name)
            axes.plot(steps, _running_mean(values), color=f"C{colour}", alpha=0.45, linewidth=1)
            held_out = _points(rows, f"eval_{name}")
            axes.plot(*held_out, color=f"C{colour}", marker="o", markersize=4, linewidth=2, label=run)
        if name in LEVELS:
            axes.axhline(LEVELS[name], color="0.5", linestyle=":", linewidth=1)
        axes.set(xlabel="step", title=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        if number == 1:
            axes.legend(fontsize="small", framealpha=0.9)
    figure.savefig(path)


def _points(rows: Rows, name: str) -> tuple[list[int], list[float]]:
    """Steps and values; a value that was not finite is null in the file, and is left out."""
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _running_mean(values: Sequence[float]) -> list[float]:
    """Of the last `WINDOW` values, fewer at the start."""
    return [statistics.fmean(values[max(0, end - WINDOW) : end]) for end in range(1, len(values) + 1)]


if __name__ == "__main__":
    raise SystemExit(main())
