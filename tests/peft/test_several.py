"""Several adapters on one base, each row of a batch through its own: what PEFT gives with each of them alone."""

from __future__ import annotations

import functools
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mcore_swift import parallel
from mcore_swift.errors import InputError
from mcore_swift.objectives.registry import OBJECTIVES
from mcore_swift.recipe import AdapterSection, NamedAdapter, ParallelSection, Recipe, RuntimeSection
from tests.distributed.harness import run_ranks
from tests.distributed.rank_model import (
    CPU,
    assert_close,
    documents,
    gather_gradient_shards,
    merge,
    micro_batches,
    model_logits,
    open_model,
    recipe_for,
)
from tests.peft.peft_run import plain
from tests.peft.test_lora import ALL, LAYOUTS, write_rank

# They differ in everything that an adapter of its own may differ in.
ADAPTERS: dict[str, dict[str, Any]] = {
    "math": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "code": {"r": 3, "lora_alpha": 5, "target_modules": list(ALL), "use_rslora": True},
    "chat": {"r": 2, "lora_alpha": 4, "target_modules": ["k_proj", "o_proj", "down_proj"], "use_dora": True},
}


def folders(model: Path) -> dict[str, Path]:
    """PEFT folders with random adapters, made by PEFT."""
    found = {name: model.parent / f"{model.name}-{name}" for name in ADAPTERS}
    if not all(folder.exists() for folder in found.values()):
        run_ranks(_make_folders, 1, model, found)
    return found


def _make_folders(model: Path, places: dict[str, Path]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(3)
    for name, folder in places.items():
        base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        adapted: Any = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **ADAPTERS[name]))
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if "lora_A" in key or "lora_B" in key:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
                elif "magnitude" in key:
                    parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
        adapted.save_pretrained(folder)


def _alone(model: Path, places: dict[str, Path]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by PEFT in float64, each document alone, through a model with its one adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    total, gradients = 0.0, {}
    for number, (name, folder) in enumerate(places.items()):
        base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, attn_implementation="eager")
        adapted: Any = PeftModel.from_pretrained(base, str(folder), is_trainable=True).double().eval()
        texts = documents(base.config.vocab_size)
        count = sum(int(loss[1:].sum()) for _, loss in texts)
        for tokens, loss in texts[number :: len(places)]:
            inputs = torch.from_numpy(tokens).long()
            logps = adapted(inputs[None]).logits[0, :-1].log_softmax(-1)
            value = -(logps.gather(1, inputs[1:, None])[:, 0] * torch.from_numpy(loss[1:])).sum() / count
            value.backward()
            total += float(value)
        gradients |= {
            f"{name} {plain(key)}": p.grad.clone() for key, p in adapted.named_parameters() if p.grad is not None
        }
    return total, gradients


@functools.cache
def alone(model: Path) -> Any:
    return run_ranks(_alone, 1, model, folders(model))[0]


def recipe_with(model: Path, layout: str | ParallelSection, **changes: Any) -> Recipe:
    several = {name: NamedAdapter(path=str(folder)) for name, folder in folders(model).items()}
    adapter = AdapterSection(name="lora", several=several, merge=False)
    section = LAYOUTS[layout] if isinstance(layout, str) else layout
    return recipe_for(model, section, adapter=adapter, **changes)


def mixed_rank(recipe: Recipe) -> tuple[float, dict[str, torch.Tensor]]:
    from mcore_swift.peft.peft_folder import whole_tensors
    from mcore_swift.training import step

    model = open_model(recipe)
    batches = micro_batches(recipe, model.source.vocab_size, parallel.ranks(), adapters=len(ADAPTERS))
    assert any(len(batch.adapter.unique()) == 3 for batch in batches if batch.adapter is not None)
    gradients: dict[str, torch.Tensor] = {}
    take_step = model.optimizer.step

    def look_and_step() -> Any:
        gather_gradient_shards(model.models)
        for name in ADAPTERS:
            found = whole_tensors(model.chunks, name, value=attrgetter("main_grad"))
            gradients.update({f"{name} {key}": tensor.clone() for key, tensor in found})
        return take_step()

    model.optimizer.step = look_and_step
    return step.train_step(model.models, model.optimizer, batches, OBJECTIVES["sft"], CPU).loss, gradients


CASES = [
    ("one rank", True, "none"),
    ("one rank", False, "full"),
    ("TP2+SP", True, "full"),
    ("TP2+SP", False, "none"),
    ("PP2", True, "full"),
    ("PP2", False, "none"),
    ("TP2", True, "none"),
    ("TP2xPP2", True, "full"),
    ("CP2", True, "none"),
    ("DP2", False, "none"),
]
SLOW = [("TP2+SP", True, "full"), ("PP2", True, "full"), ("one rank", False, "full")]


@pytest.mark.parametrize(
    ("layout", "packing", "recompute"),
    [pytest.param(*case, marks=pytest.mark.slow if case in SLOW else pytest.mark.nightly) for case in CASES],
)
def test_mixed_batches_as_each_alone(models: Any, layout: str, packing: bool, recompute: str) -> None:
    """Loss and all gradients. Recomputation in a pipeline: backward passes come between other micro-batches' forward
    passes, and layers that are computed again must take their own micro-batch's routes."""
    model = models("qwen3")
    runtime = RuntimeSection(device="cpu", recompute=recompute)  # type: ignore[arg-type]
    recipe = recipe_with(model, layout, packing=packing, runtime=runtime, micro_batch_size=2 if packing else 4)
    ranks = run_ranks(mixed_rank, parallel.resolve(recipe.parallel, world_size=None).world_size, recipe)
    loss, gradients = alone(model)
    assert ranks[0][0] == pytest.approx(loss, rel=1e-6)
    assert_close(merge([rank[1] for rank in ranks]), gradients)


