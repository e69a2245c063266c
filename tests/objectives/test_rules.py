"""What the objective section of a recipe must not say, and that every option of every objective does something."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch

from mcore_swift.data.batch import MicroBatch, Sequences
from mcore_swift.data.wanted import Wanted
from mcore_swift.errors import InputError
from mcore_swift.objectives.divergence import Comparison, Head, Shard
from mcore_swift.objectives.objective import Answers, Distances, Scores, sizes
from mcore_swift.objectives.registry import OBJECTIVES, build_objective
from mcore_swift.recipe import (
    AdapterSection,
    DataSection,
    LossName,
    ModelSection,
    NamedAdapter,
    ObjectiveSection,
    Recipe,
    ScheduleSection,
    SourceSection,
)
from mcore_swift.recipe_checks import check_recipe
from mcore_swift.recipe_checks.objective import COMPARES, LOSSES, OBJECTIVE, READS
from mcore_swift.recipe_checks.table import explained, refuse
from mcore_swift.training.trainer import unweighable
from tests.distributed.harness import in_fork

LORA = AdapterSection(name="lora")


def recipe(objective: ObjectiveSection, adapter: AdapterSection | None = None, **model: Any) -> Recipe:
    return Recipe(
        model=ModelSection(path="m", **model),
        data=DataSection(train=[SourceSection(path="a.jsonl")]),
        objective=objective,
        adapter=adapter or AdapterSection(),
        schedule=ScheduleSection(steps=1),
    )


ALLOWED: list[tuple[dict[str, Any], AdapterSection | None]] = [
    ({"name": "dpo"}, None),
    ({"name": "dpo", "reference": "adapter_off"}, LORA),
    ({"name": "dpo", "reference": "precomputed"}, None),
    ({"name": "kto", "loss": "apo_zero_unpaired"}, LORA),
    ({"name": "cpo", "loss": "hinge"}, None),
    ({"name": "sft", "dft": True}, None),
    ({"name": "sft", "label_smoothing": 0.1}, None),
    ({"name": "rm", "centering": 0.01}, LORA),
]
REFUSED: list[tuple[dict[str, Any], AdapterSection | None, str]] = [
    ({"name": "sft", "beta": 0.1}, None, "sft reads dft, label_smoothing only"),
    ({"name": "sft", "dft": True, "label_smoothing": 0.1}, None, "probabilities that nobody smoothed"),
    ({"name": "simpo", "loss": "hinge"}, None, "simpo reads beta, gamma"),
    ({"name": "orpo", "reference": "model"}, None, "orpo reads beta only"),
    ({"name": "rm", "beta": 0.1}, None, "rm reads centering only"),
    ({"name": "rm", "centering": -0.1}, None, "at least 0"),
    ({"name": "rm"}, AdapterSection(name="reft"), "which reft's folder has no place for"),
    ({"name": "kto", "loss": "sigmoid"}, None, "kto has no such loss; allowed: kto, apo_zero_unpaired"),
    ({"name": "cpo", "loss": "robust"}, None, "cpo has no such loss"),
    ({"name": "dpo", "losses": {"simoid": 1.0}}, None, "dpo has no such loss"),
    ({"name": "dpo", "losses": {"sigmoid": 0.0}}, None, "objective.losses: found"),
    ({"name": "dpo", "loss": "ipo", "losses": {"sigmoid": 1.0}}, None, "exclude each other"),
    ({"name": "dpo", "beta": 0.0}, None, "objective.beta: found 0.0; it must be greater than 0"),
    ({"name": "dpo", "beta": -1.0}, None, "objective.beta: found -1.0"),
    ({"name": "dpo", "loss": "robust", "label_smoothing": 0.5}, None, "less than 0.5"),
    ({"name": "dpo", "loss": "hinge", "label_smoothing": 0.1}, None, "the loss doesn't read it"),
    ({"name": "cpo", "loss": "ipo", "label_smoothing": 0.1}, None, "the loss doesn't read it"),
    ({"name": "dpo", "loss": "exo_pair"}, None, "exo_pair divides by it"),
    ({"name": "dpo", "loss": "apo_zero", "f_divergence": "js"}, None, "js has no meaning for this loss"),
    ({"name": "dpo", "losses": {"aot": 1.0, "aot_unpaired": 1.0}}, None, "they sort pairs in two ways"),
    ({"name": "dpo", "loss": "aot", "f_divergence": "js"}, None, "js has no meaning for this loss"),
    ({"name": "dpo", "f_alpha": 0.7}, None, "only objective.f_divergence: alpha reads it"),
    ({"name": "dpo", "discopop_tau": 0.7}, None, "only objective.loss: discopop reads it"),
    ({"name": "dpo", "ld_alpha": 1.5}, None, "between 0 and 1"),
    ({"name": "dpo", "reference": "none"}, None, "dpo compares the policy with a reference"),
    ({"name": "dpo", "reference": "adapter_off"}, None, "no LoRA to switch off"),
    (
        {"name": "dpo", "reference": "adapter_off"},
        AdapterSection(name="reft"),
        "adapter.name is reft, and there is no LoRA",
    ),
    ({"name": "dpo"}, AdapterSection(name="lora", path="sft/adapter"), "is trained already"),
    ({"name": "dpo", "reference_path": "base"}, LORA, "only objective.reference: model and precomputed read it"),
    ({"name": "dpo", "reference": "precomputed", "ld_alpha": 0.5}, None, "every label weighs 1"),
]


@pytest.mark.parametrize(("keys", "adapter"), ALLOWED)
def test_allowed(keys: dict[str, Any], adapter: AdapterSection | None) -> None:
    check_recipe(recipe(ObjectiveSection(**keys), adapter))


@pytest.mark.parametrize(("keys", "adapter", "message"), REFUSED)
def test_refused(keys: dict[str, Any], adapter: AdapterSection | None, message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_recipe(recipe(ObjectiveSection(**keys), adapter))
    assert message in str(caught.value)


def test_multi_token_prediction_belongs_to_sft() -> None:
    with pytest.raises(InputError, match="belongs to sft"):
        check_recipe(recipe(ObjectiveSection(name="orpo"), mtp_loss_scale=0.1))


def test_nothing_is_precomputed_for_a_stream() -> None:
    plain = recipe(ObjectiveSection(name="dpo", reference="precomputed"))
    with pytest.raises(InputError, match="streamed rows are not known beforehand"):
        check_recipe(replace(plain, data=replace(plain.data, streaming=True)))


@pytest.mark.parametrize(
    ("section", "more", "reason"),
    [
        ({"name": "sft"}, {}, ""),
        ({"name": "sft"}, {"mtp_loss_scale": 0.1}, "multi-token prediction"),
        ({"name": "distill", "teacher": "folder"}, {}, "distillation weighs all rows alike"),
        ({"name": "dpo"}, {}, ""),
        ({"name": "dpo", "losses": {"sigmoid": 1.0, "aot": 1.0}}, {}, "pairs are sorted"),
    ],
)
def test_weights_that_a_loss_has_no_place_for(section: dict[str, Any], more: dict[str, Any], reason: str) -> None:
    options = ObjectiveSection(**section)
    wanted = Wanted(unweighable=unweighable(recipe(options, **more), build_objective(options)))
    wanted.check_weights(None, "rows.jsonl")
    wanted.check_weights(np.array([1.0, math.nan]), "rows.jsonl")
    if not reason:
        return wanted.check_weights(np.array([1.0, 2.0]), "rows.jsonl")
    with pytest.raises(InputError, match=f"rows.jsonl: rows have a weight, but .*{reason}"):
        wanted.check_weights(np.array([1.0, 2.0]), "rows.jsonl")


def test_several_adapters_belong_to_sft() -> None:
    several = AdapterSection(name="lora", several={"math": NamedAdapter(), "code": NamedAdapter()})
    with pytest.raises(InputError, match="don't say which adapter"):
        refuse(OBJECTIVE, recipe(ObjectiveSection(name="kto"), several))


def test_rows_explain_themselves() -> None:
    for row in explained(OBJECTIVE):
        assert row["reason"] and row["instead"] and "{" not in row["reason"] + row["instead"]


def test_every_objective_and_loss_is_in_the_tables() -> None:
    assert OBJECTIVES.keys() == READS.keys() == set(get_args(get_type_hints(ObjectiveSection)["name"]))
    assert {name for names in LOSSES.values() for name in names} == set(get_args(LossName))
    read = {key for keys in READS.values() for key in keys} | {"name"}
    assert read == {field.name for field in fields(ObjectiveSection)}


def batch_of(name: str) -> MicroBatch:
    """Four answers of 3, 5, 4 and 2 labels in one row."""
    index = torch.tensor([[-1] + [0] * 3 + [-1] + [1] * 5 + [2] * 4 + [3] * 2 + [-1]])
    mask = (index >= 0).float()
    judged = torch.tensor([True, False, False, True]) if name == "kto" else None
    probe = torch.tensor([False, False, False, True]) if name == "kto" else None
    sequences = Sequences(
        index=index,
        row=torch.arange(4),
        desirable=judged,
        probe=probe,
        ref_logps=torch.tensor([-2.5, -4.5, -2.0, -3.0]),
        partners=torch.tensor([0.2, -0.4, 0.5, 0.3]),
    )
    zeros = torch.zeros_like(index)
    return MicroBatch(zeros, zeros, mask, zeros, sequences=sequences)


def loss_of(section: ObjectiveSection, weight: torch.Tensor | None = None) -> float:
    """The loss of a batch with made-up log-probabilities, by the objective alone."""
    objective = build_objective(section)
    batch = batch_of(section.name)
    assert batch.sequences is not None
    batch = replace(batch, sequences=replace(batch.sequences, weight=weight))
    totals = {name: torch.tensor(size) for name, size in sizes(batch).items()} | {"kl": torch.tensor(0.3)}
    if objective.weigh is not None:
        batch = objective.weigh(batch, objective.options)
    logps = -torch.linspace(0.3, 1.3, batch.tokens.numel()).view_as(batch.loss_mask)
    assert batch.sequences is not None
    parts = [batch.sequences.index == answer for answer in range(4)]
    answers = Answers(
        logps=torch.stack([(logps * batch.loss_mask)[part].sum() for part in parts]),
        plain=torch.stack([logps[part].sum() for part in parts]),
        lengths=torch.stack([part.sum() for part in parts]).float(),
        of=batch.sequences,
    )
    distances = distances_of(objective.options) if section.name == "distill" else None
    found = objective(Scores(logps, batch, answers, totals, distances))
    return float(found.total / found.count)


def distances_of(options: ObjectiveSection) -> Distances:
    """Of made-up logits at each of the batch's 17 positions, of 12 tokens."""
    s, t = torch.linspace(0, 40, 17 * 12).sin().view(17, 12), torch.linspace(0, 70, 17 * 12).cos().view(17, 12)
    labels = torch.zeros(17, dtype=torch.int64)
    values = Comparison(labels, 3 * t, Head(torch.eye(12)), Shard(), options, at_once=17).values(2 * s, slice(None))
    return Distances(*values[1:, None])


