"""Training a part of the model: what is frozen stays bit for bit and costs nothing, the rest gets its own gradients."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mcore_swift import parallel
from mcore_swift.errors import InputError
from mcore_swift.models.build import read_source
from mcore_swift.models.keys import weight_rules
from mcore_swift.objectives.registry import OBJECTIVES
from mcore_swift.peft.freezing import frozen_tensors, matches
from mcore_swift.recipe import ModelSection, ParallelSection, Recipe, RuntimeSection
from tests.distributed.harness import run_ranks
from tests.distributed.rank_model import (
    CPU,
    STEPS,
    Trained,
    assert_close,
    gradients_of_first_step,
    hf_copies,
    merge,
    micro_batches,
    open_model,
    recipe_for,
    train,
)
from tests.distributed.tiny_models import tiny_config
from tests.training.checkpoint_run import layout, saved_and_loaded, with_checkpoints


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Any:
    def of(variant: str) -> Any:
        folder = tmp_path_factory.mktemp(variant)
        tiny_config(variant).save_pretrained(folder)
        return weight_rules(read_source(folder))

    return {variant: of(variant) for variant in ("qwen3", "qwen3-moe", "deepseek-v3", "llama-biases")}


def section(**fields: Any) -> ModelSection:
    return ModelSection(path="model", **fields)


# --- what is named ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "fields", "trained"),
    [
        ("qwen3", {"trainable": ["model.layers.2*.mlp.*"]}, 2),  # gate and up are one tensor
        ("qwen3", {"trainable": ["lm_head", "model.norm"]}, 2),
        ("qwen3", {"trainable": ["o_proj"]}, 4),
        ("qwen3", {"trainable": ["model.layers.*"], "freeze": ["model.layers.[0-2].*"]}, 8),
        ("qwen3", {"freeze": ["model.embed_tokens"]}, 2 + 4 * 8),
        ("qwen3-moe", {"trainable": ["model.layers.0.mlp.experts.5.*"]}, 2),
        ("qwen3-moe", {"trainable": ["*.experts.*"]}, 3 * 8 * 2),
    ],
)
def test_what_is_trained(rules: Any, variant: str, fields: dict[str, Any], trained: int) -> None:
    of = rules[variant]
    every = sum(rule.stack or 1 for rule in of.values())
    assert every - len(frozen_tensors(of, section(**fields))) == trained


@pytest.mark.parametrize(
    ("variant", "fields", "message"),
    [
        ("qwen3", {"freeze": ["lm_haed"]}, r"model\.freeze: 'lm_haed' matches no tensor .*Did you mean 'lm_head'"),
        ("qwen3", {"trainable": ["model.layers.7.*"]}, r"model\.trainable: 'model\.layers\.7\.\*' matches no tensor"),
        ("qwen3", {"trainable": ["q_proj"]}, r"q_proj.weight would be trained and .*k_proj.weight not"),
        ("qwen3", {"trainable": ["lm_head"], "freeze": ["lm_*"]}, "they leave nothing to train"),
        ("llama-biases", {"trainable": ["*.bias"]}, r"a bias gets no gradient without its weight's"),
        ("deepseek-v3", {"trainable": ["model.layers.4.*"]}, "matches no tensor"),  # kept, not trained
    ],
)
def test_what_is_refused(rules: Any, variant: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        frozen_tensors(rules[variant], section(**fields))


def test_layers_of_multi_token_prediction_that_are_trained(rules: Any) -> None:
    wanted = section(trainable=["model.layers.4.*"], mtp_loss_scale=0.1)
    trained = rules["deepseek-v3"].keys() - {key for key, _ in frozen_tensors(rules["deepseek-v3"], wanted)}
    assert trained and all(key.startswith("mtp.layers.0.") for key in trained)


# --- what is trained --------------------------------------------------------------------------------------------------


def partly(folder: Path, place: ParallelSection, runtime: RuntimeSection | None = None, **fields: Any) -> Recipe:
    return replace(recipe_for(folder, place, runtime=runtime), model=ModelSection(path=str(folder), **fields))


def part_rank(recipe: Recipe) -> Any:
    """Gradients of the first step, parameters after the last, and what is held for parameters that aren't trained."""
    from mcore_swift.training import step
    from mcore_swift.training.optimizer import set_learning_rate
    from mcore_swift.training.optimizer_state import optimizer_items
    from mcore_swift.weights.dist_checkpoint import model_items

    model = open_model(recipe)
    batches = micro_batches(recipe, model.source.vocab_size, parallel.ranks())
    gradients = gradients_of_first_step(model)
    set_learning_rate(model.optimizer, 1e-3, recipe.optimizer.weight_decay)
    for _ in range(STEPS):
        step.train_step(model.models, model.optimizer, batches, OBJECTIVES["sft"], CPU)
    model.sync_parameters()
    frozen = [p for chunk in model.chunks for p in chunk.parameters() if not p.requires_grad]
    assert not any(hasattr(parameter, "main_grad") or parameter.grad is not None for parameter in frozen)
    items = model_items(model.chunks)
    held = {item.key.split(".", 3)[3] for item in optimizer_items(model.optimizer, items.parts)}
    trained = {part.key for p in model.chunks for q in p.parameters() if q.requires_grad for part in items.parts[id(q)]}
    assert held == trained
    buffers = sum(b.numel for m in model.models for b in (*m.buffers, *m.expert_parallel_buffers))
    whole = sum(p.numel() for chunk in model.chunks for p in chunk.parameters() if p.requires_grad)
    assert buffers < whole + 64 * len(trained) + 256  # Megatron pads parameters and buckets
    return gradients, dict(hf_copies(model, lambda parameter: parameter.data))


