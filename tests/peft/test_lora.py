"""LoRA and its relatives against PEFT: the same loss, adapter gradients and optimizer steps at every layout.

PEFT makes the adapters (random A and B, so that no gradient vanishes), and its folder is read at the layout under test.
"""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mcore_swift import parallel
from mcore_swift.objectives.registry import OBJECTIVES
from mcore_swift.recipe import AdapterSection, ParallelSection, Recipe
from tests.distributed.harness import run_ranks
from tests.distributed.rank_model import (
    CPU,
    STEPS,
    assert_close,
    merge,
    micro_batches,
    open_model,
    recipe_for,
)
from tests.peft.method_run import adapter_rank
from tests.peft.peft_run import LEARNING_RATE, loss_of, peft_steps

LAYOUTS = {
    "one rank": ParallelSection(),
    "TP2": ParallelSection(tp=2, sequence_parallel=False),
    "TP2+SP": ParallelSection(tp=2),
    "PP2": ParallelSection(pp=2),
    "DP2": ParallelSection(dp=2),
    "CP2": ParallelSection(cp=2),
    "TP2xPP2": ParallelSection(tp=2, pp=2),
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}


# --- PEFT -------------------------------------------------------------------------------------------------------------


def peft_folder(model: Path, folder: Path, method: str, targets: tuple[str, ...]) -> Path:
    """A PEFT folder with random adapters, made by PEFT in a process of its own; used again when it is there."""
    if not folder.exists():
        run_ranks(_make_peft_folder, 1, model, folder, METHODS[method], targets)
    return folder


def _make_peft_folder(model: Path, folder: Path, method: dict[str, Any], targets: tuple[str, ...]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=list(targets), task_type="CAUSAL_LM", **method)
    adapted: Any = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)


def reference_run(
    model: Path, folder: Path, ratio: float
) -> tuple[float, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Loss and adapter gradients by PEFT in float64, each document alone; and the adapters after three AdamW steps.

    `ratio`: LoRA+'s, of the B matrices' learning rate to that of the others.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, attn_implementation="eager")
    adapted: Any = PeftModel.from_pretrained(base, str(folder), is_trainable=True).double().eval()
    return peft_steps(adapted, base.config.vocab_size, ratio=ratio)


@functools.cache
def expected(model: Path, folder: Path, ratio: float = 1.0) -> Any:
    return run_ranks(reference_run, 1, model, folder, ratio)[0]


# --- here -------------------------------------------------------------------------------------------------------------


def lora_run(model: Path, folder: Path, layout: ParallelSection, *, ratio: float = 1.0) -> Any:
    adapter = AdapterSection(name="lora", path=str(folder), learning_rate_ratio=ratio)
    wanted = recipe_for(model, layout, adapter=adapter, learning_rate=LEARNING_RATE)
    ranks = run_ranks(adapter_rank, parallel.resolve(layout, world_size=None).world_size, wanted)
    return ranks[0][0], merge([rank[1] for rank in ranks]), merge([rank[2] for rank in ranks])


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SOME = ("q_proj", "v_proj", "up_proj", "down_proj")


TARGETS = {"qwen2-tied": SOME, "qwen3": ALL, "llama-biases": ALL}
QUICK = {("qwen3", "lora", "TP2+SP")}
SLOW = {
    ("qwen2-tied", "rslora", "PP2"),
    ("qwen3", "lora", "CP2"),
}


def marked(case: tuple[str, ...]) -> Any:
    marks = () if case in QUICK else pytest.mark.slow if case in SLOW else pytest.mark.nightly
    return pytest.param(*case, marks=marks, id="-".join(case))


@pytest.mark.parametrize(
    ("variant", "method", "layout"), [marked(case) for case in itertools.product(TARGETS, METHODS, LAYOUTS)]
)
def test_as_peft(models: Any, variant: str, method: str, layout: str) -> None:
    model = models(variant)
    folder = peft_folder(model, model.parent / f"{variant}-{method}", method, TARGETS[variant])
    loss, gradients, trained = expected(model, folder)
    losses, found, then = lora_run(model, folder, LAYOUTS[layout])
    assert losses[0] == pytest.approx(loss, rel=1e-6)
    assert_close(found, gradients)
    assert_close(then, trained)


