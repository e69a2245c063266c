"""The output layer sees only the positions whose labels count, and nothing that comes of it changes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from mcore_swift import parallel
from mcore_swift.data.batch import MicroBatch, Sequences
from mcore_swift.recipe import ObjectiveSection, ParallelSection, Recipe, RuntimeSection
from mcore_swift.training import output_rows
from tests.distributed.harness import run_ranks
from tests.distributed.rank_model import CPU, assert_close, open_model, recipe_for
from tests.objectives import rows
from tests.objectives.here import compute
from tests.objectives.test_against_trl import near, with_adapter
from tests.objectives.test_layouts import LAYOUTS

FORMS = {"one rank": ParallelSection()} | LAYOUTS
WHOLE = [
    pytest.param("one rank", True),
    pytest.param("one rank", False, marks=pytest.mark.nightly),
    *(pytest.param(layout, True, marks=pytest.mark.nightly) for layout in LAYOUTS),
    *(pytest.param(layout, False, marks=pytest.mark.nightly) for layout in ("TP2+SP", "CP2", "PP2")),
]


def assert_as_with_all_positions(patch: pytest.MonkeyPatch, *args: Any, **keys: Any) -> None:
    """What `compute` finds is what it finds if every position passes the output layer."""
    from mcore_swift.training import step

    found = compute(*args, **keys)
    patch.setattr(step, "output_rows", lambda batch: None)
    for name, expected in compute(*args, **keys).items():
        assert found[name].loss == pytest.approx(expected.loss, rel=1e-6), name
        for of in ("metrics", "evaluated"):
            # A reward is β, 0.1, times a difference of log-probabilities of -50.
            assert getattr(found[name], of) == pytest.approx(getattr(expected, of), rel=1e-6, abs=1e-6), name
        assert_close(found[name].gradients, expected.gradients, tolerance=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "packing"), WHOLE)
def test_full_training(models: Any, monkeypatch: pytest.MonkeyPatch, layout: str, packing: bool) -> None:
    policy = models("qwen3")
    reference = str(near(policy, policy.parent / "qwen3-reference"))
    cases = {
        "kto": ObjectiveSection(name="kto", reference_path=reference),
        "dpo": ObjectiveSection(name="dpo", ld_alpha=0.0, sft_weight=0.5, reference_path=reference),
        "sft": ObjectiveSection(name="sft", label_smoothing=0.1),
    }
    assert_as_with_all_positions(monkeypatch, policy, FORMS[layout], cases, packing=packing)


@pytest.mark.nightly
@pytest.mark.parametrize("layout", FORMS)
def test_the_model_without_its_adapter(models: Any, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    model = models("qwen3")
    cases = {"dpo": ObjectiveSection(name="dpo", reference="adapter_off")}
    assert_as_with_all_positions(monkeypatch, model, FORMS[layout], cases, adapter=with_adapter(model)[0])


@pytest.mark.parametrize(
    "layout",
    ["one rank", *(pytest.param(layout, marks=pytest.mark.nightly) for layout in ("TP2+SP", "TP2xPP2", "CP2"))],
)
def test_rows(models: Any, layout: str) -> None:
    """Of every pack, in the reference's pass and in the policy's, its labels filled up to a multiple of 16 a rank."""
    model = models("qwen3")
    adapter, _ = with_adapter(model)
    section = FORMS[layout]
    recipe = recipe_for(model, section, adapter=adapter)
    recipe = replace(recipe, objective=ObjectiveSection(name="dpo", reference="adapter_off"))
    found = run_ranks(_rows, parallel.resolve(section, world_size=None).world_size, recipe)
    if section.cp == 1:
        labels = [sum(sum(rows.LENGTHS[row][1:]) for row in pack) for pack in rows.PACKS]
        expected = [max(math.ceil(count / (16 * section.tp)), 1) * 16 * section.tp for count in labels]
        assert 0 in labels and max(expected) < 0.9 * rows.PACK_LENGTH
        assert found[-1] == [(False, count) for count in expected] + [(True, count) for count in expected]
    else:  # the labels of each pack are shared out unevenly
        assert all(count % 16 == 0 and count < rows.PACK_LENGTH / 2 for rank in found for _, count in rank)
        assert [len(rank) for rank in found] == [2 * len(rows.PACKS)] * 2


@pytest.mark.parametrize("layout", ["one rank", pytest.param("TP2+SP", marks=pytest.mark.nightly)])
def test_no_more_logits_at_once_than_a_chunk(models: Any, layout: str) -> None:
    """In the reference's pass once, in the policy's forward and again backward, the last chunk first or not."""
    model = models("qwen3")
    section, chunk = FORMS[layout], 16 * FORMS[layout].tp
    recipe = recipe_for(model, section, adapter=with_adapter(model)[0], runtime=RuntimeSection(device="cpu"))
    recipe = replace(recipe, objective=ObjectiveSection(name="dpo", reference="adapter_off"))
    found = []
    for runtime in (recipe.runtime, replace(recipe.runtime, loss_chunk=chunk)):
        ranks = parallel.resolve(section, world_size=None).world_size
        found.append(run_ranks(_rows, ranks, replace(recipe, runtime=runtime))[-1])
    whole, parts = found
    assert max(count for _, count in whole) > chunk and {count for _, count in parts} == {chunk}
    alone = sum(count for graded, count in whole if graded and count == chunk)  # one chunk isn't made again
    asked = [sum(count for graded, count in of if graded) for of in (whole, parts)]
    assert asked[1] == 2 * asked[0] - alone
    assert sum(count for graded, count in parts if not graded) == asked[0]


def _rows(recipe: Recipe) -> list[tuple[bool, int]]:
    """Whether it has a gradient and how many rows it has: of each micro-batch that passes the output layer."""
    from mcore_swift.models.layers import DecoderModel
    from mcore_swift.objectives.registry import build_objective
    from mcore_swift.training import reference, step

    model = open_model(recipe)
    found: list[tuple[bool, int]] = []
    right = DecoderModel.compute_language_model_loss

    def look(self: Any, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        found.append((logits.requires_grad, logits.size(0)))
        return right(self, labels, logits)

    DecoderModel.compute_language_model_loss = look  # type: ignore[method-assign]
    batches = rows.pairs(recipe, model.source.vocab_size, parallel.ranks())
    step.train_step(
        model.models,
        model.optimizer,
        batches,
        build_objective(recipe.objective),
        CPU,
        reference.adapter_off(model.models),
    )
    return found


def batch_of(counted: list[list[int]], *, index: torch.Tensor | None = None) -> MicroBatch:
    mask = torch.tensor(counted, dtype=torch.float32)
    zeros = torch.zeros(mask.shape, dtype=torch.int64)
    sequences = None if index is None else Sequences(index=index, row=torch.zeros(1, dtype=torch.int64))
    return MicroBatch(zeros, zeros, mask, zeros, sequences=sequences)


def test_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbered as hidden states lie, [s, b]; none where nearly all count; filled up with the first that don't."""
    place = parallel.Ranks(tp=0, pp=0, dp=0, dp_size=1, is_last_stage=True)
    monkeypatch.setattr(parallel, "ranks", lambda: place)
    chosen = [[0] * 20 + [1] * 8 + [0] * 12, [1] * 4 + [0] * 32 + [1] * 4]
    expected = sorted([2 * s for s in range(20, 28)] + [2 * s + 1 for s in (0, 1, 2, 3, 36, 37, 38, 39)])
    found = output_rows.output_rows(batch_of(chosen))
    assert found is not None and found.tolist() == expected

    nothing = output_rows.output_rows(batch_of([[0] * 40]))
    assert nothing is not None and nothing.tolist() == list(range(16))
    weightless = torch.full((1, 40), -1)
    weightless[0, 30:] = 0
    found = output_rows.output_rows(batch_of([[0] * 30 + [1] * 5 + [0] * 5], index=weightless))
    assert found is not None and found.tolist() == [*range(6), *range(30, 40)]
    assert output_rows.output_rows(batch_of([[0] * 17 + [1] * 144])) is not None  # 144 of 161
    assert output_rows.output_rows(batch_of([[0] * 16 + [1] * 144])) is None  # 144 of 160

    monkeypatch.setattr(parallel, "ranks", lambda: replace(place, tp_size=2))
    found = output_rows.output_rows(batch_of(chosen))
    assert found is not None and len(found) == 32 and set(expected) <= set(found.tolist())
