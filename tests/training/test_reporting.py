"""What a run writes and prints, driven by made-up steps: exact contents, exact numbers, resume, terminals, failures."""

from __future__ import annotations

import importlib.util
import io
import json
import math
from pathlib import Path

import pytest

from mcore_swift.errors import InputError
from mcore_swift.recipe import CheckpointSection, DataSection, LoggingSection, ModelSection, Recipe, SourceSection
from mcore_swift.training.callbacks import Callback, RunEnd, RunInfo, StepRecord, build_callbacks
from mcore_swift.training.metrics import MetricsFile, read_metrics, step_row
from mcore_swift.training.progress import ProgressLine, format_duration, format_rate
from mcore_swift.training.summary import Summary, _smoothed, run_facts
from mcore_swift.training.trackers import TensorBoard


def recipe(run_dir: Path | None, **logging) -> Recipe:
    return Recipe(
        model=ModelSection(path="model"),
        data=DataSection(train=[SourceSection(path="rows.jsonl")]),
        checkpoint=CheckpointSection(dir=str(run_dir) if run_dir else None),
        logging=LoggingSection(**logging),
    )


def info(run_dir: Path | None, **changes) -> RunInfo:
    values = {
        "model_name": "SmolLM2-135M",
        "num_parameters": 134_515_008,
        "layout": "TP1 PP2 DP1",
        "pipeline": "Et*15|t*15L: idle for 20.0 % of a step",
        "world_size": 2,
        "device_name": "NVIDIA H100 80GB HBM3",
        "device_unit": "GPU",
        "peak_flops": 1000e12,
        "total_steps": 12,
        "steps_done": 0,
        "recipe_text": "model: {path: model}\n",
        "command": "mcore-swift train demo.yaml",
        "run_dir": run_dir,
        "data_counts": {"rows": 6473, "truncated": 3},
    }
    return RunInfo(**(values | changes))


def record(step: int, **changes) -> StepRecord:
    """Steps of 2 s, the first two of 20 s; 1,024 tokens/s and 500 TFLOP/s on each of 2 GPUs where steady."""
    values = {
        "step": step,
        "loss": 2.0 + 1.0 / (3 * step),
        "lr": 1e-4 / step,
        "grad_norm": 0.1 * step,
        "tokens": 4096,
        "loss_tokens": 3000 + step,
        "flops": 2000e12,
        "seconds": 20.0 if step <= 2 else 2.0,
        "world_size": 2,
        "memory_gib": 10.0 + step / 4,
    }
    return StepRecord(**(values | changes))


def drive(callbacks: list[Callback], run: RunInfo, steps: range, *, eval_every: int = 4, end: RunEnd | None = None):
    for callback in callbacks:
        callback.on_start(run)
    for step in steps:
        for callback in callbacks:
            callback.on_step(record(step))
            if step % eval_every == 0:
                callback.on_eval(step, {"eval_loss": 2.5 - step / 100})
    for callback in callbacks:
        if end is not None:
            callback.on_end(end)


def finished(steps_done: int = 12, **changes) -> RunEnd:
    return RunEnd(**({"outcome": "finished", "steps_done": steps_done, "seconds": 75.4} | changes))


def test_metrics_have_every_step_once_and_every_bit(tmp_path: Path):
    drive([MetricsFile()], info(tmp_path), range(1, 9))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert [number for number, row in enumerate(rows) if "eval_loss" in row] == [4, 9]
    assert rows[2] == {
        "step": 3,
        "loss": 2.0 + 1.0 / 9,
        "lr": 1e-4 / 3,
        "grad_norm": 0.1 * 3,
        "tokens_per_second_per_gpu": 1024.0,
        "tflops_per_gpu": 500.0,
        "mfu": 0.5,
        "memory_gib": 10.75,
        "seconds": 2.0,
        "tokens": 4096,
        "loss_tokens": 3003,
        "skipped": False,
    }
    assert rows[4] == {"step": 4, "eval_loss": 2.46}