def everywhere(slow: tuple[str, str]) -> list[Any]:
    """Each family at each layout; one case is not nightly."""
    return [
        pytest.param(*case, marks=pytest.mark.slow if case == slow else pytest.mark.nightly, id="-".join(case))
        for case in itertools.product(TARGETS, LAYOUTS)
    ]


@pytest.mark.parametrize(("variant", "layout"), everywhere(slow=("qwen3", "DP2")))
def test_lora_plus(models: Any, variant: str, layout: str) -> None:
    model = models(variant)
    folder = peft_folder(model, model.parent / f"{variant}-lora", "lora", TARGETS[variant])
    _, _, trained = expected(model, folder, ratio=8.0)
    _, _, found = lora_run(model, folder, LAYOUTS[layout], ratio=8.0)
    assert_close(found, trained)
    _, _, plain = expected(model, folder)
    assert not all(torch.allclose(plain[name], trained[name], rtol=1e-4) for name in trained)


@pytest.mark.slow
def test_written_folder_is_the_read_one(models: Any, tmp_path: Path) -> None:
    model = models("qwen3")
    folder = peft_folder(model, model.parent / "qwen3-dora", "dora", ALL)
    run_ranks(save_rank, 4, recipe_for(model, LAYOUTS["TP2xPP2"], adapter=adapter_at(folder)), tmp_path / "out")
    ours, theirs = (load_file(place / "adapter_model.safetensors") for place in (tmp_path / "out", folder))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = (json.loads((place / "adapter_config.json").read_text()) for place in (tmp_path / "out", folder))
    assert {key: ours[key] for key in ("r", "lora_alpha", "use_dora")} == {"r": 4, "lora_alpha": 6, "use_dora": True}
    assert sorted(ours["target_modules"]) == sorted(theirs["target_modules"])


def adapter_at(folder: Path) -> AdapterSection:
    return AdapterSection(name="lora", path=str(folder))


def save_rank(recipe: Recipe, folder: Path) -> None:
    from mcore_swift.peft import peft_folder
    from mcore_swift.training.adapters import settings_of

    model = open_model(recipe)
    settings, _ = settings_of(recipe.adapter, seed=0)
    peft_folder.save(model.chunks, model.rules, folder, settings, base=recipe.model.path)


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_merged_folder_gives_what_peft_gives(models: Any, tmp_path: Path, method: str) -> None:
    """PEFT's adapters, read at TP2 x PP2 and merged there, against transformers with PEFT's adapters on."""
    model = models("qwen3")
    folder = peft_folder(model, model.parent / f"qwen3-{method}", method, ALL)
    run_ranks(write_rank, 4, recipe_for(model, LAYOUTS["TP2xPP2"], adapter=adapter_at(folder)), tmp_path)
    merged, adapted = run_ranks(_logits, 1, tmp_path / "hf", model, folder)[0]
    assert (merged - adapted).abs().max() <= 1e-5 * adapted.abs().max()


def write_rank(recipe: Recipe, folder: Path) -> None:
    from mcore_swift.training import adapters

    adapters.write(recipe, open_model(recipe), folder)


