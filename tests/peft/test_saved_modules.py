"""Modules trained in full beside the adapters (PEFT's modules_to_save): against PEFT, at every layout, in and out."""

from __future__ import annotations

import functools
import json
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
from mcore_swift.peft.saved import select_saved
from mcore_swift.recipe import AdapterSection, Recipe
from mcore_swift.training.adapters import _check_whole
from tests.distributed.harness import run_ranks
from tests.distributed.rank_model import assert_close, micro_batches, model_logits, open_model, recipe_for
from tests.peft.peft_run import loss_of
from tests.peft.test_lora import LAYOUTS, adapter_at, lora_run, reference_run, write_rank

TARGETS = ["q_proj", "v_proj", "up_proj"]
SAVED = ["embed_tokens", "lm_head", "model.norm", "layers.1.post_attention_layernorm", "layers.2.self_attn.q_norm"]
TENSORS = {
    "lm_head.weight",
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.layers.1.post_attention_layernorm.weight",
    "model.layers.2.self_attn.q_norm.weight",
}


def saved_folder(model: Path) -> Path:
    """A PEFT folder made by PEFT, with random adapters and saved modules that differ from the base's."""
    folder = model.parent / f"{model.name}-saved"
    if not folder.exists():
        run_ranks(_make_folder, 1, model, folder)
    return folder


def _make_folder(model: Path, folder: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, modules_to_save=SAVED, task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif "modules_to_save" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)


@functools.cache
def expected(model: Path, folder: Path) -> Any:
    loss, *tensors = run_ranks(reference_run, 1, model, folder, 1.0)[0]
    return loss, *({name.replace("modules_to_save.", ""): t for name, t in own.items()} for own in tensors)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, marks=pytest.mark.slow if layout in ("TP2+SP", "PP2") else pytest.mark.nightly)
        for layout in LAYOUTS
    ],
)
def test_as_peft(models: Any, layout: str) -> None:
    """Loss, gradients and three steps; the vocabulary of 101 is padded for TP2."""
    model = models("qwen3")
    folder = saved_folder(model)
    loss, gradients, trained = expected(model, folder)
    assert set(gradients) > TENSORS
    losses, found, then = lora_run(model, folder, LAYOUTS[layout])
    assert losses[0] == pytest.approx(loss, rel=1e-6)
    assert_close(found, gradients)
    assert_close(then, trained)


@pytest.mark.slow
def test_folders_that_are_written(models: Any, tmp_path: Path) -> None:
    """Read and written at TP2 x PP2: PEFT's tensors again, PEFT opens it; the merged folder gives what PEFT gives."""
    model = models("qwen3")
    folder = saved_folder(model)
    run_ranks(write_rank, 4, recipe_for(model, LAYOUTS["TP2xPP2"], adapter=adapter_at(folder)), tmp_path)
    ours, theirs = (load_file(place / "adapter_model.safetensors") for place in (tmp_path / "adapter", folder))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert {f"{name}.weight" for name in config["modules_to_save"]} == TENSORS
    losses = run_ranks(_losses, 1, model, tmp_path / "hf", folder, tmp_path / "adapter")[0]
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-6)


def _losses(model: Path, merged: Path, *folders: Path) -> list[float]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def opened(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    found = [opened(merged), *(PeftModel.from_pretrained(opened(model), str(folder)) for folder in folders)]
    with torch.no_grad():
        return [float(loss_of(one.eval(), 101)) for one in found]


def disabled_rank(recipe: Recipe) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    from mcore_swift.peft import adapters

    model = open_model(recipe)
    batches = micro_batches(recipe, model.source.vocab_size, parallel.ranks())
    with torch.no_grad():
        before = model_logits(model, batches)
        with adapters.disabled(model.models):
            disabled = model_logits(model, batches)
        return before, disabled, model_logits(model, batches)


@pytest.mark.slow
def test_disabled_modules_are_the_base_s(models: Any) -> None:
    model = models("qwen3")
    recipe = recipe_for(model, LAYOUTS["PP2"], adapter=adapter_at(saved_folder(model)))
    before, disabled, after = run_ranks(disabled_rank, 2, recipe)[1]
    plain, *_ = run_ranks(_base_rank, 2, replace(recipe, adapter=AdapterSection()))[1:]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(disabled, plain, strict=True))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(after, before, strict=True))
    assert not any(torch.allclose(ours, theirs, rtol=0.1) for ours, theirs in zip(before, plain, strict=True))


def _base_rank(recipe: Recipe) -> list[torch.Tensor]:
    model = open_model(recipe)
    with torch.no_grad():
        return model_logits(model, micro_batches(recipe, model.source.vocab_size, parallel.ranks()))


@pytest.mark.parametrize(
    ("variant", "names", "message"),
    [
        ("qwen3", ["lm_heat"], "'lm_heat' matches no module of this model; Did you mean 'lm_head'"),
        ("qwen3", ["q_proj"], "model.layers.0.self_attn.q_proj has an adapter already"),
        ("qwen3", ["k_proj"], "model.layers.0.self_attn.k_proj is a part of one tensor in Megatron-Core"),
        ("qwen3-tied", ["lm_head"], "lm_head: this model's output layer is its embedding"),
        ("qwen3-tied", ["model.embed_tokens"], "model.embed_tokens: this model's output layer is its embedding"),
        ("deepseek-v3", ["embed_tokens"], "model.embed_tokens is shared with the layers of multi-token prediction"),
    ],
)
def test_refused(models: Any, variant: str, names: list[str], message: str) -> None:
    rules = weight_rules(read_source(models(variant)))
    with pytest.raises(InputError, match=f"adapter.modules_to_save: .*{message}"):
        select_saved(names, rules, adapted={"model.layers.0.self_attn.q_proj"})


def test_what_is_held_in_four_bits_is_not_trained(models: Any) -> None:
    rules = weight_rules(read_source(models("qwen3")))
    from mcore_swift.peft.lora import LoraSettings

    settings = LoraSettings(rank=4, alpha=8, modules_to_save=("norm", "lm_head"))
    _check_whole(settings, rules)
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.o_proj: its weight is not held in full"):
        _check_whole(replace(settings, modules_to_save=("norm", "o_proj")), rules)