def switched_rank(recipe: Recipe) -> tuple[list[Any], list[torch.Tensor], dict[str, list[torch.Tensor]]]:
    """Logits of mixed batches, and of the same batches with one adapter after the other."""
    from mcore_swift.peft import adapters

    model = open_model(recipe)
    batches = micro_batches(recipe, model.source.vocab_size, parallel.ranks(), adapters=len(ADAPTERS))
    plain = [replace(batch, adapter=None) for batch in batches]
    with torch.no_grad():
        mixed, own = model_logits(model, batches), {}
        for name in ADAPTERS:
            adapters.activate(model.chunks, name)
            trained = {t.adapter for c in model.chunks for t in c.adapters.tensors() if t.parameter.requires_grad}
            assert trained == {name}
            own[name] = model_logits(model, plain)
    return [batch.adapter for batch in batches], mixed, own


@pytest.mark.slow
def test_sample_by_sample(models: Any) -> None:
    recipe = recipe_with(models("qwen3"), "TP2+SP")
    routes, mixed, own = run_ranks(switched_rank, 2, recipe)[0]
    for number, name in enumerate(ADAPTERS):
        for route, logits, one in zip(routes, mixed, own[name], strict=True):
            here = route == number
            assert (logits - one)[here].abs().max() <= 1e-5 * one.abs().max()
            assert here.all() or (logits - one)[~here].abs().max() > 1e-2 * one.abs().max()


@pytest.mark.slow
def test_each_is_written_to_its_own_folder(models: Any, tmp_path: Path) -> None:
    model = models("qwen3")
    run_ranks(write_rank, 4, recipe_with(model, "TP2xPP2"), tmp_path)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == sorted(ADAPTERS)
    for name, folder in folders(model).items():
        ours, theirs = (
            load_file(place / "adapter_model.safetensors") for place in (tmp_path / "adapter" / name, folder)
        )
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert not (tmp_path / "hf").exists()


def experts_rank(recipe: Recipe) -> str:
    with pytest.raises(InputError) as caught:
        open_model(recipe)
    return str(caught.value)


def experts_from_python_rank(recipe: Recipe) -> str:
    from mcore_swift import LoRAConfig, Swift

    chunks = open_model(recipe).chunks
    Swift.prepare_model(chunks, LoRAConfig(rank=4, target_modules=["experts"]))
    with pytest.raises(InputError) as caught, Swift.mixed_batch(chunks, torch.zeros(1, 8, dtype=torch.int64)):
        pass
    return str(caught.value)


@pytest.mark.slow
def test_adapters_on_experts_are_not_mixed(models: Any) -> None:
    model = models("qwen3-moe")
    several = {"a": NamedAdapter(targets=["attention"]), "b": NamedAdapter(targets=["experts"])}
    adapter = AdapterSection(name="lora", rank=4, several=several, merge=False)
    said = run_ranks(experts_rank, 1, recipe_for(model, adapter=adapter))[0]
    assert said.startswith("adapter.several.b: model.layers.0.mlp.experts.0.gate_proj is one of the experts")
    said = run_ranks(experts_from_python_rank, 1, recipe_for(model))[0]
    assert said.startswith("adapters on experts (model.layers.0.mlp.experts.0.gate_proj) can't be mixed in one batch")


def api_rank(recipe: Recipe) -> list[str]:
    """From Python, in PEFT's manner."""
    from mcore_swift import LoRAConfig, Swift
    from mcore_swift.peft.adapters import Adapters

    model = open_model(recipe)
    Swift.prepare_model(model.chunks, LoRAConfig(rank=4, target_modules=["q_proj"]))
    Swift.add_adapter(model.chunks, "other", LoRAConfig(rank=2, target_modules=["mlp"]))
    said = []
    for wrong in (
        lambda: Swift.add_adapter(model.chunks, "other", LoRAConfig()),
        lambda: Swift.add_adapter(model.chunks, "a/b", LoRAConfig()),
        lambda: Swift.add_adapter(model.chunks, "third", LoRAConfig(modules_to_save=["norm"])),
        lambda: Swift.set_adapter(model.chunks, "third"),
    ):
        with pytest.raises(InputError) as caught:
            wrong()
        said.append(str(caught.value))
    (chunk,) = model.chunks
    assert isinstance(chunk.adapters, Adapters) and chunk.adapters.active == "default"
    for tensor in chunk.adapters.tensors():
        torch.nn.init.normal_(tensor.parameter, std=0.3)
    tokens, positions = torch.arange(12).view(2, 6), torch.arange(6).expand(2, 6)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return chunk(tokens, positions, None)

    first = logits()
    Swift.set_adapter(chunk, "other")
    second = logits()
    with Swift.disable_adapter(chunk):
        base = logits()
    with Swift.mixed_batch(chunk, torch.tensor([[1] * 6, [-1] * 6])):
        mixed = logits()
    torch.testing.assert_close(mixed, torch.stack([second[0], base[1]]), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(), second) and not torch.allclose(first, second, rtol=0.1)
    return said


def test_from_python(models: Any) -> None:
    said = run_ranks(api_rank, 1, recipe_for(models("qwen3")))[0]
    assert said == [
        "adapter 'other': there is one of that name already",
        "adapter 'a/b': its name may have letters, digits, _ and - only (it names a folder)",
        "adapter 'third': modules_to_save changes the model that 'default' stands on; only the first adapter of a model"
        " can have it",
        "adapter 'third': there is none of that name; there are: default, other",
    ]
