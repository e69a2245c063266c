"""Converted checkpoints load in plain Megatron-Core and in our trainer, and what those save converts back."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ckpt_tools.convert import convert
from ckpt_tools.source import open_source, read_whole
from mcore_swift import parallel
from mcore_swift.recipe import ModelSection
from tests.distributed.harness import prepared, run_ranks
from tests.distributed.rank_model import hf_copies, merge, recipe_for
from tests.distributed.tiny_models import tiny_folder, tiny_model
from tests.training.checkpoint_run import layout, save_rank, with_checkpoints

VARIANTS = ("llama", "qwen2-tied", "qwen3", "qwen3-moe")
TOKENS = torch.arange(40).view(2, 20) * 7 % 101

pytestmark = pytest.mark.slow  # models are built at several layouts


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hugging Face folders and, beside each, its Megatron checkpoint."""
    prepared()
    home = tmp_path_factory.mktemp("models")
    found = {name: tiny_folder(home / name, name) for name in VARIANTS}
    found["experts-only"] = tiny_folder(home / "experts-only", "qwen3-moe", mlp_only_layers=[])  # layers can be stacked
    for name, folder in found.items():
        convert(folder, home / f"{name}-megatron", workers=1)
    return found


def nightly(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.nightly)


def checkpoint_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-megatron")


@pytest.mark.parametrize(
    ("variant", "tp", "pp", "ep"),
    [
        ("llama", 2, 2, 1),
        ("qwen2-tied", 1, 1, 1),
        ("qwen3-moe", 1, 1, 2),
        *(
            nightly("llama", 1, 1, 1),
            nightly("qwen2-tied", 2, 2, 1),
            nightly("qwen3", 1, 1, 1),
            nightly("qwen3", 2, 2, 1),
        ),
        *(nightly("qwen3-moe", 1, 1, 1), nightly("qwen3-moe", 1, 2, 2)),
    ],
)
def test_plain_megatron_core_gives_transformers_logits(
    models: dict[str, Path], variant: str, tp: int, pp: int, ep: int
) -> None:
    folder = models[variant]
    with torch.no_grad():
        expected = tiny_model(variant)(TOKENS).logits
    hf = json.loads((folder / "config.json").read_text())
    results = run_ranks(plain_logits, tp * pp * ep, checkpoint_of(folder), hf, tp, pp, ep)
    found = [result for result in results if result is not None]
    assert len(found) == tp * ep
    for logits in found:
        assert float((logits - expected).abs().max() / expected.abs().max()) <= 1e-5


def plain_logits(checkpoint: Path, hf: dict[str, Any], tp: int, pp: int, ep: int) -> torch.Tensor | None:
    from tests.ckpt_tools.plain_megatron import logits

    return logits(checkpoint, hf, TOKENS, tp, pp, ep)


def parameters(recipe: Any) -> dict[str, torch.Tensor]:
    """What our trainer holds after loading, under Hugging Face names; of one rank."""
    from mcore_swift.training import setup
    from mcore_swift.training.run import model_source

    plan = parallel.resolve(recipe.parallel, world_size=int(os.environ["WORLD_SIZE"]))
    platform = prepared()
    parallel.initialize(plan, platform, seed=1)
    return dict(hf_copies(setup.build(recipe, model_source(recipe), plan, platform), lambda parameter: parameter.data))


@pytest.mark.parametrize(
    ("variant", "place"),
    [
        ("qwen3", "TP1"),
        ("qwen3", "TP2 PP2"),
        ("qwen2-tied", "TP1"),
        ("qwen2-tied", "TP2 PP2"),
        ("qwen3-moe", "EP2 DP2"),
        ("qwen3-moe", "EP2 TP2 ETP1 PP2"),
        ("qwen3-moe", "EP2 TP2 DP2"),  # experts cut by ETP2
    ],
)
def test_our_trainer_loads_it_at_any_layout(models: dict[str, Path], variant: str, place: str) -> None:
    folder = models[variant]
    recipe = recipe_for(folder, layout(place))
    recipe = replace(recipe, model=ModelSection(path=str(checkpoint_of(folder))))
    world_size = parallel.resolve(recipe.parallel, world_size=None).world_size
    found = merge(run_ranks(parameters, world_size, recipe))
    expected = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("variant", "place"), [("qwen2-tied", "TP2 PP2"), ("qwen2-tied", "DP2"), ("qwen3-moe", "EP2 DP2")]
)
def test_what_our_trainer_saves_converts_back(
    models: dict[str, Path], tmp_path: Path, variant: str, place: str
) -> None:
    recipe = with_checkpoints(recipe_for(models[variant], layout(place)), tmp_path / "run")
    world_size = parallel.resolve(recipe.parallel, world_size=None).world_size
    shards = [shard for rank in run_ranks(save_rank, world_size, recipe, 1, 0) for shard in rank[0]]
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    report = convert(checkpoint, tmp_path / "hf", workers=2)
    assert report.left_aside >= 2 * report.bytes_written  # Adam's two moments, float32 as the weights are
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert found.keys() == load_file(models[variant] / "model.safetensors").keys()
    compared = 0
    for key, _, offset, data in shards:  # what the ranks held, against the same tensor read back through the rules
        if key.endswith("linear_proj.weight") and not key.startswith("optimizer"):
            i = int(key.split(".")[2])
            whole = found[f"model.layers.{i}.self_attn.o_proj.weight"]
            assert torch.equal(whole[tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))], data)
            compared += 1
        if key.endswith("experts.linear_fc2.weight") and not key.startswith("optimizer"):
            down = found[f"model.layers.{key.split('.')[2]}.mlp.experts.{offset[0]}.down_proj.weight"]
            assert torch.equal(down, data[0] if data.dim() == 3 else data)
            compared += 1
        if key == "embedding.word_embeddings.weight":
            rows = min(data.size(0), 101 - offset[0])
            assert torch.equal(found["model.embed_tokens.weight"][offset[0] : offset[0] + rows], data[:rows])
            compared += 1
    assert compared >= 5
    again = convert(tmp_path / "hf", tmp_path / "again", workers=1)
    assert again.tensors == len(open_source(checkpoint).stored)
    report = convert(checkpoint, tmp_path / "all", workers=2, optimizer=True)
    assert report.left_aside == 0
    check_optimizer(shards, tmp_path / "all", expected=found)


