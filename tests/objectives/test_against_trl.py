"""Each objective and each of its options against TRL 1.16.0: loss, metrics and all gradients, float32."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from mcore_swift.recipe import AdapterSection, ObjectiveSection, ParallelSection
from tests.distributed.harness import run_ranks
from tests.distributed.rank_model import assert_close
from tests.objectives import trl_oracle
from tests.objectives.here import Found, compute
from tests.peft.test_lora import ALL, LAYOUTS, peft_folder

ONE = ParallelSection()
# name → (keys of the objective section, those of trl.DPOConfig)
DPO: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({}, {}),
    "beta": ({"beta": 0.3}, {"beta": 0.3}),
    **{
        name: ({"loss": name}, {"loss_type": [name]})
        for name in (
            *("sigmoid_norm", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop"),
        )
    },
    "exo_pair": (
        {"loss": "exo_pair", "label_smoothing": 1e-3},
        {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
    ),
    "robust": ({"loss": "robust", "label_smoothing": 0.1}, {"loss_type": ["robust"], "label_smoothing": 0.1}),
    "aot": ({"loss": "aot", "label_smoothing": 0.1}, {"loss_type": ["aot"], "label_smoothing": 0.1}),
    "aot_unpaired": ({"loss": "aot_unpaired"}, {"loss_type": ["aot_unpaired"]}),
    "forward_kl": ({"f_divergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
    "js": ({"f_divergence": "js"}, {"f_divergence_type": "js_divergence"}),
    "alpha": ({"f_divergence": "alpha"}, {"f_divergence_type": "alpha_divergence"}),
    "alpha 0.7": (
        {"f_divergence": "alpha", "f_alpha": 0.7},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    ),
    "sft_weight": ({"sft_weight": 0.4}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.4]}),
    "ld_alpha": ({"ld_alpha": 0.3}, {"ld_alpha": 0.3}),
    "ld_alpha 0": ({"ld_alpha": 0.0}, {"ld_alpha": 0.0}),
    "discopop_tau": ({"loss": "discopop", "discopop_tau": 0.5}, {"loss_type": ["discopop"], "discopop_tau": 0.5}),
    "mpo": (
        {"losses": {"sigmoid": 0.8, "bco_pair": 0.2}, "sft_weight": 1.0},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    ),
}


@pytest.fixture(scope="module")
def folders(models: Any) -> tuple[Path, Path]:
    """The policy's folder and the reference's, a little different."""
    policy = models("qwen3")
    return policy, near(policy, policy.parent / "qwen3-reference")


def near(policy: Path, folder: Path) -> Path:
    """The policy with every parameter a little changed: log-ratios of a few nats, as during a training run."""
    if not folder.exists():
        run_ranks(_write_near, 1, policy, folder)
    return folder


def _write_near(policy: Path, folder: Path) -> None:
    import torch

    model = trl_oracle.load(policy)
    generator = torch.Generator().manual_seed(12)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.012 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)


def sections(name: str, cases: dict[str, tuple[dict[str, Any], dict[str, Any]]], **keys: Any) -> Any:
    return {case: ObjectiveSection(name=name, **keys, **own) for case, (own, _) in cases.items()}  # type: ignore[arg-type]


@functools.cache
def trl(kind: str, policy: Path, reference: Path) -> dict[str, trl_oracle.Result]:
    cases = {case: theirs for case, (_, theirs) in CASES[kind].items()}
    oracle = trl_oracle.cpo if kind == "simpo" else getattr(trl_oracle, kind)
    return run_ranks(oracle, 1, policy, reference, cases, timeout=300)[0]


KTO: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "kto": ({}, {}),
    "beta": ({"beta": 0.4}, {"beta": 0.4}),
    "weights": (
        {"desirable_weight": 1.3, "undesirable_weight": 0.6},
        {"desirable_weight": 1.3, "undesirable_weight": 0.6},
    ),
    "apo_zero_unpaired": ({"loss": "apo_zero_unpaired"}, {"loss_type": "apo_zero_unpaired"}),
}
CPO: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({}, {}),
    "hinge": ({"loss": "hinge", "beta": 0.02}, {"loss_type": "hinge", "beta": 0.02}),
    "ipo": ({"loss": "ipo"}, {"loss_type": "ipo"}),
    "sft_weight": ({"sft_weight": 0.3}, {"cpo_alpha": 0.3}),
    "label_smoothing": ({"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    "alphapo": ({"loss": "ipo", "alphapo": 0.2}, {"loss_type": "ipo", "alpha": 0.2}),
}
SIMPO: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    name: (own, {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0} | theirs)
    for name, (own, theirs) in {
        "simpo": ({}, {}),
        "beta": ({"beta": 1.2}, {"beta": 1.2}),
        "gamma": ({"gamma": 0.4}, {"simpo_gamma": 0.4}),
        "sft_weight": ({"sft_weight": 0.3}, {"cpo_alpha": 0.3}),  # CPO-SimPO
        "label_smoothing": ({"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
        "alphapo": ({"alphapo": 0.2}, {"alpha": 0.2}),
    }.items()
}
ORPO: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {"orpo": ({}, {}), "beta": ({"beta": 0.5}, {"beta": 0.5})}
CASES = {"dpo": DPO, "kto": KTO, "cpo": CPO, "simpo": SIMPO, "orpo": ORPO}


def assert_as_trl(found: Found, expected: trl_oracle.Result, case: str) -> None:
    assert found.loss == pytest.approx(expected.loss, rel=1e-5), case
    assert expected.metrics
    for name, value in expected.metrics.items():
        # A reward is β times a difference of log-probabilities of -50: 1e-6 is what float32 leaves of it.
        assert found.metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), (case, name)
        assert found.evaluated[name] == pytest.approx(value, rel=1e-5, abs=1e-6), (case, name)
    assert_close(found.gradients, expected.gradients)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow if kind in ("dpo", "kto") else pytest.mark.nightly) for kind in CASES],
)
def test_as_trl(folders: tuple[Path, Path], kind: str) -> None:
    policy, reference = folders
    keys = {"reference_path": str(reference)} if kind in ("dpo", "kto") else {}
    found = compute(policy, ONE, sections(kind, CASES[kind], **keys))
    expected = trl(kind, policy, reference)
    for case in CASES[kind]:
        assert_as_trl(found[case], expected[case], case)
    losses = {round(each.loss, 7) for each in found.values()}
    assert len(losses) == len(found)  # every option changes the loss


ADAPTERS = {case: DPO[case] for case in ("sigmoid", "ipo", "ld_alpha", "sft_weight")}


def with_adapter(model: Path) -> tuple[AdapterSection, Path]:
    folder = peft_folder(model, model.parent / "qwen3-lora", "lora", ALL)
    return AdapterSection(name="lora", path=str(folder)), folder


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one rank", pytest.param("TP2xPP2", marks=pytest.mark.nightly)])
def test_the_model_without_its_adapter_as_reference(models: Any, layout: str) -> None:
    model = models("qwen3")
    adapter, folder = with_adapter(model)
    wanted = sections("dpo", ADAPTERS, reference="adapter_off")
    found = compute(model, LAYOUTS[layout], wanted, adapter=adapter)
    expected = trl_with_adapter(model, folder)
    for case in ADAPTERS:
        assert_as_trl(found[case], expected[case], case)


@functools.cache
def trl_with_adapter(model: Path, folder: Path) -> dict[str, trl_oracle.Result]:
    cases = {case: theirs for case, (_, theirs) in ADAPTERS.items()}
    return run_ranks(trl_oracle.dpo_adapter, 1, model, folder, cases, timeout=300)[0]
