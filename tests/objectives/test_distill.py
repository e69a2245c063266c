"""Distillation against TRL 1.16.0 in float64: loss, metrics and all of the student's gradients, at every layout."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_swift import parallel
from mcore_swift.objectives import divergence
from mcore_swift.objectives.divergence import Comparison, Head, Shard, compared, tokens_at_once
from mcore_swift.recipe import AdapterSection, ObjectiveSection, ParallelSection
from mcore_swift.recipe_checks.objective import filled
from tests.distributed import rank_model
from tests.distributed.harness import in_fork, prepared, run_ranks
from tests.distributed.rank_model import assert_close
from tests.distributed.tiny_models import tiny_folder
from tests.objectives import distill_oracle, test_layouts
from tests.objectives.here import Found, compute
from tests.objectives.trl_oracle import Result
from tests.peft.test_lora import ALL, peft_folder

ONE = ParallelSection()
# Of 101 tokens; tensor parallel ranks have columns for 102.
KEYS: dict[str, dict[str, Any]] = {
    "forward_kl": {},
    "reverse_kl": {"loss": "reverse_kl"},
    "js": {"loss": "js"},
    "js beta": {"loss": "js", "beta": 0.1},
    "temperature": {"temperature": 2.5},
    "reverse_kl temperature": {"loss": "reverse_kl", "temperature": 0.7},
    "top_k": {"top_k": 7},
    "top_k of all": {"top_k": 101, "distill_weight": 0.6},
    "top_k reverse_kl": {"top_k": 60, "loss": "reverse_kl"},  # more than a tensor parallel rank has
    "top_k js temperature": {"top_k": 5, "loss": "js", "temperature": 2.0},
    "distill_weight": {"distill_weight": 0.4},
    "all": {"loss": "js", "beta": 0.8, "temperature": 1.5, "top_k": 9, "distill_weight": 0.7},
}
CASES = {name: ObjectiveSection(name="distill", **keys) for name, keys in KEYS.items()}
# Another hidden size, more layers, other heads than the students'.
TEACHER: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 80}


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of 17 tokens at a time on one rank."""
    prepared()
    monkeypatch.setattr(divergence, "LOGITS_AT_ONCE", 17 * 101)


def teacher_of(models: Callable[[str], Path], variant: str) -> Path:
    return tiny_folder(models("qwen3").parent / f"{variant}-teacher", variant, **TEACHER)


@functools.cache
def oracle(student: Path, teacher: Path, cases: tuple[str, ...] = tuple(CASES)) -> dict[str, Result]:
    return run_ranks(distill_oracle.distilled, 1, student, teacher, {name: CASES[name] for name in cases})[0]


def taught(teacher: Path, cases: tuple[str, ...] = tuple(CASES)) -> dict[str, ObjectiveSection]:
    return {name: ObjectiveSection(name="distill", teacher=str(teacher), **KEYS[name]) for name in cases}


def assert_as_oracle(found: dict[str, Found], expected: dict[str, Result]) -> None:
    for case, one in expected.items():
        assert found[case].loss == pytest.approx(one.loss, rel=1e-5), case
        assert found[case].metrics.keys() - {"expert_load"} == one.metrics.keys()
        for name, value in one.metrics.items():
            assert found[case].metrics[name] == pytest.approx(value, rel=1e-5), (case, name)
            assert found[case].evaluated[name] == pytest.approx(value, rel=1e-5), (case, name)
        assert_close(found[case].gradients, one.gradients)


LAYOUTS = {
    "one rank": ONE,
    **{name: test_layouts.LAYOUTS[name] for name in ("TP2", "TP2+SP", "PP2", "PP2xVPP2", "CP2", "DP2", "TP2xPP2")},
    "TP2xCP2": ParallelSection(tp=2, cp=2),
}
SLOW = {("TP2+SP", True)}
FEW = ("forward_kl", "top_k reverse_kl", "all")
# The interleaved schedule takes no rows of differing lengths.
FORMS = [(name, packing) for name in LAYOUTS for packing in (True, False) if packing or name != "PP2xVPP2"]