# What each key is set to, beside its default; `with` is what it needs to be read.
OTHER: dict[str, list[dict[str, Any]]] = {
    "losses": [{"losses": {"sigmoid": 0.5, "ipo": 0.1}}],
    "beta": [{"beta": 0.7}],
    "gamma": [{"gamma": 0.2}],
    "label_smoothing": [{"label_smoothing": 0.2}],
    "sft_weight": [{"sft_weight": 0.35}],
    "f_divergence": [{"f_divergence": name} for name in ("forward_kl", "js", "alpha")],
    "f_alpha": [{"f_divergence": "alpha", "f_alpha": 0.8}],
    "ld_alpha": [{"ld_alpha": 0.5}, {"ld_alpha": 0.0}],
    "discopop_tau": [{"loss": "discopop", "discopop_tau": 0.5}],
    "alphapo": [{"alphapo": 0.3}],
    "desirable_weight": [{"desirable_weight": 1.5}],
    "undesirable_weight": [{"undesirable_weight": 1.5}],
    "dft": [{"dft": True}],
    "centering": [{"centering": 0.3}],
    "temperature": [{"temperature": 2.0}],
    "top_k": [{"top_k": 3}],
    "distill_weight": [{"distill_weight": 0.6}],
}
NEEDED: dict[str, dict[str, Any]] = {"distill": {"teacher": "folder"}}


