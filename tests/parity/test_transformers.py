"""The same mathematics as transformers: logits, loss and gradients of every family and variant, in float32."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_swift.data.batch import MicroBatch
from mcore_swift.recipe import ParallelSection
from tests.distributed.rank_model import assert_close, documents, logits, recipe_for, train, transformers_gradients
from tests.distributed.tiny_models import REPRESENTATIVES, VARIANTS, tiny_config, tiny_model

TOLERANCE = 1e-5  # max |a - b| / max |b|
LENGTH = 24  # longer than every sliding window, and past the length at which llama3 and YaRN start to scale

FAMILIES = {"qwen3-moe", "gpt-oss", "deepseek-v3", "gemma3"}  # that have most of what the others have


def case(variant: str) -> Any:
    marks = () if variant in REPRESENTATIVES else pytest.mark.slow if variant in FAMILIES else pytest.mark.nightly
    return pytest.param(variant, marks=marks)


MOSTLY_SLOW = [case(variant) for variant in VARIANTS]


def rows(vocab_size: int) -> list[MicroBatch]:
    """Two micro-batches of three unpacked rows."""
    tokens = torch.randint(0, vocab_size, (2, 3, LENGTH), generator=torch.Generator().manual_seed(5))
    positions = torch.arange(LENGTH).expand(3, -1)
    return [MicroBatch(part, part, torch.ones(3, LENGTH), positions) for part in tokens]


def pack(texts: list[torch.Tensor]) -> MicroBatch:
    """All documents in one sequence."""
    lengths = [len(text) for text in texts]
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tokens = torch.cat(texts)[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return MicroBatch(tokens, tokens, torch.ones(tokens.shape), positions, ends, max(lengths))


@functools.cache
def expected_rows(variant: str) -> list[torch.Tensor]:
    model = tiny_model(variant)
    with torch.no_grad():
        return [model(batch.tokens).logits for batch in rows(model.config.vocab_size)]


def assert_logits(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


def vocab_size(variant: str) -> int:
    return expected_rows(variant)[0].size(-1)


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=[pytest.mark.slow] * (v not in REPRESENTATIVES)) for v in VARIANTS]
)
def test_logits(models: Any, variant: str) -> None:
    assert_logits(logits(recipe_for(models(variant)), rows(vocab_size(variant))), expected_rows(variant))


@pytest.mark.parametrize("variant", MOSTLY_SLOW)
def test_packed_documents_are_each_alone(models: Any, variant: str) -> None:
    model = tiny_model(variant)
    texts = [torch.from_numpy(tokens).long() for tokens, _ in documents(model.config.vocab_size)]
    with torch.no_grad():
        alone = torch.cat([model(text[None]).logits for text in texts], dim=1)
    assert_logits(logits(recipe_for(models(variant)), [pack(texts)]), [alone])


LAYOUTS = {
    "TP2": ParallelSection(tp=2, sequence_parallel=False),
    "TP2+SP": ParallelSection(tp=2),
    "PP2": ParallelSection(pp=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", REPRESENTATIVES)
def test_logits_at_other_layouts(models: Any, variant: str, layout: str) -> None:
    found = logits(recipe_for(models(variant), LAYOUTS[layout]), rows(vocab_size(variant)))
    assert_logits(found, expected_rows(variant))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [ParallelSection(tp=3), ParallelSection(tp=3, pp=2)], ids=["TP3", "TP3xPP2"])
def test_logits_at_tp3_with_three_key_value_heads(models: Any, layout: ParallelSection) -> None:
    found = logits(recipe_for(models("llama-9-heads"), layout), rows(vocab_size("llama-9-heads")))
    assert_logits(found, expected_rows("llama-9-heads"))


@pytest.mark.parametrize("variant", MOSTLY_SLOW)
def test_loss_and_gradients(models: Any, variant: str) -> None:
    """Against transformers in float64, each document alone: packing, loss mask and normalization are included."""
    folder: Path = models(variant)
    loss, gradients = transformers_gradients(folder)
    found = train(recipe_for(folder))
    assert found.losses[0] == pytest.approx(loss, rel=1e-6)
    # transformers has no layers of multi-token prediction: tests/models/test_mtp.py is about theirs.
    ahead = tuple(f"model.layers.{tiny_config(variant).num_hidden_layers + i}." for i in range(2))
    assert_close({n: g for n, g in found.gradients.items() if not n.startswith(ahead)}, gradients)


def test_install_leaves_transformers_alone(models: Any) -> None:
    """`install` once hid the "meta" device from transformers, which then left rotary frequencies uninitialized."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models("llama-rope-llama3"), attn_implementation="eager")
    batch = rows(101)[0]
    with torch.no_grad():
        assert torch.equal(model(batch.tokens).logits, expected_rows("llama-rope-llama3")[0])