def test_a_resumed_run_continues_the_file(tmp_path: Path):
    drive([MetricsFile()], info(tmp_path), range(1, 9))
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(whole + b'{"step": 9, "lo')  # killed while writing
    resumed = MetricsFile()
    resumed.on_start(info(tmp_path, steps_done=4))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 4]
    resumed.on_eval(4, {"eval_loss": 2.46})  # evaluated again: known already
    for step in range(5, 9):
        resumed.on_step(record(step))
    resumed.on_eval(8, {"eval_loss": 2.42})
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_new_run_starts_a_new_file(tmp_path: Path):
    drive([MetricsFile()], info(tmp_path), range(1, 9))
    drive([MetricsFile()], info(tmp_path), range(1, 3))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_inf_and_nan_are_null(tmp_path: Path):
    writer = MetricsFile()
    writer.on_start(info(tmp_path, peak_flops=None))
    writer.on_step(
        record(1, loss=math.nan, grad_norm=math.inf, memory_gib=None, skipped=True, extra={"accuracy": 0.25})
    )
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert [row[k] for k in ("loss", "grad_norm", "memory_gib", "mfu", "skipped")] == [None, None, None, None, True]
    assert row["accuracy"] == 0.25


def test_an_edited_metrics_file_is_named(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nstep 2\n')
    with pytest.raises(InputError, match=r"metrics.jsonl, line 2: .*expected one JSON object a line"):
        MetricsFile().on_start(info(tmp_path, steps_done=1))


CUT = "data: 3 rows were longer than data.sequence_length and were cut (data.too_long)"


def test_plain_line_for_a_log_file(capsys: pytest.CaptureFixture[str]):
    drive([ProgressLine(interval=5)], info(None), range(1, 13), eval_every=12, end=finished())
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\r" not in out
    title, cut, *lines = out.splitlines()
    assert title == "SmolLM2-135M: 134.5 M parameters, TP1 PP2 DP1, NVIDIA H100 80GB HBM3"
    assert cut == CUT
    assert [line.split(" | ")[0] for line in lines[:4]] == ["step  1/12", "step  5/12", "step 10/12", "step 12/12"]
    assert lines[2] == (
        "step 10/12 | loss 2.0333 | lr 1.00e-05 | grad norm 1 | 1,024 tokens/s/GPU | 500 TFLOP/s/GPU | MFU 50.0% | "
        "12.5 GiB | ETA 0:00:04"
    )
    assert lines[4:] == ["step 12: eval_loss 2.3800"]


def test_plain_line_on_the_cpu_platform(capsys: pytest.CaptureFixture[str]):
    line = ProgressLine(interval=1)
    line.on_start(info(None, device_unit="rank", device_name="CPU", peak_flops=None, steps_done=6))
    line.on_step(record(7, flops=0.0484e12, memory_gib=None, skipped=True, extra={"accuracy": 0.5}))
    line.on_checkpoint(7, Path("runs/demo/step_7"))
    assert capsys.readouterr().out.splitlines() == [
        "SmolLM2-135M: 134.5 M parameters, TP1 PP2 DP1, CPU, resumed after step 6",
        CUT,
        "step  7/12 | loss 2.0476 (skipped) | lr 1.43e-05 | grad norm 0.7 | accuracy 0.5 | 1,024 tokens/s/rank | "
        "0.0121 TFLOP/s/rank | ETA 0:00:10",
        "step 7: checkpoint runs/demo/step_7",
    ]


def test_live_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch):
    from rich.console import Console

    monkeypatch.setenv("TERM", "xterm-256color")
    screen = io.StringIO()
    line = ProgressLine(interval=5, console=Console(file=screen, force_terminal=True, width=200, legacy_windows=False))
    drive([line], info(None), range(1, 13), eval_every=12, end=finished())
    text = screen.getvalue()
    assert all(f"step {step:>2}/12 · loss" in text for step in range(1, 13))  # every step, not every fifth
    assert "step 12: eval_loss 2.3800" in text
    assert "\x1b[2K" in text  # redrawn in place
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")  # the cursor is back