IN_THE_MODEL = {("sft", "label_smoothing")}  # where the logits are: test_sft.py


@pytest.mark.parametrize("name", READS)
def test_every_option_changes_the_loss(name: str) -> None:
    cases: list[dict[str, Any]] = [{}]
    for key in READS[name]:
        if key == "loss":
            smooth = {"exo_pair": {"label_smoothing": 0.1}, "robust": {"label_smoothing": 0.15}}
            cases += [{"loss": loss, **smooth.get(loss, {})} for loss in LOSSES[name][1:]]
        elif key == "beta" and name == "distill":
            cases += [{"loss": "js", "beta": 0.7}]
        elif key not in (*COMPARES, "teacher") and (name, key) not in IN_THE_MODEL:
            cases += OTHER[key]
    sections = [ObjectiveSection(name=name, **NEEDED.get(name, {}), **case) for case in cases]  # type: ignore[arg-type]
    for section in sections:
        check_recipe(recipe(section))
    losses = [loss_of(section) for section in sections]
    assert len({round(loss, 6) for loss in losses}) == len(losses), list(zip(cases, losses, strict=True))


# --- what TRL 1.16.0 lacks: the paper's equation in float64 -----------------------------------------------------------


def test_cdpo() -> None:
    """Mitchell 2023: the sigmoid loss with a share of pairs the wrong way round; TRL's sigmoid ignores the share."""
    section = ObjectiveSection(name="dpo", beta=0.4, label_smoothing=0.2)
    index = batch_of("dpo").sequences
    assert index is not None and index.ref_logps is not None
    positions = -torch.linspace(0.3, 1.3, index.index.numel()).double()[None]
    ratios = torch.stack([positions[index.index == answer].sum() for answer in range(4)]) - index.ref_logps
    z = 0.4 * (ratios[0::2] - ratios[1::2])
    expected = (0.8 * (1 + (-z).exp()).log() + 0.2 * (1 + z.exp()).log()).mean()
    assert loss_of(section) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.slow
