"""Every layout gives every objective's loss, metrics and gradients that one rank gives, packed and in rows."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mcore_swift.recipe import ObjectiveSection, ParallelSection
from tests.distributed.rank_model import assert_close
from tests.objectives.here import Found, compute
from tests.objectives.test_against_trl import near

LAYOUTS = {
    "TP2": ParallelSection(tp=2, sequence_parallel=False),
    "TP2+SP": ParallelSection(tp=2),
    "PP2": ParallelSection(pp=2),
    "PP2xVPP2": ParallelSection(pp=2, vpp=2),
    "CP2": ParallelSection(cp=2),
    "DP2": ParallelSection(dp=2),
    "TP2xPP2": ParallelSection(tp=2, pp=2),
    "CP2xDP2": ParallelSection(cp=2, dp=2),
    "CP2xPP2": ParallelSection(cp=2, pp=2),
}
EXPERTS = {"EP2": ParallelSection(ep=2, dp=2), "EP2xTP2": ParallelSection(ep=2, tp=2, dp=2)}
# One case of each path through the step: sums, means over labels, labels' weights, the likelihood's own denominator,
# a divergence over the global batch, no reference.
CASES = {
    "dpo": ObjectiveSection(name="dpo"),
    "dpo-ipo": ObjectiveSection(name="dpo", loss="ipo"),
    "dpo-ld-sft": ObjectiveSection(name="dpo", ld_alpha=0.3, sft_weight=0.5),
    "dpo-aot": ObjectiveSection(name="dpo", loss="aot_unpaired"),
    "kto": ObjectiveSection(name="kto", desirable_weight=1.3),
    "simpo": ObjectiveSection(name="simpo"),
    "cpo": ObjectiveSection(name="cpo"),
    "orpo": ObjectiveSection(name="orpo"),
}


@functools.cache
def at_layout(policy: Path, reference: Path, layout: str, packing: bool) -> dict[str, Found]:
    compared = ("dpo", "kto")
    cases = {
        name: replace(case, reference_path=str(reference)) if case.name in compared else case
        for name, case in CASES.items()
    }
    section = (LAYOUTS | EXPERTS | {"one rank": ParallelSection()})[layout]
    return compute(policy, section, cases, packing=packing)


def assert_same(found: dict[str, Found], expected: dict[str, Found]) -> None:
    for case, one in expected.items():
        assert found[case].loss == pytest.approx(one.loss, rel=1e-6), case
        for of in ("metrics", "evaluated"):
            ours, theirs = getattr(found[case], of), getattr(one, of)
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                # Float32 leaves 1e-5 nats of a difference of log-probabilities of -50; a reward is β, 0.1, times that.
                near = 1e-5 if name == "kl" else 1e-6
                assert ours[name] == pytest.approx(value, rel=1e-5, abs=near), (case, name)
        assert_close(found[case].gradients, one.gradients)


SLOW = {("TP2+SP", True), ("PP2xVPP2", True)}


def marked(layout: str, packing: bool) -> Any:
    marks = pytest.mark.slow if (layout, packing) in SLOW else pytest.mark.nightly
    return pytest.param(layout, packing, marks=marks, id=f"{layout}-{'packed' if packing else 'rows'}")


FORMS = [(layout, packing) for layout in ("one rank", *LAYOUTS) for packing in (True, False)]
# One rank's packs are what the others are compared with; the interleaved schedule takes no rows of differing lengths.
LEFT_OUT = {("one rank", True), ("PP2xVPP2", False)}


@pytest.mark.parametrize(("layout", "packing"), [marked(*form) for form in FORMS if form not in LEFT_OUT])
def test_layout(models: Any, layout: str, packing: bool) -> None:
    policy = models("qwen3")
    reference = near(policy, policy.parent / "qwen3-reference")
    assert_same(at_layout(policy, reference, layout, packing), at_layout(policy, reference, "one rank", True))


@pytest.mark.parametrize("layout", [pytest.param(layout, marks=pytest.mark.nightly) for layout in EXPERTS])
def test_experts(models: Any, layout: str) -> None:
    policy = models("qwen3-moe")
    reference = near(policy, policy.parent / "qwen3-moe-reference")
    assert_same(at_layout(policy, reference, layout, True), at_layout(policy, reference, "one rank", True))