@pytest.mark.parametrize(
    ("layout", "packing"),
    [
        pytest.param(*form, marks=pytest.mark.slow if form in SLOW else pytest.mark.nightly, id=f"{form[0]}-{form[1]}")
        for form in FORMS
    ],
)
def test_as_trl(models: Callable[[str], Path], layout: str, packing: bool) -> None:
    student, teacher = models("qwen3"), teacher_of(models, "qwen3")
    names = tuple(CASES) if packing and layout != "TP2+SP" else FEW
    found = compute(student, LAYOUTS[layout], taught(teacher, names), packing=packing)
    assert_as_oracle(found, oracle(student, teacher, names))
    assert len({round(each.loss, 7) for each in found.values()}) == len(found)  # every option changes the loss


SOME = ("forward_kl", "all")
EXPERTS = {
    "EP2": ParallelSection(ep=2, dp=2),
    "EP2xTP2": ParallelSection(ep=2, tp=2, dp=2),
    "EP2xPP2": ParallelSection(ep=2, dp=2, pp=2),
}


@pytest.mark.nightly
@pytest.mark.parametrize("layout", EXPERTS)
@pytest.mark.parametrize(("student", "teacher"), [("qwen3-moe", "qwen3"), ("qwen3-moe", "qwen3-moe")])
def test_experts(models: Callable[[str], Path], layout: str, student: str, teacher: str) -> None:
    folder = teacher_of(models, teacher)
    found = compute(models(student), EXPERTS[layout], taught(folder, SOME))
    assert_as_oracle(found, oracle(models(student), folder, SOME))


# Tied embeddings with and without a cap on the logits; a teacher with experts; one of another family.
PAIRS = {
    "gemma2": ("gemma2", "gemma2", {"tp": 2}),
    "tied": ("qwen3-tied", "qwen2", {"tp": 2, "pp": 2}),
    "capped student": ("gemma2", "qwen3", {"tp": 2, "sequence_parallel": False}),
    "teacher with experts": ("qwen3", "qwen3-moe", {"pp": 2}),
}


@pytest.mark.nightly
@pytest.mark.parametrize("pair", PAIRS)
def test_other_models(models: Callable[[str], Path], pair: str) -> None:
    student, variant, layout = PAIRS[pair]
    teacher = teacher_of(models, variant)
    for section in (ONE, ParallelSection(**layout)):
        found = compute(models(student), section, taught(teacher, SOME))
        assert_as_oracle(found, oracle(models(student), teacher, SOME))


@pytest.mark.nightly
def test_stages_of_other_sizes(models: Callable[[str], Path]) -> None:
    """What the recipe says of stages is said of the student's four layers; the teacher's six are shared out evenly."""
    student, teacher = models("qwen3"), teacher_of(models, "qwen3")
    found = compute(student, ParallelSection(pp=2, first_stage_layers=1), taught(teacher, SOME))
    assert_as_oracle(found, oracle(student, teacher, SOME))


@pytest.mark.nightly
@pytest.mark.parametrize("layout", ["one rank", "TP2xPP2"])
def test_adapters(models: Callable[[str], Path], layout: str) -> None:
    """LoRA's gradients are those of one rank, whose model is the student's with frozen weights."""
    student, teacher = models("qwen3"), teacher_of(models, "qwen3")
    folder = peft_folder(student, student.parent / "qwen3-lora", "lora", ALL)
    adapter = AdapterSection(name="lora", path=str(folder))
    one = compute(student, ONE, taught(teacher, SOME), adapter=adapter)
    found = compute(student, LAYOUTS[layout], taught(teacher, SOME), adapter=adapter, packing=False)
    for case in SOME:
        assert found[case].loss == pytest.approx(one[case].loss, rel=1e-6)
        assert_close(found[case].gradients, one[case].gradients)
        assert found[case].metrics["kl"] == pytest.approx(one[case].metrics["kl"], rel=1e-5)


@pytest.mark.nightly
def test_a_weight_that_is_still_on_its_way(models: Callable[[str], Path]) -> None:
    """Where parameters are gathered while the model runs, a module's hook waits for its own: it must be called."""
    student, teacher = models("qwen3"), teacher_of(models, "qwen3")
    wanted = taught(teacher, ("forward_kl",))["forward_kl"]
    (loss,) = run_ranks(_late_weight, 1, student, wanted)
    assert loss == pytest.approx(oracle(student, teacher, SOME)["forward_kl"].loss, rel=1e-5)


