"""SFT's options at any layout: label smoothing and rows' weights, as torch computes them on transformers' logits."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_swift.recipe import ObjectiveSection, ParallelSection
from tests.data_pipeline.conftest import tokenizer_folder  # noqa: F401  (fixtures)
from tests.distributed.harness import run_ranks
from tests.distributed.rank_model import assert_close, documents
from tests.objectives.here import SFT_WEIGHTS, Found, compute
from tests.objectives.test_layouts import EXPERTS, LAYOUTS
from tests.test_bad_runs import CHATS, good_model, place, train  # noqa: F401  (fixtures)

CASES = {"weights": ObjectiveSection(), "smoothing": ObjectiveSection(label_smoothing=0.15)}
PADDED = "qwen3"  # a vocabulary that tensor parallel ranks can't share out evenly


def torch_gradients(folder: Path, smoothing: Mapping[str, float]) -> dict[str, tuple[float, dict[str, torch.Tensor]]]:
    """Loss and gradients by torch's cross_entropy on transformers' logits in float64, each document alone."""
    from transformers import AutoModelForCausalLM

    opened: Any = AutoModelForCausalLM
    model = opened.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    found = {}
    for case, share in smoothing.items():
        model.zero_grad()
        total, whole = torch.zeros((), dtype=torch.float64), 0.0
        for number, (tokens, loss) in enumerate(documents(model.config.vocab_size)):
            inputs = torch.from_numpy(tokens).long()
            weight = torch.from_numpy(loss[1:]).double() * SFT_WEIGHTS[number % len(SFT_WEIGHTS)]
            logits = model(inputs[None]).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, inputs[1:], reduction="none", label_smoothing=share)
            total, whole = total + (losses * weight).sum(), whole + float(weight.sum())
        (total / whole).backward()
        gradients = {name: p.grad.float().clone() for name, p in model.named_parameters()}
        found[case] = float(total) / whole, gradients
    return found


@functools.cache
def expected(folder: Path) -> dict[str, tuple[float, dict[str, torch.Tensor]]]:
    return run_ranks(torch_gradients, 1, folder, {case: own.label_smoothing for case, own in CASES.items()})[0]


def assert_as_torch(found: dict[str, Found], folder: Path) -> None:
    for case, (loss, gradients) in expected(folder).items():
        assert found[case].loss == pytest.approx(loss, rel=1e-6), case
        assert found[case].evaluated["loss"] == pytest.approx(loss, rel=1e-6), case
        assert_close(found[case].gradients, gradients)


FORMS = [(layout, packing) for layout in ("one rank", *LAYOUTS) for packing in (True, False)]
SLOW = {("TP2+SP", True), ("CP2xDP2", True)}


@pytest.mark.parametrize(
    ("layout", "packing"),
    [
        pytest.param(*form, marks=pytest.mark.slow if form in SLOW else pytest.mark.nightly)
        for form in FORMS
        if form != ("PP2xVPP2", False)
    ],
)
def test_as_torch(models: Any, layout: str, packing: bool) -> None:
    folder = models(PADDED)
    section = (LAYOUTS | {"one rank": ParallelSection()})[layout]
    assert_as_torch(compute(folder, section, CASES, packing=packing), folder)


@pytest.mark.nightly
@pytest.mark.parametrize("layout", EXPERTS)
def test_experts(models: Any, layout: str) -> None:
    folder = models("qwen3-moe")
    one, found = (compute(folder, section, CASES) for section in (ParallelSection(), EXPERTS[layout]))
    for case in CASES:
        assert found[case].loss == pytest.approx(one[case].loss, rel=1e-6)
        assert_close(found[case].gradients, one[case].gradients)


# --- through the command ----------------------------------------------------------------------------------------------


@pytest.mark.nightly
def test_weights_of_rows(place: Path) -> None:  # noqa: F811
    """Rows of weight 0 are as if they weren't there; all weights times 7 change nothing; a stream refuses them."""

    def losses(rows: list[dict[str, Any]], *more: str) -> list[float]:
        (place / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        keys = ("--checkpoint.resume", "never", "--checkpoint.overwrite", "true")
        code, errors = train(place, *keys, *one_pack, *more)
        assert code == 0, errors
        lines = (place / "run" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    one_pack = ("--schedule.global_batch_size", "1", "--data.sequence_length", "160")
    two = CHATS[:2]
    plain = losses(two)
    assert losses([{**row, "weight": 7} for row in two]) == pytest.approx(plain, rel=1e-5)
    assert losses([*two, {**CHATS[9], "weight": 0}]) == pytest.approx(plain, rel=1e-5)
    assert losses([{**two[0], "weight": 3}, two[1]]) != pytest.approx(plain, rel=1e-5)
    assert losses(two, "--objective.label_smoothing", "0.1") != pytest.approx(plain, rel=1e-5)
    streamed = ("--data.streaming", "true", "--checkpoint.dir", str(place / "streamed"), "--checkpoint.export", "false")
    code, errors = train(place, *streamed)
    assert code == 0, errors
    (place / "chats.jsonl").write_text(json.dumps({**two[0], "weight": 3}) + "\n")
    code, errors = train(place, *streamed, "--checkpoint.resume", "never", "--checkpoint.overwrite", "true")
    assert code == 2 and "weight is 3" in errors and "data.streaming: false" in errors, errors
