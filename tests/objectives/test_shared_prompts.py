"""Pairs whose prompts are computed once give what those give whose prompts are computed twice."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mcore_swift import parallel
from mcore_swift.data.judged_collate import collate_judged
from mcore_swift.data.judged_samples import Answer
from mcore_swift.data.shape import LoaderShape
from mcore_swift.data.shared_prompts import share_prompts
from mcore_swift.data.wanted import Form
from mcore_swift.errors import InputError
from mcore_swift.recipe import ObjectiveSection, ParallelSection, Recipe
from tests.data_pipeline.conftest import tokenizer_folder  # noqa: F401  (fixtures)
from tests.distributed.harness import prepared, run_ranks
from tests.distributed.rank_model import CPU, open_model, recipe_for
from tests.objectives import rows
from tests.objectives.here import Found, compute, micro_batches
from tests.objectives.test_against_trl import near, with_adapter
from tests.objectives.test_layouts import EXPERTS, LAYOUTS, assert_same
from tests.objectives.test_runs import LORA, run
from tests.test_bad_runs import good_model, place  # noqa: F401

# --- the function -----------------------------------------------------------------------------------------------------


def answer(prompt: str, text: str, row: int) -> Answer:
    """A token is a character; those of the text count."""
    tokens = np.array([ord(letter) for letter in prompt + text], dtype=np.int32)
    loss = np.array([0] * len(prompt) + [1] * len(text), dtype=np.uint8)
    return Answer(tokens, loss, row, np.nan, np.nan, np.nan, False, np.nan)


def packs(*samples: list[tuple[str, str, str]], length: int = 32, scored: bool = False) -> Any:
    """One micro-batch of packs, each of pairs (prompt, chosen, rejected)."""
    shape = LoaderShape(
        global_batch_size=1, micro_batch_size=1, sequence_length=length, dp_rank=0, dp_size=1, pad_multiple=1
    )
    made = [
        [answer(prompt, text, row) for row, (prompt, *texts) in enumerate(sample) for text in texts]
        for sample in samples
    ]
    form = Form(answers=2, labelled=False, scored=scored)
    return collate_judged(made, form=form, packing=True, shape=shape, pad_id=0)


def read(tokens: torch.Tensor) -> str:
    return "".join(chr(token) if token else "." for token in tokens.flatten().tolist())


def computed(*batches: Any, multiple: int = 1, even: bool = False) -> list[Any]:
    return list(share_prompts(batches, multiple=multiple, even=even))


def test_what_is_computed() -> None:
    batch = packs([("abc", "DE", "FGH"), ("x", "Y", "Z")], [("pq", "R", "S")], length=20)
    assert read(batch.tokens) == "abcDEabcFGHxYxZ....." + "pqRpqS.............."
    (found,) = computed(batch, multiple=4)
    # Of a prompt the last token stays: two different labels follow it.
    assert read(found.tokens) == "abcDEcFGHxYxZpqRqS.."
    assert read(found.labels) == ".." + "DE." + "FGH." + "Y.Z." + ".R.S." + ".."
    assert read(batch.labels)[:11] == "..DE...FGH."
    assert found.loss_mask[0].tolist() == [float(letter != ".") for letter in read(found.labels)]
    assert found.position_ids[0].tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 0, 1, 0, 1, 0, 1, 2, 1, 2, 0, 1]
    assert found.sequences.index[0].tolist() == [
        *(-1, -1, 0, 0, -1, 1, 1, 1, -1, 2, -1, 3, -1),
        *(-1, 4, -1, 5, -1, -1, -1),
    ]
    assert found.real[0].tolist() == [True] * 18 + [False] * 2
    assert torch.equal(found.cu_seqlens, batch.cu_seqlens) and found.max_seqlen == batch.max_seqlen
    shared = found.shared
    whole = found.tokens[0][shared.rows]
    assert torch.equal(whole[batch.real[0]], batch.tokens[0][batch.real[0]])
    assert torch.equal(batch.tokens[0][shared.positions], found.tokens[0])
    assert shared.second.tolist() == [5, 6, 23] and shared.second_rows.tolist() == [0, 1, 13]
    assert torch.equal(shared.rows[shared.positions], torch.arange(20))


def test_one_length_for_a_step() -> None:
    batches = [packs([("abc", "DE", "FGH")]), packs([("x", "Y", "Z")])]
    assert [found.tokens.size(1) for found in computed(*batches, multiple=2)] == [10, 4]
    assert [found.tokens.size(1) for found in computed(*batches, multiple=2, even=True)] == [10, 10]
    full = packs([("abcdef", "GHIJKLMNO", "PQRSTUVWXYZ")], length=32)
    (found,) = computed(full, multiple=30)  # without padding, three of five stay as they were
    assert read(found.tokens) == "abcdefGHIJKLMNOfPQRSTUVWXYZ" + "abc" and len(found.shared.second) == 2
    assert torch.equal(found.tokens[0][found.shared.rows], full.tokens[0])
    (found,) = computed(full, multiple=24)  # never longer than it was
    assert found.tokens.size(1) == 32 and not len(found.shared.second)


def test_nothing_is_shared() -> None:
    """Prompts of one token, others that differ, and a pack without answers."""
    for batch in (packs([("x", "Y", "Z")]), collate_pair("ab", "cd")):
        (found,) = computed(batch)
        real = batch.real
        assert torch.equal(found.tokens[0], batch.tokens[real]) and not len(found.shared.second)
    empty = packs([])
    (found,) = computed(empty, multiple=8)
    assert found.tokens.tolist() == [[0] * 8] and not found.real.any()


def collate_pair(*prompts: str) -> Any:
    shape = LoaderShape(
        global_batch_size=1, micro_batch_size=1, sequence_length=16, dp_rank=0, dp_size=1, pad_multiple=1
    )
    form = Form(answers=2, labelled=False, scored=False)
    made = [answer(prompt, "XY", 0) for prompt in prompts]
    return collate_judged([made], form=form, packing=True, shape=shape, pad_id=0)


def test_a_score_is_of_one_document() -> None:
    """Answers that begin alike share that, too, up to the token whose score counts."""
    batch = packs([("ab", "cD", "cEF")], [("ab", "c", "cd")], length=12, scored=True)
    (found,) = computed(batch)
    assert read(found.tokens) == "abcDEF" + "abc" + "cd"
    assert found.sequences.index[0].tolist() == [-1, -1, -1, 0, -1, 1, -1, -1, 2, -1, 3]


# --- in a step --------------------------------------------------------------------------------------------------------

CASES = {
    "dpo": ObjectiveSection(name="dpo"),
    "dpo-ld-sft": ObjectiveSection(name="dpo", ld_alpha=0.3, sft_weight=0.5),
    "dpo-aot": ObjectiveSection(name="dpo", loss="aot_unpaired"),
    "simpo": ObjectiveSection(name="simpo"),
    "cpo": ObjectiveSection(name="cpo"),
    "orpo": ObjectiveSection(name="orpo"),
}


@functools.cache
def found_at(
    folder: Path,
    layout: str,
    *,
    share: bool,
    lora: bool = False,
    cases: tuple[str, ...] = tuple(CASES),
    recompute: str = "none",
) -> dict[str, Found]:
    reference = near(folder, folder.parent / f"{folder.name}-reference")
    other: Any = {"reference": "adapter_off"} if lora else {"reference_path": str(reference)}
    chosen = {name: replace(CASES[name], **other) if CASES[name].name == "dpo" else CASES[name] for name in cases}
    adapter = with_adapter(folder)[0] if lora else None
    section = (LAYOUTS | EXPERTS | {"one rank": ParallelSection()})[layout]
    return compute(folder, section, chosen, adapter=adapter, share_prompts=share, recompute=recompute)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_it_changes_nothing(models: Any, family: str) -> None:
    folder = models(family)
    assert_same(found_at(folder, "one rank", share=True), found_at(folder, "one rank", share=False))


OFF: dict[str, Any] = {"lora": True, "cases": ("dpo", "dpo-aot", "simpo")}


def test_it_changes_nothing_without_the_adapter(models: Any) -> None:
    folder = models("qwen3")
    assert_same(found_at(folder, "one rank", share=True, **OFF), found_at(folder, "one rank", share=False, **OFF))


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_what_is_computed_again_is_the_same(models: Any, recompute: str) -> None:
    folder = models("qwen3")
    again = found_at(folder, "one rank", share=True, recompute=recompute, **OFF)
    assert_same(again, found_at(folder, "one rank", share=False, **OFF))


AT = ("TP2+SP", "PP2xVPP2", "TP2", "PP2", "DP2", "TP2xPP2")
FORMS = [
    pytest.param(layout, lora, marks=pytest.mark.slow if slow else pytest.mark.nightly)
    for lora in (False, True)
    for layout in AT
    for slow in [layout in AT[:2] and lora]
]


@pytest.mark.parametrize(("layout", "lora"), FORMS)
def test_layout(models: Any, layout: str, lora: bool) -> None:
    folder, more = models("qwen3"), OFF if lora else {}
    assert_same(found_at(folder, layout, share=True, **more), found_at(folder, "one rank", share=False, **more))


@pytest.mark.parametrize("layout", [pytest.param(layout, marks=pytest.mark.nightly) for layout in EXPERTS])
def test_experts(models: Any, layout: str) -> None:
    folder = models("qwen3-moe")
    found, alone = (found_at(folder, at, share=True) for at in (layout, "one rank"))
    assert_same(found, alone)
    assert_same(without_loads(found), without_loads(found_at(folder, "one rank", share=False)))


def without_loads(found: dict[str, Found]) -> dict[str, Found]:
    """An expert's load is that of the positions that are computed."""

    def others(metrics: dict[str, float]) -> dict[str, float]:
        return {name: value for name, value in metrics.items() if not name.startswith("expert")}

    return {
        case: replace(one, metrics=others(one.metrics), evaluated=others(one.evaluated)) for case, one in found.items()
    }