def _logits(merged: Path, model: Path, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(40).view(2, 20)
    plain: Any = AutoModelForCausalLM.from_pretrained(merged)
    base: Any = AutoModelForCausalLM.from_pretrained(model)
    adapted: Any = PeftModel.from_pretrained(base, str(folder))
    with torch.no_grad():
        return plain(tokens).logits, adapted(tokens).logits


def pissa_rank(recipe: Recipe, folder: Path) -> list[float]:
    from mcore_swift.training import adapters, step
    from mcore_swift.training.optimizer import set_learning_rate

    model = open_model(recipe)
    batches = micro_batches(recipe, model.source.vocab_size, parallel.ranks())
    set_learning_rate(model.optimizer, 1e-2, 0.0)
    losses = [
        step.train_step(model.models, model.optimizer, batches, OBJECTIVES["sft"], CPU).loss for _ in range(STEPS)
    ]
    model.sync_parameters()
    adapters.write(recipe, model, folder)
    return losses


@pytest.mark.parametrize(("variant", "layout"), everywhere(slow=("qwen3", "TP2+SP")))
def test_pissa(models: Any, tmp_path: Path, variant: str, layout: str) -> None:
    """It starts where the model stands, as PEFT's does; its folder fits the model as it was; merging gives the same.

    Singular vectors' signs are free, so what is compared is the losses of the steps.
    """
    model = models(variant)
    adapter = AdapterSection(name="lora", rank=4, alpha=6, targets=["all-linear"], init="pissa")
    recipe = recipe_for(model, LAYOUTS[layout], adapter=adapter)
    losses = run_ranks(pissa_rank, parallel.resolve(recipe.parallel, world_size=None).world_size, recipe, tmp_path)[0]
    assert losses == pytest.approx(peft_pissa(model), rel=1e-5)
    assert losses[-1] < losses[0]
    merged, adapted = run_ranks(_logits, 1, tmp_path / "hf", model, tmp_path / "adapter")[0]
    assert (merged - adapted).abs().max() <= 1e-5 * adapted.abs().max()


@functools.cache
def peft_pissa(model: Path) -> list[float]:
    return run_ranks(_peft_pissa, 1, model)[0]


def _peft_pissa(model: Path) -> list[float]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    config = LoraConfig(r=4, lora_alpha=6, target_modules=list(ALL), task_type="CAUSAL_LM", init_lora_weights="pissa")
    adapted: Any = get_peft_model(base, config).eval()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(adapted, base.config.vocab_size)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.1)
        optimizer.step()
        losses.append(float(loss))
    return losses


def swift_rank(recipe: Recipe, folder: Path) -> tuple[Any, int, str]:
    """From Python, without a recipe's adapter section."""
    import contextlib
    import io

    from mcore_swift import LoRAConfig, Swift
    from mcore_swift.models.build import build_chunks, read_source, transformer_config
    from mcore_swift.weights import live
    from mcore_swift.weights.safetensors_io import SafetensorsFolder
    from tests.distributed.harness import prepared

    plan = parallel.resolve(recipe.parallel, world_size=None)
    parallel.initialize(plan, prepared(), seed=1)
    source = read_source(Path(recipe.model.path))
    config = transformer_config(source, plan, prepared(), dtype=torch.float32)
    chunks = build_chunks(source, config, plan, prepared())
    live.load(chunks, chunks[0].tensor_rules, SafetensorsFolder(source.folder), tied=source.tied)
    wanted = LoRAConfig(rank=8, target_modules=["q_proj", "v_proj"])
    model = Swift.prepare_model(chunks, wanted)
    Swift.save_pretrained(model, folder, wanted, base=recipe.model.path)
    names = [name for chunk in chunks for name, p in chunk.named_parameters() if p.requires_grad]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        Swift.print_trainable_parameters(model)
    return sorted(load_file(folder / "adapter_model.safetensors")), len(names), said.getvalue()


@pytest.mark.slow
def test_from_python(models: Any, tmp_path: Path) -> None:
    """`prepare_model` in PEFT's manner; the first A is the same at every layout, and is what PEFT's folder holds."""
    model = models("qwen3")
    recipes = [recipe_for(model, LAYOUTS[layout]) for layout in ("one rank", "TP2xPP2")]
    found = [run_ranks(swift_rank, 4 if number else 1, r, tmp_path / str(number)) for number, r in enumerate(recipes)]
    names, trained, said = found[0][0]
    assert trained == len(names) == 4 * 2 * 2 and found[1][0][0] == names
    assert sum(rank[1] for rank in found[1]) == 2 * trained  # two TP ranks of each stage
    whole = sum(tensor.numel() for tensor in load_file(model / "model.safetensors").values())
    added = 4 * 8 * (64 + 96 + 64 + 48)
    shown = f"trainable parameters: {added:,} of {whole + added:,} ({added / (whole + added):.4%})"
    assert said.split() == shown.split()
    assert found[1][0][2] == said
    one, four = (load_file(tmp_path / str(number) / "adapter_model.safetensors") for number in range(2))
    assert all(torch.equal(one[name], four[name]) for name in names)
