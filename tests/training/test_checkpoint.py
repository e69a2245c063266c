"""Checkpoints come back bit for bit at any layout, and are copies of their moment."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mcore_swift.errors import InputError
from mcore_swift.parallel import resolve
from mcore_swift.recipe import AdapterSection, NamedAdapter, OptimizerSection, ParallelSection, Recipe
from mcore_swift.training.checkpoint_folder import check_adapter
from tests.distributed.harness import RankFailure, prepared, run_ranks
from tests.distributed.rank_model import open_model, recipe_for
from tests.training.checkpoint_run import (
    LOADER,
    Run,
    assemble,
    layout,
    load_rank,
    save_rank,
    saved_and_loaded,
    with_checkpoints,
)


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def nightly(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.nightly)


# --- same numbers -----------------------------------------------------------------------------------------------------

SAME = [
    ("DP2", "bf16", OptimizerSection()),
    nightly("TP2", "fp32", OptimizerSection(distributed=False)),
    slow("TP2 PP2", "fp32", OptimizerSection()),
    nightly("PP2 VPP2", "fp32", OptimizerSection(distributed=False)),
    nightly("DP2 PP2", "bf16", OptimizerSection()),
    nightly("TP2", "bf16", OptimizerSection(distributed=False)),
    nightly("DP2", "fp32", OptimizerSection(name="sgd", distributed=False)),
    nightly("CP2", "bf16", OptimizerSection()),
]


@pytest.mark.parametrize(("place", "dtype", "optimizer"), SAME, ids=lambda value: getattr(value, "name", str(value)))
def test_same_layout_goes_on_bit_for_bit(
    model_folder: Path, tmp_path: Path, place: str, dtype: Any, optimizer: OptimizerSection
) -> None:
    recipe = with_checkpoints(recipe_for(model_folder, layout(place), optimizer=optimizer, dtype=dtype), tmp_path)
    saved, loaded = saved_and_loaded(recipe, recipe)
    before, after = assemble([rank[0] for rank in saved]), assemble([rank[0] for rank in loaded])
    names = ["momentum_buffer"] if optimizer.name == "sgd" else ["exp_avg", "exp_avg_sq"]
    names += ["fp32_param"] if dtype == "bf16" else []
    weights = [key for key in before if not key.startswith("optimizer")]
    assert set(before) == set(weights) | {f"optimizer.state.{name}.{key}" for name in names for key in weights}
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    for old, new in zip(saved, loaded, strict=True):
        assert old[1] == new[1]  # random states
        assert old[2] == new[2]  # loss and gradient norm of the next steps
        assert asdict(new[3]) == {"step": 2, "loader": LOADER, "samples": 16}


OTHER = [
    nightly("TP2", True, "PP2", True),
    ("DP1", False, "DP2", True),
    slow("DP2 PP2", True, "TP2", False),
    nightly("DP2", True, "PP2 VPP2", True),
    nightly("DP4", True, "TP2 DP2", True),
    nightly("CP2", True, "DP1", True),
    slow("TP2", True, "CP2 DP2", True),
]


@pytest.mark.parametrize(("place", "distributed", "other", "then"), OTHER)
def test_another_layout_has_the_same_numbers(
    model_folder: Path, tmp_path: Path, place: str, distributed: bool, other: str, then: bool
) -> None:
    saving, loading = (
        with_checkpoints(recipe_for(model_folder, layout(p), optimizer=OptimizerSection(distributed=d)), tmp_path)
        for p, d in ((place, distributed), (other, then))
    )
    saved, loaded = saved_and_loaded(saving, loading)
    before, after = assemble([rank[0] for rank in saved]), assemble([rank[0] for rank in loaded])
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    np.testing.assert_allclose(loaded[0][2], saved[0][2], rtol=1e-5)


BOTTLENECK, REFT = {"name": "bottleneck", "rank": 4}, {"name": "reft", "rank": 4, "layers": [1, 3]}


@pytest.mark.parametrize(
    ("method", "other"),
    [
        nightly({}, "TP2 PP2"),
        nightly({}, "DP1"),
        nightly({"init": "pissa"}, "DP1"),
        nightly({"init": "pissa"}, "TP2 PP2"),
        nightly({"dora": True}, "TP2 PP2"),
        nightly({"dora": True}, "DP1"),
        slow({"modules_to_save": ["norm", "input_layernorm", "o_proj"], "targets": ["q_proj"]}, "TP2 PP2"),
        nightly({"modules_to_save": ["norm", "input_layernorm", "o_proj"], "targets": ["q_proj"]}, "DP1"),
        nightly({"share_a": True, "dora": True}, "DP1"),
        nightly({"several": {"a": NamedAdapter(rank=2), "b": NamedAdapter(dora=True, targets=["mlp"])}}, "DP1"),
        *(nightly(method, other) for method in (BOTTLENECK, REFT) for other in ("TP2 PP2", "DP2")),
    ],
)
def test_adapters_alone_are_saved_and_go_on(
    model_folder: Path, tmp_path: Path, method: dict[str, Any], other: str
) -> None:
    lora: dict[str, Any] = {"name": "lora", "rank": 4, "dropout": 0.1, "targets": ["all-linear"]}
    adapter = AdapterSection(**(method if "name" in method else lora | method))
    saving, loading = (
        with_checkpoints(recipe_for(model_folder, layout(place), adapter=adapter), tmp_path)
        for place in ("TP2 PP2", other)
    )
    saved, loaded = saved_and_loaded(saving, loading)
    before, after = assemble([rank[0] for rank in saved]), assemble([rank[0] for rank in loaded])
    in_full = {"decoder"} if "modules_to_save" in method else set()
    assert {key.split(".")[0] for key in before} == {"adapters", "optimizer"} | in_full  # not the frozen model
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    if other == "TP2 PP2":  # dropout too: at another layout its masks are others
        assert [rank[2] for rank in loaded] == [rank[2] for rank in saved]


@pytest.mark.parametrize(
    ("key", "value"), [("rank", 8), ("alpha", 8.0), ("targets", ["q_proj"]), ("several", {"a": NamedAdapter(rank=2)})]
)
def test_a_run_goes_on_with_its_own_adapters(tmp_path: Path, key: str, value: Any) -> None:
    own = AdapterSection(name="lora")
    check_adapter(tmp_path, asdict(own), asdict(replace(own, learning_rate_ratio=2.0, dropout=0.5)))
    changed = asdict(replace(own, **{key: value}))
    with pytest.raises(InputError, match=rf"adapter\.{key} is .* there, .* in this recipe; a run goes on with the"):
        check_adapter(tmp_path, asdict(own), changed)
    check_adapter(tmp_path, {"name": "lora"}, changed)  # of a version that didn't know the key


def test_a_layout_is_compared_as_it_was_written() -> None:
    section = ParallelSection(cp=4, cp_comm_type="a2a+p2p", hierarchical_cp=[2, 2])
    record = resolve(section, world_size=None).record()
    assert json.loads(json.dumps(record)) == record


@pytest.mark.nightly
def test_other_layouts_draw_new_random_numbers(model_folder: Path, tmp_path: Path) -> None:
    saving, loading = (with_checkpoints(recipe_for(model_folder, layout(p)), tmp_path) for p in ("TP2", "PP2"))
    saved, loaded = saved_and_loaded(saving, loading)
    again = run_ranks(load_rank, 2, loading)
    assert loaded[0][1] != saved[0][1] and [rank[1] for rank in again] == [rank[1] for rank in loaded]


def weights_rank(recipe: Recipe, path: Path) -> Any:
    from mcore_swift.training.checkpoint import load_weights
    from mcore_swift.weights.dist_checkpoint import model_items

    model = open_model(recipe)
    load_weights(path, models=model.models)
    tensors = model_items(model.chunks).tensors()
    return [(i.key, tuple(i.global_shape), tuple(i.global_offset), i.data) for i in tensors]


@pytest.mark.slow
def test_weights_alone_at_another_layout_and_dtype(model_folder: Path, tmp_path: Path) -> None:
    recipe = with_checkpoints(recipe_for(model_folder, layout("TP2")), tmp_path, optimizer=False)
    saved = assemble([rank[0] for rank in run_ranks(save_rank, 2, recipe)])
    path = tmp_path / "checkpoints" / "step-00000002"
    loaded = assemble(run_ranks(weights_rank, 2, recipe_for(model_folder, layout("PP2"), dtype="bf16"), path))
    assert loaded and all(torch.equal(loaded[key], saved[key].bfloat16()) for key in loaded)
    with pytest.raises(RankFailure, match=r"holds weights only \(checkpoint\.optimizer was false\)"):
        run_ranks(load_rank, 2, recipe)


def megatron_rank(recipe: Recipe, path: Path) -> Any:
    from megatron.core import dist_checkpointing

    from mcore_swift.weights.live import sharded_state

    chunk = open_model(recipe).chunks[0]
    state = sharded_state(chunk)
    loaded: Any = dist_checkpointing.load(state, str(path))
    chunk.load_state_dict({key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)})
    return chunk.state_dict()["decoder.layers.0.mlp.linear_fc1.weight"].clone()


def test_megatron_reads_it(model_folder: Path, tmp_path: Path) -> None:
    recipe = with_checkpoints(recipe_for(model_folder, layout("DP2")), tmp_path)
    saved = assemble([rank[0] for rank in run_ranks(save_rank, 2, recipe)])
    path = tmp_path / "checkpoints" / "step-00000002"
    (weight,) = run_ranks(megatron_rank, 1, recipe_for(model_folder), path)
    assert torch.equal(weight, saved["decoder.layers.0.mlp.linear_fc1.weight"])


def test_it_stands_alone(model_folder: Path, tmp_path: Path) -> None:
    from mcore_swift.models.build import read_source
    from mcore_swift.training.checkpoint import checkpoint_source, is_checkpoint

    run_ranks(save_rank, 1, with_checkpoints(recipe_for(model_folder), tmp_path))
    path = tmp_path / "checkpoints" / "step-00000002"
    assert is_checkpoint(path) and not is_checkpoint(tmp_path)
    assert read_source(checkpoint_source(path)).raw == read_source(model_folder).raw
    copied = {file.name for file in checkpoint_source(path).iterdir()}
    assert copied == {"config.json", "generation_config.json", "tokenizer_config.json"}


# --- a copy of its moment ---------------------------------------------------------------------------------------------


def hold_writing(go: threading.Event) -> None:
    """From here on, background writing waits for the event."""
    from mcore_swift.weights.dist_checkpoint import PendingWrite

    write = PendingWrite.write

    def waits(self: PendingWrite) -> None:
        go.wait()
        write(self)

    PendingWrite.write = waits  # type: ignore[method-assign]


def snapshot_rank(recipe: Recipe) -> Any:
    run = Run(recipe)
    run.train(1)
    go = threading.Event()
    hold_writing(go)
    run.save()
    shards = run.shards()
    assert run.manager.poll() is None  # not done, and nobody waits
    run.train(2)
    for model in run.model.models:
        for parameter in model.parameters():
            parameter.data.fill_(7.0)
    go.set()
    while (path := run.manager.poll()) is None:
        time.sleep(0.01)
    assert path == run.manager.newest() and run.manager.poll() is None
    run.load()
    return shards, run.shards()


@pytest.mark.parametrize("distributed", [True, slow(False)])
def test_training_goes_on_while_it_is_written(model_folder: Path, tmp_path: Path, distributed: bool) -> None:
    section = OptimizerSection(distributed=distributed)
    recipe = with_checkpoints(recipe_for(model_folder, layout("DP2"), optimizer=section), tmp_path)
    ranks = run_ranks(snapshot_rank, 2, recipe)
    before, after = assemble([rank[0] for rank in ranks]), assemble([rank[1] for rank in ranks])
    assert all(torch.equal(before[key], after[key]) for key in before)


def repeated_rank(recipe: Recipe) -> Any:
    """Saves three times; (plans merged, places in memory) after each, what was held then, and what is loaded."""
    from mcore_swift.weights import dist_checkpoint

    run, merged, merge = Run(recipe), [], dist_checkpoint._global_plan
    dist_checkpoint._global_plan = lambda *args: merged.append(1) or merge(*args)  # type: ignore[func-returns-value]
    seen = []
    for _ in range(3):
        run.train(1)
        run.save()
        run.manager.finish()
        assert run.manager._saver is not None
        buffers = run.manager._saver._copies._buffers.values()
        seen.append((len(merged), sorted(copy.data_ptr() for group in buffers for copy in group)))
    shards = run.shards()
    run.train(1)
    run.load()
    return seen, shards, run.shards()


def test_later_saves_use_plan_and_memory_of_the_first(model_folder: Path, tmp_path: Path) -> None:
    recipe = with_checkpoints(recipe_for(model_folder, layout("DP2")), tmp_path)
    for seen, shards, loaded in run_ranks(repeated_rank, 2, recipe):
        assert seen[0][0] == 1 and seen[0][1] and seen == [seen[0]] * 3
        assert all(torch.equal(old[3], new[3]) for old, new in zip(shards, loaded, strict=True))


def synchronous_rank(recipe: Recipe) -> Any:
    run = Run(recipe)
    run.train(1)
    run.save()
    newest = run.manager.newest()
    return newest, run.manager.poll(), run.manager.poll()


def test_synchronous(model_folder: Path, tmp_path: Path) -> None:
    recipe = with_checkpoints(recipe_for(model_folder), tmp_path, asynchronous=False)
    path = tmp_path / "checkpoints" / "step-00000001"
    assert run_ranks(synchronous_rank, 1, recipe) == [(path, path, None)]


# --- rectangles -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (4, 5), (3, 2, 4)])
def test_boxes_cover_a_range_once_in_order(shape: tuple[int, ...]) -> None:
    prepared()
    from mcore_swift.weights.dist_checkpoint import boxes

    numbers = np.arange(np.prod(shape)).reshape(shape)
    for start in range(numbers.size + 1):
        for stop in range(start, numbers.size + 1):
            cuts = [tuple(slice(o, o + n) for o, n in zip(*box, strict=True)) for box in boxes(shape, start, stop)]
            found = np.concatenate([numbers[cut].ravel() for cut in cuts]) if cuts else np.array([])
            assert found.tolist() == list(range(start, stop))
            assert len(cuts) <= 2 * len(shape) - 1