@pytest.mark.parametrize(
    "family",
    ["llama", *(pytest.param(family, marks=pytest.mark.nightly) for family in ("gemma2", "gemma3", "gpt-oss"))],
)
def test_windows_caps_and_sinks(models: Any, family: str) -> None:
    """Their attention is that of whole documents, as ever."""
    folder, cases = models(family), ("simpo",)
    found, expected = (found_at(folder, "one rank", share=share, cases=cases) for share in (True, False))
    assert_same(without_loads(found), without_loads(expected))


@pytest.mark.parametrize("layout", ["one rank", pytest.param("TP2xPP2", marks=pytest.mark.nightly)])
def test_rewards(models: Any, layout: str) -> None:
    section = (LAYOUTS | {"one rank": ParallelSection()})[layout]
    cases = {"rm": ObjectiveSection(name="rm", centering=0.01)}
    found, expected = (
        compute(models("qwen3"), section if share else ParallelSection(), cases, margins=True, share_prompts=share)
        for share in (True, False)
    )
    assert_same(found, expected)


# --- what is counted, what is kept, what is refused -------------------------------------------------------------------


def counts(recipe: Recipe) -> list[Any]:
    """(positions of the data, those that were computed, Σ length²) of a step and of an evaluation; then the answers'
    log-probabilities, as a precomputed reference keeps them."""
    from mcore_swift.objectives.registry import build_objective
    from mcore_swift.training import reference, step

    model = open_model(recipe)
    batches = micro_batches(recipe, model.source.vocab_size)
    work = (batches, build_objective(recipe.objective), CPU, reference.adapter_off(model.models))
    model.optimizer.step = lambda: (True, 0.0, None)
    results = [step.train_step(model.models, model.optimizer, *work), step.eval_step(model.models, *work)]
    logps = step.answer_logps(model.models, step.parts(batches, CPU, model.models))
    return [*((one.tokens, one.computed_tokens, one.sum_squared_lengths) for one in results), logps]