def check_optimizer(shards: list[Any], folder: Path, *, expected: dict[str, torch.Tensor]) -> None:
    """The weights are there as without the optimizer, and what it holds of attention's output as the ranks hold it."""
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)
    assert sorted(path.name for path in (folder / "optimizer").iterdir()) == ["exp_avg", "exp_avg_sq"]
    compared = 0
    for state in ("exp_avg", "exp_avg_sq"):
        found = load_file(folder / "optimizer" / state / "model.safetensors")
        assert found.keys() == expected.keys() and all(found[name].shape == expected[name].shape for name in found)
        prefix = f"optimizer.state.{state}.decoder.layers."
        for key, _, offset, data in shards:
            if key.startswith(prefix) and key.endswith("linear_proj.weight"):
                whole = found[f"model.layers.{key.removeprefix(prefix).split('.')[0]}.self_attn.o_proj.weight"]
                part = whole[tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))]
                assert torch.equal(part, data) and data.any()
                compared += 1
    assert compared >= 4


# --- what other programs write ----------------------------------------------------------------------------------------


def save_plain(folder: Path, source: Path, prefix: str, stacked: bool, local_norms: bool) -> None:
    """Saves the model as Megatron-LM would: keys with a prefix, layers stacked, the local spec's names, padding."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    dist.init_process_group("gloo")
    opened = open_source(source)
    tensors: dict[str, torch.Tensor] = {}
    converted = open_source(checkpoint_of(source))
    for key, stored in converted.stored.items():
        value = read_whole(stored)
        if "word_embeddings" in key or "output_layer" in key:
            value = torch.cat([value, torch.full((27, value.size(1)), 9.0)])
        if local_norms:
            key = key.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
            norms = ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")  # experts' norms the other way round
            key = next((key.replace(old, new) for old, new in (norms, norms[::-1]) if old in key), key)
        tensors[key] = value
    if stacked:
        layers = opened.model.config.num_hidden_layers
        names = [key.removeprefix("decoder.layers.0.") for key in tensors if key.startswith("decoder.layers.0.")]
        for name in names:
            values = [tensors.pop(f"decoder.layers.{i}.{name}") for i in range(layers)]
            tensors[f"decoder.layers.{name}"] = torch.stack(values)
    state = {prefix + key: list(sharded(prefix + key, value)) for key, value in tensors.items()}
    moment = ShardedTensor.from_rank_offsets("optimizer.state.exp_avg.x", torch.zeros(3))
    folder.mkdir(parents=True)
    dist_checkpointing.save({"state": state, "optimizer": moment, "iteration": 7}, str(folder))


def sharded(key: str, value: torch.Tensor) -> Iterator[Any]:
    """A tensor as Megatron shards it: each matrix of stacked layers or experts on its own."""
    from megatron.core.dist_checkpointing import ShardedTensor

    leading = max(value.dim() - 2, 0)
    for index in itertools.product(*(range(size) for size in value.shape[:leading])):
        place = [(axis, number, value.size(axis)) for axis, number in enumerate(index)]
        yield ShardedTensor.from_rank_offsets(key, value[index].contiguous(), *place, prepend_axis_num=leading)


@pytest.mark.parametrize(
    ("variant", "prefix", "stacked", "local_norms"),
    [
        nightly("qwen3", "model.", True, True),
        ("qwen3-moe", "", False, True),
        nightly("qwen3", "", False, True),
        nightly("qwen3", "model.", True, False),
        nightly("qwen3", "", True, False),
        nightly("experts-only", "model.", True, False),
        nightly("experts-only", "model.", True, True),
    ],
)
def test_megatron_lm_and_bridge_checkpoints(
    models: dict[str, Path], tmp_path: Path, variant: str, prefix: str, stacked: bool, local_norms: bool
) -> None:
    source = models[variant]
    run_ranks(save_plain, 1, tmp_path / "run" / "iter_0000007", source, prefix, stacked, local_norms)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("7\n")
    convert(tmp_path / "run", tmp_path / "hf", config=source, workers=1)
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", source))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