def test_formats():
    assert [format_duration(s) for s in (0.4, 59.6, 3661, 90061)] == ["0:00:00", "0:01:00", "1:01:01", "1d 1:01:01"]
    assert [format_rate(v) for v in (0.01234, 1.25, 12.34, 528.4, 10255.2)] == [
        "0.0123",
        "1.2",
        "12.3",
        "528",
        "10,255",
    ]


@pytest.mark.slow
def test_summary_of_a_resumed_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    drive([MetricsFile()], info(tmp_path), range(1, 7))
    end = finished(hf_dir=tmp_path / "my hf")
    drive([MetricsFile(), Summary()], info(tmp_path, steps_done=4), range(5, 13), end=end)
    page = (tmp_path / "summary.md").read_text()
    rows = dict(line[2:-2].split(" | ") for line in page.splitlines() if line.startswith("| ") and line != "| | |")
    first, last = sum(1 / s for s in range(1, 6)) / 15, sum(1 / s for s in range(8, 13)) / 15
    expected = {
        "outcome": "finished after 12 of 12 steps",
        "model": "SmolLM2-135M, 134.5 M parameters",
        "layout": "TP1 PP2 DP1 on 2 x NVIDIA H100 80GB HBM3",
        "pipeline": "Et*15&#124;t*15L: idle for 20.0 % of a step",
        "tokens": f"{12 * 4096:,} processed, {12 * 3000 + 78:,} in the loss",
        "loss": f"2.3333 (step 1) → 2.0278 (step 12); mean of the first 5: {2 + first:.4f}, "
        f"of the last 5: {2 + last:.4f}",
        "throughput (median)": "1,024 tokens/s/GPU, 500 TFLOP/s/GPU, MFU 50.0%",
        "memory": "13.0 GiB at most on one GPU",
        "time in steps": "0:01:00",
        "best evaluation": "loss 2.3800 at step 12",
        "wall time": "0:01:15 (since the resume)",
        "rows": "6,473",
        "truncated": "3",
    }
    assert {name: rows.get(name) for name in expected} == expected
    assert rows["torch"].startswith("2.")
    assert "```yaml\nmodel: {path: model}\n```" in page
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert f"Next, try the trained model:\n  mcore-swift generate '{tmp_path}/my hf' --prompt \"…\"\n" in out
    assert "finished after 12 of 12 steps" in out


def test_summary_of_a_run_over_answers(tmp_path: Path):
    evals = [{"step": s, "eval_loss": 0.7 - s / 100, "eval_accuracy": 0.6, "eval_margin": 0.1 * s} for s in (4, 8)]
    facts = run_facts(info(tmp_path), finished(), steps=[], evals=evals)
    assert facts["best evaluation"] == "loss 0.6200, accuracy 0.6000, margin 0.8000 at step 8"


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (
            finished(checkpoint=Path("runs/a/step_12")),
            'trained model:\n  mcore-swift generate runs/a/step_12 --prompt "…"',
        ),
        (
            finished(6, outcome="stopped", checkpoint=Path("runs/a/step_6")),
            "continue from runs/a/step_6:\n  mcore-swift train demo.yaml",
        ),
        (finished(6, outcome="failed"), "no checkpoint was saved; to start again:\n  mcore-swift train demo.yaml"),
    ],
)
def test_what_to_do_next(tmp_path: Path, capsys: pytest.CaptureFixture[str], end: RunEnd, expected: str):
    drive([MetricsFile(), Summary()], info(tmp_path), range(1, 3), end=end)
    assert expected in capsys.readouterr().out
    assert expected.split("\n")[1].strip() in (tmp_path / "summary.md").read_text()