def test_counts(models: Any) -> None:
    model = models("qwen3")
    recipe = recipe_for(model, adapter=with_adapter(model)[0])
    objective = ObjectiveSection(name="dpo", reference="adapter_off")
    recipe = replace(recipe, objective=objective, data=replace(recipe.data, sequence_length=rows.PACK_LENGTH))
    sharing = replace(recipe, data=replace(recipe.data, share_prompts=True))
    whole, whole_again, kept = run_ranks(counts, 1, recipe)[0]
    found, found_again, kept_too = run_ranks(counts, 1, sharing)[0]
    positions = len(rows.PACKS) * rows.PACK_LENGTH
    assert whole == whole_again and whole[:2] == (positions, positions)
    # Documents have a token more than labels; a pair of p, c and r labels shares p − 1 positions of the prompt's p.
    own = [sum(p + c + r + 1 for p, c, r in (rows.LENGTHS[number] for number in pack)) for pack in rows.PACKS]
    computed_tokens = sum(max(-(-length // 16), 1) * 16 for length in own)
    assert found == found_again == (positions, computed_tokens, whole[2])  # attention has whole documents
    for one, other in zip(kept, kept_too, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("reference", ["precomputed", "model"])
def test_runs(place: Path, reference: str) -> None:  # noqa: F811
    """Through the real command, from a file: steps and evaluation."""
    keys = (*LORA, "--objective.reference", reference)
    expected = run(place, "dpo", *keys)
    for layout in ((), ("--parallel.pp", "2")):
        for one, other in zip(run(place, "dpo", *keys, "--data.share_prompts", "true", *layout), expected, strict=True):
            for name in (name for name in other if "loss" in name or "margin" in name):
                assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name


def test_a_reference_with_latent_attention_is_refused(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mcore_swift.models import lever_rules
    from mcore_swift.models.build import read_source
    from mcore_swift.training.frozen import frozen_model

    policy = models("qwen3")
    recipe = recipe_for(policy)
    objective = ObjectiveSection(name="dpo", reference="model", reference_path=str(near(policy, policy / "reference")))
    recipe = replace(recipe, objective=objective, data=replace(recipe.data, share_prompts=True))
    plan = parallel.resolve(ParallelSection(), world_size=1)
    frozen_model(recipe, read_source(policy), plan)
    monkeypatch.setattr(lever_rules.Run, "latent_attention", True)
    with pytest.raises(InputError, match=r"data\.share_prompts: queries, keys and values of qwen3"):
        frozen_model(recipe, read_source(policy), plan)


def test_a_gradient_of_one_copy_only_is_seen(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mcore_swift.models import shared_prompts

    def only_first(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0].index_select(0, ctx.shared.positions), None

    folder, cases = models("qwen3"), ("simpo",)
    expected = found_at(folder, "one rank", share=False, cases=cases)
    prepared()
    monkeypatch.setattr(shared_prompts._Whole, "backward", staticmethod(only_first))
    found = compute(folder, ParallelSection(), {"simpo": CASES["simpo"]}, share_prompts=True)
    assert found["simpo"].loss == pytest.approx(expected["simpo"].loss, rel=1e-6)
    with pytest.raises(AssertionError, match="tensors differ"):
        assert_same(found, expected)
