"""A run that is asked to stop saves, says that it can be started again, and goes on where it stopped."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.data_pipeline.conftest import tokenizer_folder  # noqa: F401  (fixtures)
from tests.distributed.harness import run_ranks
from tests.test_bad_runs import command, good_model, place  # noqa: F401


def stop_after_first_step(argv: list[str], metrics: Path, number: int) -> tuple[int, str, str]:
    """Runs the command and sends itself the signal once a step is on record."""

    def send() -> None:
        while not metrics.exists() or not metrics.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    return command(argv, {})


@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.nightly), signal.SIGUSR1])
def test_stop_and_go_on(place: Path, number: signal.Signals) -> None:  # noqa: F811
    argv = ["train", str(place / "recipe.yaml"), "--schedule.steps", "60", "--checkpoint.interval", "0"]
    metrics = place / "run" / "metrics.jsonl"
    code, _, errors = run_ranks(stop_after_first_step, 1, argv, metrics, int(number))[0]
    assert code == 75, errors
    assert number.name in errors and "checkpoint saved after step" in errors
    stopped = len(metrics.read_text().splitlines())
    assert 1 <= stopped < 60
    names = [path.name for path in (place / "run" / "checkpoints").glob("step-*")]
    assert names == [f"step-{stopped:08d}"]
    assert not (place / "run" / "hf").exists()

    code, output, errors = run_ranks(command, 1, argv, {})[0]
    assert code == 0, errors
    assert f"resumed after step {stopped}" in output
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert (place / "run" / "hf" / "model.safetensors").is_file()


def stop_in_evaluation(argv: list[str]) -> tuple[int, str, str]:
    """Runs the command; TERM comes when the first batch is evaluated."""
    from mcore_swift.training import trainer

    own = trainer.eval_step
    trainer.eval_step = lambda *words: (os.kill(os.getpid(), signal.SIGTERM), own(*words))[1]
    return command(argv, {})


@pytest.mark.slow
@pytest.mark.parametrize("interval", ["2", "0"])
def test_stop_in_the_last_evaluation(place: Path, interval: str) -> None:  # noqa: F811
    """It is left, the step is saved, and whoever goes on evaluates and exports."""
    validation = ["--data.validation", str(place / "chats.jsonl"), "--schedule.eval_interval", interval]
    argv = ["train", str(place / "recipe.yaml"), "--checkpoint.interval", "0", *validation]
    code, _, errors = run_ranks(stop_in_evaluation, 1, argv)[0]
    assert code == 75 and "SIGTERM was received; checkpoint saved after step 2" in errors, errors
    metrics = place / "run" / "metrics.jsonl"
    assert "eval_loss" not in metrics.read_text() and not (place / "run" / "hf").exists()
    code, _, errors = run_ranks(command, 1, argv, {})[0]
    assert code == 0, errors
    assert metrics.read_text().count("eval_loss") == 1
    assert (place / "run" / "hf" / "model.safetensors").is_file()


@pytest.mark.slow
def test_steps_can_be_profiled(place: Path) -> None:  # noqa: F811
    argv = ["train", str(place / "recipe.yaml"), "--runtime.profile_steps", "[2]", "--parallel.pp", "2"]
    code, _, errors = run_ranks(command, 1, argv, {})[0]
    assert code == 0, errors
    traces = sorted((place / "run" / "profile").iterdir())
    assert [path.name for path in traces] == [f"step-00000002.rank-0000{rank}.json" for rank in (0, 1)]
    assert all("aten::mm" in path.read_text() for path in traces)


def stopped_while_importing(argv: list[str]) -> tuple[int, str, str]:
    """TERM reaches the process that imports for its ranks, before there is one."""
    from mcore_swift.training import run

    run.preload = lambda platform: os.kill(os.getpid(), signal.SIGTERM)
    return command(argv, {})


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_stopped_while_importing(place: Path, ranks: str) -> None:  # noqa: F811
    argv = ["train", str(place / "recipe.yaml"), "--parallel.dp", ranks]
    code, _, errors = run_ranks(stopped_while_importing, 1, argv)[0]
    assert code == 75 and "stopped: SIGTERM was received before step 1" in errors, errors
    assert not any((place / "run" / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_steps_can_be_left_out(place: Path) -> None:  # noqa: F811
    argv = ["train", str(place / "recipe.yaml"), "--schedule.steps", "4", "--schedule.skip_steps", "[2]"]
    assert run_ranks(command, 1, argv, {})[0][0] == 0
    rows = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 3, 4]
    whole = ["train", str(place / "recipe.yaml"), "--schedule.steps", "4", "--checkpoint.dir", str(place / "whole")]
    assert run_ranks(command, 1, whole, {})[0][0] == 0
    others = [json.loads(line) for line in (place / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == others[0]["loss"] and rows[1]["loss"] != others[2]["loss"]
    assert [row["lr"] for row in rows] == [row["lr"] for row in others if row["step"] != 2]