@functools.cache
def whole_run(folder: Path) -> Trained:
    return train(recipe_for(folder))


FULL = RuntimeSection(device="cpu", recompute="full")
CASES = {
    "one rank": ("qwen3", "model.layers.2*.mlp.*", ParallelSection(), None),
    "recomputed": ("qwen3", "model.layers.0.mlp.*", ParallelSection(), FULL),
    "TP2+SP": ("llama-biases", "model.layers.1.self_attn.*", ParallelSection(tp=2), None),
    "PP2, a frozen stage": ("qwen3", "model.layers.3.*", ParallelSection(pp=2), None),
    "PP2, tied, frozen behind": ("qwen2-tied", "model.layers.0.*", ParallelSection(pp=2), None),
    "VPP2": ("qwen3", "input_layernorm", ParallelSection(pp=2, vpp=2), None),
    "DP2": ("qwen3", "lm_head", ParallelSection(dp=2), None),
    "EP2": ("qwen3-moe", "model.layers.0.mlp.experts.5.*", ParallelSection(ep=2, dp=2), None),
}


def marked(case: str) -> Any:
    marks = {"PP2, a frozen stage": (), "recomputed": pytest.mark.slow, "EP2": pytest.mark.slow}
    return pytest.param(case, marks=marks.get(case, pytest.mark.nightly))


@pytest.mark.slow
@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_a_part_is_trained(models: Any, case: str) -> None:
    variant, glob, place, runtime = CASES[case]
    folder = models(variant)
    recipe = partly(folder, place, runtime, trainable=[glob])
    found = run_ranks(part_rank, parallel.resolve(place, world_size=None).world_size, recipe)
    gradients, parameters = (merge([rank[number] for rank in found]) for number in range(2))
    expected = whole_run(folder).gradients
    trained = {name for name in expected if matches(glob, name)}
    assert trained
    assert_close(gradients, {name: expected[name] for name in trained})
    before = load_file(folder / "model.safetensors")
    assert {name for name, value in parameters.items() if not torch.equal(value, before[name])} == trained


@pytest.mark.slow
def test_resumed_bit_for_bit(models: Any, tmp_path: Path) -> None:
    recipe = partly(models("qwen3"), layout("TP2 PP2"), freeze=["model.embed_tokens", "model.layers.[01].*"])
    saved, loaded = saved_and_loaded(*[with_checkpoints(recipe, tmp_path)] * 2)
    assert [rank[2] for rank in loaded] == [rank[2] for rank in saved]
