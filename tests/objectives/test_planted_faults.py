"""The tests of objectives see the faults that other stacks were bitten by: each is planted here, and must be found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mcore_swift.recipe import ObjectiveSection, ParallelSection
from tests.distributed.harness import prepared
from tests.objectives.here import Found, compute
from tests.objectives.test_against_trl import with_adapter
from tests.objectives.test_layouts import assert_same

Patch = pytest.MonkeyPatch
CASES = {
    "dpo": ObjectiveSection(name="dpo", reference="adapter_off"),
    "kto": ObjectiveSection(name="kto", reference="adapter_off"),
    "aot": ObjectiveSection(name="dpo", loss="aot_unpaired", reference="adapter_off"),
}


def mean_of_means(patch: Patch) -> None:
    """Each micro-batch's loss is divided by its own count of pairs."""
    from mcore_swift.training import step

    right = step.score_loss

    def wrong(objective: Any, totals: Any, logps: torch.Tensor, batch: Any) -> Any:
        total, count, sums = right(objective, totals, logps, batch)
        own = count.clamp(min=1)
        return total / own, count.clamp(max=1), sums | {"loss": sums["loss"] / own, "count": sums["count"].clamp(max=1)}

    patch.setattr(step, "score_loss", wrong)


def prompts_counted(patch: Patch) -> None:
    """The label before an answer's first counts, too: it is 0, and a position of the prompt."""
    from mcore_swift.training import context

    right = context.share

    def early(batch: Any) -> Any:
        index = batch.sequences.index
        early = torch.where(index < 0, index.roll(-1, dims=1), index)
        mask = torch.where(early >= 0, torch.ones_like(batch.loss_mask), batch.loss_mask)
        return replace(batch, loss_mask=mask, sequences=replace(batch.sequences, index=early))

    patch.setattr(context, "share", lambda batches, **more: [early(batch) for batch in right(batches, **more)])


def an_answers_label_left_out(patch: Patch) -> None:
    """The last position that counts doesn't pass the output layer, but the first one of all."""
    from mcore_swift.training import step

    right = step.output_rows

    def wrong(batch: Any) -> torch.Tensor | None:
        rows = right(batch)
        counted = batch.loss_mask.t().flatten().nonzero()[:, 0]
        if rows is None or len(counted) == 0:
            return rows
        return torch.where(rows == counted[-1], 0, rows)

    patch.setattr(step, "output_rows", wrong)


def reference_with_its_adapter(patch: Patch) -> None:
    from mcore_swift.peft import adapters

    @contextlib.contextmanager
    def on(models: Any) -> Iterator[None]:
        with torch.no_grad():
            yield

    patch.setattr(adapters, "disabled", on)


def other_context_ranks_missing(patch: Patch) -> None:
    """An answer's sum has the labels of this rank's part only."""
    from mcore_swift import parallel
    from mcore_swift.training import step

    right, place = step.answers_of, parallel.ranks

    def wrong(logps: torch.Tensor, batch: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(parallel, "ranks", lambda: replace(place(), cp_size=1))
            return right(logps, batch)

    patch.setattr(step, "answers_of", wrong)


def pairs_counted_by_every_context_rank(patch: Patch) -> None:
    from mcore_swift import parallel
    from mcore_swift.training import step

    right, place = step.score_loss, parallel.ranks

    def wrong(*args: Any) -> Any:
        cp = place().cp_size
        total, count, sums = right(*args)
        return total * cp, count, sums  # as where a summed loss is added up again

    patch.setattr(step, "score_loss", wrong)


def divergence_of_own_rank(patch: Patch) -> None:
    """KTO's divergence is estimated on each data parallel rank's own probes."""
    from mcore_swift.training import step

    right = step.divergence

    def wrong(models: Any, batches: Any, totals: Any) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(step.dist, "all_reduce", lambda *args, **kwargs: None)
            return right(models, batches, totals)

    patch.setattr(step, "divergence", wrong)


def sorted_by_own_rank(patch: Patch) -> None:
    """AOT sorts each data parallel rank's own pairs."""
    from mcore_swift.training import matching

    right = matching.dist

    def own(every: list[Any], mine: Any, group: Any) -> None:
        place = matching.parallel.ranks()
        every[:] = [([], [])] * len(every)
        every[place.dp * place.cp_size] = mine

    patch.setattr(matching, "dist", SimpleNamespace(get_world_size=right.get_world_size, all_gather_object=own))


ONE, CP2, DP2 = ParallelSection(), ParallelSection(cp=2), ParallelSection(dp=2)
FAULTS: dict[str, tuple[Callable[[Patch], None], ParallelSection, str]] = {
    "mean of means": (mean_of_means, ONE, "dpo"),
    "prompt tokens counted": (prompts_counted, ONE, "dpo"),
    "a label without its log-probability": (an_answers_label_left_out, ONE, "dpo"),
    "reference with its adapter": (reference_with_its_adapter, ONE, "dpo"),
    "the other context parallel ranks' labels missing": (other_context_ranks_missing, CP2, "dpo"),
    "gradients once for each context parallel rank": (pairs_counted_by_every_context_rank, CP2, "dpo"),
    "pairs sorted among a rank's own": (sorted_by_own_rank, DP2, "aot"),
    "divergence of a rank's own probes": (divergence_of_own_rank, DP2, "kto"),
}


@pytest.fixture(scope="module")
def right(models: Any) -> tuple[Path, dict[str, Found]]:
    model = models("qwen3")
    return model, compute(model, ONE, CASES, adapter=with_adapter(model)[0])


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if "missing" in name else pytest.mark.nightly) for name in FAULTS],
)
def test_a_planted_fault_is_found(right: tuple[Path, dict[str, Found]], monkeypatch: Patch, name: str) -> None:
    plant, layout, case = FAULTS[name]
    model, expected = right
    adapter = with_adapter(model)[0]
    prepared()
    plant(monkeypatch)
    found = compute(model, layout, {case: CASES[case]}, adapter=adapter)
    with pytest.raises(AssertionError):
        assert_same(found, {case: expected[case]})


@pytest.mark.nightly
@pytest.mark.parametrize("layout", [CP2, DP2], ids=["CP2", "DP2"])
def test_without_a_fault_nothing_is_found(right: tuple[Path, dict[str, Found]], layout: ParallelSection) -> None:
    model, expected = right
    assert_same(compute(model, layout, CASES, adapter=with_adapter(model)[0]), expected)
