"""The page at the end of a run: what was trained on what, how it went, and the command to type next.

Everything numeric comes from metrics.jsonl, so a run that was resumed ten times is summed up as one.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mcore_swift.training.callbacks import Callback, RunEnd, RunInfo
from mcore_swift.training.metrics import FILE_NAME, read_metrics
from mcore_swift.training.progress import format_duration, format_rate, steady

_PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "datasets")
_SMOOTH_FROM = 50  # steps; shorter curves are drawn as they are
_ENDS = 5  # steps averaged at either end of the run
_SHOWN = ("accuracy", "margin")  # of an evaluation's metrics, beside its loss

Row = dict[str, Any]


class Summary(Callback):
    """Writes RUN/summary.md and RUN/loss.png and prints the outcome with the next command, whatever the outcome was."""

    def on_start(self, info: RunInfo) -> None:
        assert info.run_dir is not None
        self._info, self._run_dir = info, info.run_dir

    def on_end(self, end: RunEnd) -> None:
        rows = read_metrics(self._run_dir / FILE_NAME)
        steps = [row for row in rows if row.get("loss") is not None]
        evals = [row for row in rows if row.get("eval_loss") is not None]
        if steps:
            draw_loss(self._run_dir / "loss.png", steps=steps, evals=evals, title=self._info.model_name)
        facts = run_facts(self._info, end, steps=steps, evals=evals)
        purpose, command = next_command(self._info, end)
        page = _page(self._info, facts=facts, has_figure=bool(steps), purpose=purpose, command=command)
        (self._run_dir / "summary.md").write_text(page, encoding="utf-8")
        _print_box(self._info, end, facts=facts, purpose=purpose, command=command)


def run_facts(info: RunInfo, end: RunEnd, *, steps: list[Row], evals: list[Row]) -> dict[str, str]:
    """The summary's rows, label to text. `steps` are rows of all starts of the run; speed is that of the last start."""
    facts = {
        "outcome": f"{end.outcome} after {end.steps_done} of {info.total_steps} steps",
        "model": f"{info.model_name}, {info.num_parameters / 1e6:,.1f} M parameters",
        "layout": f"{info.layout} on {info.world_size} x {info.device_name}",
    }
    if info.base_weights:
        facts["base weights"] = info.base_weights
        if end.hf_dir is not None:
            facts["merged model"] = f"{end.hf_dir.name}: the adapters in the dequantized weights, with that error"
    if info.pipeline:
        facts["pipeline"] = info.pipeline
    if steps:
        facts |= _training_facts(info, steps=steps)
    if evals:
        best = min(evals, key=lambda row: row["eval_loss"])
        values = {name: best.get(f"eval_{name}") for name in _SHOWN}
        also = "".join(f", {name} {value:.4f}" for name, value in values.items() if value is not None)
        facts["best evaluation"] = f"loss {best['eval_loss']:.4f}{also} at step {best['step']}"
    facts["wall time"] = format_duration(end.seconds) + (" (since the resume)" if info.steps_done else "")
    return facts


def _training_facts(info: RunInfo, *, steps: list[Row]) -> dict[str, str]:
    losses = [row["loss"] for row in steps]
    loss = f"{losses[0]:.4f} (step {steps[0]['step']}) → {losses[-1]:.4f} (step {steps[-1]['step']})"
    if len(losses) >= 2 * _ENDS:
        first, last = statistics.fmean(losses[:_ENDS]), statistics.fmean(losses[-_ENDS:])
        loss += f"; mean of the first {_ENDS}: {first:.4f}, of the last {_ENDS}: {last:.4f}"
    facts = {
        "tokens": f"{sum(row['tokens'] for row in steps):,} processed, "
        f"{sum(row['loss_tokens'] for row in steps):,} in the loss",
        "loss": loss,
    }
    this_start = [row for row in steps if row["step"] > info.steps_done]
    if this_start:
        facts["throughput (median)"] = _throughput(info, this_start)
    memory = [row["memory_gib"] for row in steps if row["memory_gib"] is not None]
    if memory:
        facts["memory"] = f"{max(memory):.1f} GiB at most on one {info.device_unit}"
    facts["time in steps"] = format_duration(sum(row["seconds"] for row in steps))
    return facts


def _throughput(info: RunInfo, rows: list[Row]) -> str:
    def median(key: str) -> float:
        return statistics.median(steady([row[key] for row in rows]))

    text = (
        f"{format_rate(median('tokens_per_second_per_gpu'))} tokens/s/{info.device_unit}, "
        f"{format_rate(median('tflops_per_gpu'))} TFLOP/s/{info.device_unit}"
    )
    return text if rows[-1]["mfu"] is None else f"{text}, MFU {100 * median('mfu'):.1f}%"


