"""Rewards and curves of runs over answers: computed once more by transformers and PEFT, and drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from perf import curves, rewards
from perf.rewards import Figure, implicit_reward, of_labelled, of_pairs, score
from tests.data_pipeline.conftest import tokenizer_folder  # noqa: F401  (fixtures)
from tests.test_bad_runs import good_model, place, train  # noqa: F401


def pair(n: int) -> dict[str, Any]:
    return {"prompt": f"What is {n} and {n}?", "chosen": f"It is {2 * n}.", "rejected": f"Let me see: {2 * n + 3}."}


def labelled(n: int) -> dict[str, Any]:
    good = n % 3 == 0
    return {"prompt": f"What is {n} and {n}?", "completion": f"It is {2 * n if good else n}.", "label": good}


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["dpo", "kto", "rm"])
def test_a_runs_own_rewards_are_those_of_peft(place: Path, name: str) -> None:  # noqa: F811
    rows = [(labelled if name == "kto" else pair)(n) for n in range(12)]
    file, run = place / "rows.jsonl", place / "run"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = ("--objective.name", name, "--data.train", str(file), "--data.validation", str(file))
    lora = ("--adapter.name", "lora", "--schedule.learning_rate", "1e-2", "--schedule.steps", "3")
    code, errors = train(place, *keys, *lora, "--data.sequence_length", "160")
    assert code == 0, errors
    evaluated = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    reward = score(run / "hf") if name == "rm" else implicit_reward(place / "model", run / "adapter", beta=0.1)
    found: dict[str, Figure] = (of_labelled if name == "kto" else of_pairs)(rows, reward)
    assert abs(evaluated["eval_margin"]) > 1e-3
    assert found["margin"][0] == pytest.approx(evaluated["eval_margin"], rel=1e-4)
    if name != "kto":
        assert found["accuracy"][0] == pytest.approx(evaluated["eval_accuracy"], rel=1e-6)
    else:
        assert found["reward of true answers"][0] == pytest.approx(evaluated["eval_reward_chosen"], rel=1e-4)


def test_statistics_of_known_rewards() -> None:
    rows = [{"prompt": "", "chosen": "a\nb", "rejected": "c"}, {"prompt": "", "chosen": "d", "rejected": "eee"}]
    found = of_pairs(rows, lambda _, answer: {"a\nb": 3.0, "c": 1.0, "d": 0.0, "eee": 1.0}[answer])
    assert found["accuracy"] == pytest.approx((0.5, 0.125**0.5))
    assert found["margin"] == pytest.approx((0.5, 1.5))  # 2 and −1
    assert (
        found["accuracy of the longer answer"][0] == 0.5 and found["accuracy of the answer with more lines"][0] == 0.75
    )


def test_margins_within_questions() -> None:
    """What a question adds to the rewards of its answers is in the rewards' errors, not in that of the margin."""
    values = {"a": (11.0, 10.0), "b": (-9.0, -12.0), "c": (0.5, 1.0)}
    rows = [
        {"prompt": question, "completion": str(number), "label": number == 0}
        for question in values
        for number in (0, 1)
    ]
    found = of_labelled(rows[:5], lambda question, answer: values[question][int(answer)])
    assert found["questions with both"] == (2, None)
    assert found["margin within a question"] == pytest.approx((2.0, 1.0))  # 1 and 3
    assert found["true above false within a question"] == (1.0, None)
    assert "questions with both" not in of_labelled(rows[:3] + rows[5:], lambda question, _: 1.0)


@pytest.mark.slow
def test_curves_show_training_and_held_out_data(tmp_path: Path) -> None:
    from matplotlib.image import imread

    rows = [{"step": step, "loss": 1 / step, "accuracy": None if step == 1 else 0.6} for step in range(1, 9)]
    rows += [{"step": step, "eval_loss": 0.5, "eval_accuracy": 0.7} for step in (4, 8)]
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "curves.png"
    assert curves.main([str(tmp_path / "first"), str(tmp_path / "second"), "--out", str(out)]) == 0
    pixels = imread(out)[..., :3]
    assert pixels.shape == (300, 720, 3)  # two panels: loss, accuracy
    orange = (pixels - [1.0, 0x7F / 255, 0x0E / 255]).__abs__().max(axis=-1) < 0.02  # the second run, over the first
    assert orange[:, :360].sum() > 50 and orange[:, 360:].sum() > 50


def test_what_cannot_be_drawn_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert curves.main([str(tmp_path), "--out", "x.png"]) == 2
    assert "has no metrics.jsonl" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert curves.main([str(tmp_path), "--out", "x.png", "--metrics", "margin"]) == 2
    assert f"no margin in {tmp_path.name}; there is loss" in capsys.readouterr().err


def test_rows_of_another_form_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b"}\n')
    assert rewards.main([str(file), "--reward-model", "x"]) == 2
    assert (
        "rows.jsonl: every row needs chosen, prompt, rejected or completion, label, prompt" in capsys.readouterr().err
    )