@in_fork
def test_dft() -> None:
    """Wu et al. 2025, equation 9: −Σ sg(p) log p, whose gradient at a label is −p."""
    batch = replace(batch_of("sft"), sequences=None)
    logps = (-torch.linspace(0.3, 1.3, batch.tokens.numel()).view_as(batch.loss_mask)).double().requires_grad_()
    found = build_objective(ObjectiveSection(dft=True))(Scores(logps, batch))
    found.total.backward()
    p = logps.detach().exp()
    assert float(found.total) == pytest.approx(-float((p * logps.detach() * batch.loss_mask).sum()), rel=1e-12)
    assert logps.grad is not None and torch.allclose(logps.grad, -p * batch.loss_mask, rtol=1e-12)
    assert int(found.count) == 14


@pytest.mark.parametrize("name", ["dpo", "simpo", "kto"])
def test_weights_of_answers(name: str) -> None:
    """A weight multiplies an answer's (a pair's) loss; the loss is divided by the number of answers all the same."""
    section = ObjectiveSection(name=name)  # type: ignore[arg-type]
    first, rest = (loss_of(section, torch.tensor(w)) for w in ([1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]))
    assert loss_of(section) == pytest.approx(first + rest, rel=1e-6)
    assert loss_of(section, torch.tensor([3.0, 3.0, 0.5, 0.5])) == pytest.approx(3 * first + 0.5 * rest, rel=1e-6)


def test_sizes_are_what_a_loss_divides_by() -> None:
    assert sizes(batch_of("dpo")) == {"labels": 14.0, "pairs": 2.0, "chosen_labels": 7.0}
    found = sizes(batch_of("kto"))
    assert found == {"labels": 14.0, "answers": 3.0, "desirable": 1.0, "undesirable": 2.0, "probes": 1.0}