def next_command(info: RunInfo, end: RunEnd) -> tuple[str, str]:
    """What to do next and the command that does it ("" where there is none)."""
    if info.scored and end.hf_dir is not None:
        path = shlex.quote(str(end.hf_dir))
        return "open it with transformers' AutoModelForSequenceClassification", f"mcore-swift inspect {path}"
    if end.hf_dir is not None:
        path = shlex.quote(str(end.hf_dir))
        return "try the trained model", f'mcore-swift generate {path} --prompt "…"'
    if end.checkpoint is not None and end.outcome == "finished":
        path = shlex.quote(str(end.checkpoint))
        return "try the trained model", f'mcore-swift generate {path} --prompt "…"'
    if end.checkpoint is not None:
        return f"continue from {end.checkpoint}", info.command
    return "no checkpoint was saved; to start again", info.command


def _page(info: RunInfo, *, facts: Mapping[str, str], has_figure: bool, purpose: str, command: str) -> str:
    versions = {"Python": platform.python_version(), **_installed_versions()}
    sections = [
        f"# {info.model_name}",
        _table(facts),
        "![loss](loss.png)" if has_figure else "",
        f"Next, {purpose}:\n```\n{command}\n```",
        f"## Data\n{_table(info.data_counts)}" if info.data_counts else "",
        f"## Versions\n{_table(versions)}",
        f"## Recipe\nStarted with `{info.command}`\n```yaml\n{info.recipe_text.rstrip()}\n```",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _table(rows: Mapping[str, object]) -> str:
    texts = {name: f"{value:,}" if isinstance(value, int) else str(value) for name, value in rows.items()}
    body = [f"| {name} | {text.replace('|', '&#124;')} |" for name, text in texts.items()]
    return "\n".join(["| | |", "| --- | --- |", *body])


def _installed_versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _print_box(info: RunInfo, end: RunEnd, *, facts: Mapping[str, str], purpose: str, command: str) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    assert info.run_dir is not None
    console = Console(highlight=False)
    shown = [f"{name}: {facts[name]}" for name in ("loss", "best evaluation", "throughput (median)") if name in facts]
    shown.append(f"summary: {info.run_dir / 'summary.md'}")
    console.print(Panel(Text("\n".join(shown)), title=Text(facts["outcome"]), title_align="left", expand=False))
    # The command stands outside the box and unwrapped, to be copied.
    console.print(f"Next, {purpose}:\n  {command}", markup=False, soft_wrap=True)
    console.file.flush()


def draw_loss(path: Path, *, steps: list[Row], evals: list[Row], title: str) -> None:
    """Draws the loss of each step, the evaluations and, on the right axis, the learning rate as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # the canvas of a file, so no display is looked for
    axes = figure.add_subplot()
    numbers, losses = [row["step"] for row in steps], [row["loss"] for row in steps]
    rate_axes = axes.twinx()
    rates = [row["lr"] for row in steps]
    rate_axes.plot(numbers, rates, color="0.6", linestyle="--", linewidth=1, label="learning rate")
    if len(losses) < _SMOOTH_FROM:
        axes.plot(numbers, losses, color="tab:blue", marker=".", linewidth=1.6, label="loss")
    else:
        axes.plot(numbers, losses, color="tab:blue", alpha=0.35, linewidth=0.8, label="loss")
        axes.plot(numbers, _smoothed(losses), color="tab:blue", linewidth=1.8, label="loss, smoothed")
    if evals:
        points = [row["step"] for row in evals], [row["eval_loss"] for row in evals]
        axes.plot(*points, color="tab:orange", marker="o", markersize=5, linewidth=1, label="evaluation")
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.set_zorder(rate_axes.get_zorder() + 1)  # the loss lies over the learning rate
    axes.patch.set_visible(False)
    rate_axes.set_ylabel("learning rate", color="0.4")
    rate_axes.set_ylim(bottom=0)
    rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate_axes.tick_params(axis="y", colors="0.4")
    handles = [*axes.get_lines(), *rate_axes.get_lines()]
    axes.legend(handles=handles, loc="best", framealpha=0.9)
    figure.savefig(path)


def _smoothed(values: list[float]) -> list[float]:
    """Exponential mean over about a thirtieth of the run, corrected for its start (as Adam corrects its moments)."""
    keep = 1 - 30 / max(len(values), 150)
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(mean / weight)
    return smoothed