def test_summary_without_a_step(tmp_path: Path):
    drive([MetricsFile(), Summary()], info(tmp_path), range(0), end=finished(0, outcome="failed"))
    assert "failed after 0 of 12 steps" in (tmp_path / "summary.md").read_text()
    assert not (tmp_path / "loss.png").exists()


def test_throughput_is_the_last_starts_without_its_first_steps(tmp_path: Path):
    drive([MetricsFile()], info(tmp_path), range(1, 9))
    summary = [MetricsFile(), Summary()]
    for callback in summary:
        callback.on_start(info(tmp_path, steps_done=8))
    for step, seconds in enumerate((20.0, 20.0, 4.0, 4.0), start=9):
        summary[0].on_step(record(step, seconds=seconds))
    for callback in summary:
        callback.on_end(finished())
    assert "| throughput (median) | 512 tokens/s/GPU, 250 TFLOP/s/GPU" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize("num_steps", [1, 12, 200])
def test_the_figure_shows_loss_evaluations_and_rate(tmp_path: Path, num_steps: int):
    from matplotlib.image import imread

    drive([MetricsFile(), Summary()], info(tmp_path), range(1, num_steps + 1), end=finished())
    pixels = imread(tmp_path / "loss.png")[..., :3]
    assert pixels.shape == (540, 960, 3)
    blue = (pixels - [0x1F / 255, 0x77 / 255, 0xB4 / 255]).__abs__().max(axis=-1) < 0.02
    orange = (pixels - [1.0, 0x7F / 255, 0x0E / 255]).__abs__().max(axis=-1) < 0.02
    assert blue.sum() > (10 if num_steps == 1 else 500)
    assert (orange.sum() > 50) == (num_steps >= 4)


def test_smoothing_keeps_a_constant_and_starts_at_the_first_value():
    assert _smoothed([3.0] * 60) == pytest.approx([3.0] * 60, rel=1e-14)
    assert _smoothed([5.0, *[1.0] * 99])[0] == pytest.approx(5.0, rel=1e-14)


def test_tensorboard_has_the_numbers(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    drive([TensorBoard()], info(tmp_path), range(1, 9), end=finished(8))
    drive([TensorBoard()], info(tmp_path, steps_done=4), range(5, 7), end=finished(6))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        *(f"train/{name}" for name in ("loss", "lr", "grad_norm", "tokens", "loss_tokens", "skipped")),
        *(f"speed/{name}" for name in ("tokens_per_second_per_gpu", "tflops_per_gpu", "mfu", "memory_gib", "seconds")),
        "eval/loss",
    }
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert losses[3] == pytest.approx(2.0 + 1.0 / 9, rel=1e-6)
    assert [(event.step, event.value) for event in events.Scalars("speed/mfu")][-1] == (6, 0.5)


def test_the_recipe_chooses_the_outputs(tmp_path: Path):
    def names(callbacks: list[Callback]) -> list[str]:
        return [type(callback).__name__ for callback in callbacks]

    all_on = build_callbacks(recipe(tmp_path), run_dir=tmp_path)
    assert names(all_on) == ["ProgressLine", "MetricsFile", "TensorBoard", "Summary"]
    without = build_callbacks(recipe(tmp_path, tensorboard=False), run_dir=tmp_path)
    assert names(without) == ["ProgressLine", "MetricsFile", "Summary"]
    assert names(build_callbacks(recipe(None), run_dir=None)) == ["ProgressLine"]


def test_wandb_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"logging.wandb_project is 'p', but the package wandb is not installed: run `pip"
    ):
        build_callbacks(recipe(tmp_path, wandb_project="p"), run_dir=tmp_path)
    with pytest.raises(InputError, match=r"wandb_project is 'p', but checkpoint.dir is not set"):
        build_callbacks(recipe(None, wandb_project="p"), run_dir=None)


def test_extra_metrics_may_not_shadow():
    with pytest.raises(AssertionError, match="loss"):
        step_row(record(1, extra={"loss": 1.0}), peak_flops=None)