def _late_weight(student: Path, section: ObjectiveSection) -> float:
    from mcore_swift.objectives.registry import build_objective
    from mcore_swift.training import reference, step

    recipe = replace(rank_model.recipe_for(student), objective=section)
    model = rank_model.open_model(recipe)
    layer = model.chunks[0].output_layer
    right = layer.weight.detach().clone()
    layer.weight.data.zero_()

    def arrive(*_: Any) -> None:
        layer.weight.data.copy_(right)

    layer.register_forward_pre_hook(arrive)
    work = rank_model.micro_batches(recipe, 101, parallel.ranks()), build_objective(section), rank_model.CPU
    return step.eval_step(model.models, *work, reference.build(recipe, model.source, model.models, prepared())).loss


# --- without a model --------------------------------------------------------------------------------------------------


def made_up(tokens: int = 30, vocabulary: int = 40, hidden: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden": torch.randn(tokens, hidden, generator=generator),
        "weight": torch.randn(vocabulary, hidden, generator=generator),
        "states": torch.randn(tokens, 2 * hidden, generator=generator),
        "teacher": torch.randn(vocabulary, 2 * hidden, generator=generator),
        "labels": torch.randint(vocabulary, (tokens,), generator=generator),
    }


def values_of(options: ObjectiveSection, made: dict[str, torch.Tensor]) -> torch.Tensor:
    head = Head(made["teacher"])
    at_once = tokens_at_once(len(made["weight"]))
    comparison = Comparison(made["labels"], made["states"], head, Shard(), filled(options), at_once)
    return compared(made["hidden"], Head(made["weight"], lambda logits: 5 * torch.tanh(logits / 5)), comparison)


@in_fork
def test_gradients_are_those_of_the_formula() -> None:
    """Of both values together, through a cap on the logits, with a weight of its own for each token; and of none."""
    for case in CASES.values():
        made = made_up()
        weights = torch.linspace(0.5, 2.0, 60).view(2, 30)
        if case.distill_weight == 1:
            weights[0] = 0
        for name in ("hidden", "weight"):
            made[name].requires_grad_()
        (values_of(case_of(case, 40), made)[:2] * weights).sum().backward()
        expected = [made[name].detach().double().requires_grad_() for name in ("hidden", "weight")]
        s = 5 * torch.tanh(expected[0] @ expected[1].t() / 5)
        t = (made["states"] @ made["teacher"].t()).double()
        total = sum(
            weights[0, i] * torch.nn.functional.cross_entropy(s[i], made["labels"][i])
            + weights[1, i] * distill_oracle.definition(s[i : i + 1], t[i : i + 1], case_of(case, 40)).sum()
            for i in range(30)
        )
        total.backward()  # type: ignore[union-attr]
        for name, one in zip(("hidden", "weight"), expected, strict=True):
            error = (made[name].grad - one.grad).norm() / one.grad.norm()  # type: ignore[operator]
            assert error < 3e-6, (case, name, float(error))
    made = made_up(tokens=0)
    made["weight"].requires_grad_()
    found = values_of(CASES["all"], made)
    found.sum().backward()
    assert found.shape == (4, 0) and made["weight"].grad is not None and not made["weight"].grad.any()


def case_of(case: ObjectiveSection, vocabulary: int) -> ObjectiveSection:
    return replace(case, top_k=min(case.top_k, vocabulary) if case.top_k else None)


@in_fork
def test_logits_of_all_tokens_are_never_there() -> None:
    """The largest tensor of a forward and a backward pass has the logits of 17 · 101 // 40 = 42 tokens."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            sizes.extend(each.numel() for each in tree_leaves(found) if isinstance(each, torch.Tensor))
            return found

    made = made_up(tokens=90)
    made["weight"].requires_grad_()
    with Watch():
        values_of(CASES["js beta"], made)[:2].sum().backward()
    assert max(sizes) == 42 * 40
