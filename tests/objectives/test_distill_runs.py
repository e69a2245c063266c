"""Distillation through the real command: what a person sees, going on after a stop, and settings that are refused."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_swift.errors import InputError
from mcore_swift.recipe import ObjectiveSection, OptimizerSection
from mcore_swift.recipe_checks import check_recipe
from mcore_swift.recipe_checks.distill import DISTILL
from mcore_swift.recipe_checks.table import refuse
from tests.data_pipeline.conftest import tokenizer_folder  # noqa: F401  (fixtures)
from tests.objectives.test_rules import recipe
from tests.test_bad_runs import good_model, place, train  # noqa: F401

SHOWN = {"divergence", "kl", "nll", "agreement"}


def a_teacher(place: Path, **changes: Any) -> str:  # noqa: F811
    """A model beside the student's, with the same tokenizer; others than the student's sizes."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 96,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 640,
        "max_position_embeddings": 128,
    }
    sizes |= changes
    folder = place / "teacher"
    torch.manual_seed(1)
    Qwen2ForCausalLM(Qwen2Config(**sizes)).save_pretrained(folder)
    return str(folder)


def keys(teacher: str) -> list[str]:
    return ["--objective.name", "distill", "--objective.teacher", teacher]


def metrics(place: Path, *more: str) -> list[dict[str, Any]]:  # noqa: F811
    code, errors = train(place, *more)
    assert code == 0, errors
    return [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.nightly
def test_a_run_goes_on_after_a_stop(place: Path) -> None:  # noqa: F811
    """The teacher isn't in the checkpoints: it is read again, and every later number is the same."""
    more = [*keys(a_teacher(place)), "--data.validation", str(place / "chats.jsonl"), "--schedule.decay", "constant"]
    more += ["--schedule.learning_rate", "5e-4"]
    whole = metrics(place, *more, "--schedule.steps", "3")
    steps, evaluated = whole[:3], whole[3]
    assert all(step.keys() >= SHOWN for step in steps)
    assert evaluated.keys() == {"step", "eval_loss", *(f"eval_{name}" for name in SHOWN)}
    assert steps[0]["loss"] == pytest.approx(steps[0]["divergence"]) == pytest.approx(steps[0]["kl"])
    assert steps[0]["nll"] == pytest.approx(math.log(640), rel=0.05) and 0 <= steps[0]["agreement"] <= 1
    assert evaluated["eval_kl"] < steps[0]["kl"]
    config = json.loads((place / "run" / "hf" / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (64, 4)
    shutil.rmtree(place / "run")
    metrics(place, *more, "--schedule.steps", "1")
    resumed = metrics(place, *more, "--schedule.steps", "3")
    for name in ("loss", "nll", "kl", "agreement", "grad_norm"):
        assert [row[name] for row in resumed if row.get("step") in (2, 3) and name in row] == [
            step[name] for step in steps[1:]
        ]
    assert resumed[-1]["eval_loss"] == evaluated["eval_loss"]


REFUSED_FOLDERS: dict[str, tuple[dict[str, Any], list[str], tuple[str, ...]]] = {
    "another vocabulary": ({"vocab_size": 641}, [], ("objective.teacher", "641 tokens", "640")),
    "more than the vocabulary": ({}, ["--objective.top_k", "641"], ("objective.top_k", "641", "640 tokens")),
    "heads of the teacher": ({}, ["--parallel.tp", "4"], ("parallel.tp", "allowed: 1, 2")),
    "no folder": ({}, ["--objective.teacher", "no/such"], ("objective.teacher", "no/such")),
    "no model": ({}, ["--objective.teacher", "."], ("objective.teacher", "config.json")),
    "unknown divergence": ({}, ["--objective.loss", "total_variation"], ("objective.loss", "forward_kl")),
}


@pytest.mark.parametrize("name", REFUSED_FOLDERS)
def test_teachers_that_are_refused(place: Path, name: str) -> None:  # noqa: F811
    changes, more, expected = REFUSED_FOLDERS[name]
    code, errors = train(place, *keys(a_teacher(place, **changes)), *more)
    assert code == 2, errors
    assert errors.startswith("mcore-swift: error: ") and "Traceback" not in errors
    for part in expected:
        assert part in errors
    assert not (place / "run").exists()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"teacher": None}, "distill learns from a teacher"),
    ({"teacher": ""}, "objective.teacher: found ''; it must be a path"),
    ({"beta": 0.5}, "only objective.loss: js reads it"),
    ({"loss": "reverse_kl", "beta": 0.5}, "only objective.loss: js reads it"),
    ({"loss": "js", "beta": 1.0}, "the teacher's share of the mixture"),
    ({"loss": "js", "beta": 0.0}, "objective.beta: found 0.0; it must be greater than 0"),
    ({"loss": "hinge"}, "distill has no such loss; allowed: forward_kl, reverse_kl, js"),
    ({"temperature": 0.0}, "objective.temperature: found 0.0; it must be greater than 0"),
    ({"temperature": -1.0}, "objective.temperature: found -1.0; it must be greater than 0"),
    ({"top_k": 1}, "objective.top_k: found 1; it must be at least 2"),
    ({"distill_weight": 0.0}, "objective.distill_weight: found 0.0; it must be greater than 0, at most 1"),
    ({"distill_weight": 1.1}, "objective.distill_weight: found 1.1; it must be greater than 0, at most 1"),
    ({"name": "sft"}, "sft reads"),
    ({"reference": "model"}, "distill reads loss, beta, teacher, temperature, top_k, distill_weight only"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED)
def test_refused(keys: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {"name": "distill", "teacher": "folder"} | keys
    section = ObjectiveSection(**values)
    with pytest.raises(InputError) as caught:
        check_recipe(recipe(section))
    assert message in str(caught.value)


def test_unproved_with_shards_of_parameters() -> None:
    section = ObjectiveSection(name="distill", teacher="folder")
    with pytest.raises(InputError, match="distill computes the output layer's gradients itself"):
        refuse(DISTILL, replace(recipe(section), optimizer=OptimizerSection(fsdp="torch")))
