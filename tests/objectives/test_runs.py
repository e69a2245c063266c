"""Preference runs through the real command: what a person sees, and that the reference's numbers are found again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.data_pipeline.conftest import tokenizer_folder  # noqa: F401  (fixtures)
from tests.test_bad_runs import good_model, place, train  # noqa: F401

OF_PAIRS = {"reward_chosen", "reward_rejected", "margin", "accuracy", "logp_chosen", "logp_rejected"}
LORA = ("--adapter.name", "lora", "--schedule.learning_rate", "1e-2")


def chat(n: int, answer: int) -> dict[str, Any]:
    return {"role": "assistant", "content": f"It is {answer}, since {n} and {n} are {answer}."}


def write(folder: Path, *, judged: bool) -> str:
    rows = []
    for n in range(24):
        prompt = [{"role": "user", "content": f"What is {n} and {n}?"}]
        if judged:
            good = n % 2 == 0
            rows.append({"prompt": prompt, "completion": [chat(n, 2 * n if good else n)], "label": good})
        else:
            rows.append({"prompt": prompt, "chosen": [chat(n, 2 * n)], "rejected": [chat(n, 2 * n + 3)]})
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def run(place: Path, name: str, *more: str) -> list[dict[str, Any]]:  # noqa: F811
    """metrics.jsonl of a run of two steps and an evaluation."""
    file = write(place, judged=name == "kto")
    keys = ("--objective.name", name, "--data.train", file, "--data.validation", file, "--data.sequence_length", "160")
    code, errors = train(place, *keys, "--checkpoint.resume", "never", "--checkpoint.overwrite", "true", *more)
    assert code == 0, errors
    return [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["adapter_off", pytest.param("precomputed", marks=pytest.mark.nightly)])
def test_dpo(place: Path, reference: str) -> None:  # noqa: F811
    first, second, evaluated = run(place, "dpo", *LORA, "--objective.reference", reference)
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)  # adapters start as nothing
    assert (first["margin"], first["accuracy"]) == (0.0, 0.0)
    assert first.keys() >= OF_PAIRS and second["margin"] != 0
    assert evaluated.keys() == {"step", "eval_loss", *(f"eval_{name}" for name in OF_PAIRS)}
    if reference == "precomputed":
        entries = list((place / "cache" / "reference").iterdir())
        assert run(place, "dpo", *LORA, "--objective.reference", reference, "--parallel.pp", "2")[2][
            "eval_loss"
        ] == pytest.approx(evaluated["eval_loss"], rel=1e-5)
        assert list((place / "cache" / "reference").iterdir()) == entries  # another layout, the same numbers


@pytest.mark.slow
def test_kto(place: Path) -> None:  # noqa: F811
    first, _, evaluated = run(place, "kto")
    assert first["loss"] == pytest.approx(0.5, rel=1e-6) and first["kl"] == 0
    assert evaluated["eval_margin"] == pytest.approx(
        evaluated["eval_reward_chosen"] - evaluated["eval_reward_rejected"], rel=1e-4, abs=1e-7
    )


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["simpo", "cpo", "orpo"])
def test_without_reference(place: Path, name: str) -> None:  # noqa: F811
    _, _, evaluated = run(place, name)
    assert math.isfinite(evaluated["eval_loss"]) and "eval_accuracy" in evaluated
