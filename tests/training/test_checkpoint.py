"""Checkpoints come back bit for bit at any layout, are copies of their moment, and are there whole or not at all."""

from __future__ import annotations

import os
import pickle
import random
import resource
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mcore_swift import parallel
from mcore_swift.errors import InputError
from mcore_swift.objectives.registry import OBJECTIVES
from mcore_swift.recipe import CheckpointSection, OptimizerSection, ParallelSection, Recipe
from mcore_swift.recipe_io import dump_recipe
from tests.distributed.harness import RankFailure, prepared, run_ranks
from tests.distributed.rank_model import micro_batches, open_model, recipe_for
from tests.distributed.tiny_models import tiny_folder

CPU = torch.device("cpu")
VOCABULARY = 101  # odd: padded at TP2, not at TP1
LOADER = {"kind": "map", "fingerprint": "f", "global_batch_size": 8}
Global = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prepared()
    folder = tiny_folder(tmp_path_factory.mktemp("model") / "tied", "qwen2-tied")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    return folder


def layout(text: str) -> ParallelSection:
    """`TP2 PP2 VPP2 DP2` → the section."""
    sizes: dict[str, Any] = {word[:-1].lower(): int(word[-1]) for word in text.split()}
    return ParallelSection(**sizes)


def with_checkpoints(recipe: Recipe, run: Path, **section: Any) -> Recipe:
    return replace(recipe, checkpoint=CheckpointSection(dir=str(run), **section))


# --- what a rank does -------------------------------------------------------------------------------------------------


class Run:
    """A run on one rank: model, manager, steps."""

    def __init__(self, recipe: Recipe) -> None:
        from mcore_swift.training.checkpoint import CheckpointManager

        self.recipe, self.step = recipe, 0
        self.model = open_model(recipe)
        plan = parallel.resolve(recipe.parallel, world_size=int(os.environ["WORLD_SIZE"]))
        self.manager = CheckpointManager(
            recipe.checkpoint,
            run_dir=Path(recipe.checkpoint.dir or ""),
            source=self.model.source,
            recipe_text=dump_recipe(recipe),
            plan=plan,
        )

    def train(self, steps: int) -> list[tuple[float, float]]:
        """Steps, each with its own batches; (loss, gradient norm) of each."""
        from mcore_swift.training.optimizer import set_learning_rate
        from mcore_swift.training.step import train_step

        everything = micro_batches(self.recipe, self.model.source.vocab_size, parallel.ranks(), self.recipe.parallel.tp)
        results = []
        for _ in range(steps):
            set_learning_rate(self.model.optimizer, 1e-2 / (1 + self.step), 0.1)
            first = self.step % len(everything)
            batches = everything[first:] + everything[:first]
            result = train_step(self.model.models, self.model.optimizer, batches, OBJECTIVES["sft"], CPU)
            results.append((result.loss, result.grad_norm))
            self.step += 1
        return results

    def save(self) -> None:
        from mcore_swift.training.checkpoint import TrainState

        state = TrainState(step=self.step, loader=dict(LOADER), samples=8 * self.step)
        self.manager.save(state, models=self.model.models, optimizer=self.model.optimizer)

    def load(self) -> Any:
        path = self.manager.newest()
        assert path is not None
        state = self.manager.load(path, models=self.model.models, optimizer=self.model.optimizer)
        self.step = state.step
        return state

    def shards(self) -> list[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]]:
        """(key, global shape, offset, copy) of all that this rank's model and optimizer hold."""
        from mcore_swift.training.optimizer_state import optimizer_items
        from mcore_swift.weights.dist_checkpoint import model_items

        model = model_items(self.model.models)
        items = [*model.tensors(), *optimizer_items(self.model.optimizer, model.parts)]
        return [(i.key, tuple(i.global_shape), tuple(i.global_offset), i.data.clone()) for i in items]  # type: ignore[union-attr]


def assemble(ranks: list[list[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]]]) -> Global:
    """Global tensors from the shards of all ranks; parts held twice must agree, vocabulary padding is cut off."""
    whole: Global = {}
    for key, shape, offset, data in (shard for rank in ranks for shard in rank):
        full = whole.setdefault(key, torch.full(shape, torch.nan, dtype=data.dtype))
        view = full[tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))]
        assert bool((view.isnan() | (view == data)).all()), f"replicas of {key} differ"
        view.copy_(data)
    for key, full in whole.items():
        assert not full.isnan().any(), f"{key} is not covered"
        if "word_embeddings" in key:
            assert not full[VOCABULARY:].any()
            whole[key] = full[:VOCABULARY]
    return whole


def random_states() -> tuple[Any, ...]:
    """What each generator would give next, without moving it."""
    python, numpy = random.getstate(), np.random.get_state()
    values = (random.random(), float(np.random.random()), torch.get_rng_state().tolist())
    random.setstate(python)
    np.random.set_state(numpy)
    return values


def save_rank(recipe: Recipe, steps: int = 2, more: int = 2) -> Any:
    run = Run(recipe)
    run.train(steps)
    random.seed(int(os.environ["RANK"]))
    np.random.seed(17 + int(os.environ["RANK"]))
    torch.rand(5)
    run.save()
    states = random_states()
    shards = run.shards()
    committed = run.manager.finish()
    assert committed == run.manager.newest() and run.manager.poll() is None
    return shards, states, run.train(more)


def load_rank(recipe: Recipe, more: int = 2) -> Any:
    run = Run(recipe)
    run.train(1)  # what is filled is not what it was at the start
    state = run.load()
    return run.shards(), random_states(), run.train(more), state


def saved_and_loaded(saving: Recipe, loading: Recipe) -> tuple[Any, Any]:
    def ranks(recipe: Recipe) -> int:
        return parallel.resolve(recipe.parallel, world_size=None).world_size

    return run_ranks(save_rank, ranks(saving), saving), run_ranks(load_rank, ranks(loading), loading)


# --- same numbers -----------------------------------------------------------------------------------------------------

SAME = [
    ("TP2 PP2", "fp32", OptimizerSection()),
    ("PP2 VPP2", "fp32", OptimizerSection(distributed=False)),
    ("DP2", "fp32", OptimizerSection()),
    ("DP2 PP2", "bf16", OptimizerSection()),
    ("TP2", "bf16", OptimizerSection(distributed=False)),
    ("DP2", "fp32", OptimizerSection(name="sgd", distributed=False)),
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
    ("TP2", True, "PP2", True),
    ("DP2 PP2", True, "TP2", False),
    ("DP1", False, "DP2", True),
    ("DP2", True, "PP2 VPP2", True),
    ("DP4", True, "TP2 DP2", True),
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

    from mcore_swift.weights.live import SHARDING

    chunk = open_model(recipe).chunks[0]
    state = chunk.sharded_state_dict(metadata=SHARDING)
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


@pytest.mark.parametrize("distributed", [True, False])
def test_training_goes_on_while_it_is_written(model_folder: Path, tmp_path: Path, distributed: bool) -> None:
    section = OptimizerSection(distributed=distributed)
    recipe = with_checkpoints(recipe_for(model_folder, layout("DP2"), optimizer=section), tmp_path)
    ranks = run_ranks(snapshot_rank, 2, recipe)
    before, after = assemble([rank[0] for rank in ranks]), assemble([rank[1] for rank in ranks])
    assert all(torch.equal(before[key], after[key]) for key in before)


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


# --- whole or not at all ----------------------------------------------------------------------------------------------


def dying_rank(recipe: Recipe, moment: str) -> None:
    """Saves step 1, then dies while step 2 is saved."""
    from mcore_swift.weights.dist_checkpoint import PendingWrite

    def die(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def then_die(function: Callable[..., Any]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            function(*args)
            die()

        return call

    run = Run(recipe)
    run.train(1)
    run.save()
    run.manager.finish()
    last = os.environ["RANK"] == "1"
    if moment == "one rank writes" and last:
        PendingWrite.write = then_die(PendingWrite.write)  # type: ignore[method-assign]
    if moment == "index is written" and not last:
        PendingWrite.finish = then_die(PendingWrite.finish)  # type: ignore[method-assign]
    rename = os.rename

    def dying_rename(source: Any, target: Any) -> None:
        if Path(target).name != "step-00000002":  # torch renames its index, too
            return rename(source, target)
        if moment == "after the rename":
            rename(source, target)
        die()

    if "the rename" in moment and not last:
        os.rename = dying_rename  # type: ignore[assignment]
    run.train(1)
    run.save()
    run.manager.finish()


@pytest.mark.parametrize("moment", ["one rank writes", "index is written", "before the rename", "after the rename"])
def test_killed_while_saving(model_folder: Path, tmp_path: Path, moment: str) -> None:
    recipe = with_checkpoints(recipe_for(model_folder, layout("TP2")), tmp_path, keep=1)
    with pytest.raises(RankFailure, match="died without a word"):
        run_ranks(dying_rank, 2, recipe, moment)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    newest = 2 if moment == "after the rename" else 1
    assert [name for name in names if not name.startswith(".")] == [f"step-{step:08d}" for step in range(1, newest + 1)]
    assert any(name.startswith(".step-00000002.") for name in names) == (
        moment in ("index is written", "before the rename")
    )
    loaded = run_ranks(load_rank, 2, recipe)
    assert loaded[0][3].step == newest
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")]


def failing_rank(recipe: Recipe, how: str) -> Any:
    run = Run(recipe)
    run.train(1)
    run.save()
    run.manager.finish()
    if how == "one rank's disk is full" and os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    if how == "index does not fit" and os.environ["RANK"] == "0":
        from torch.distributed.checkpoint.filesystem import FileSystemWriter

        finish = FileSystemWriter.finish

        def limited(*args: Any) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))
            finish(*args)

        FileSystemWriter.finish = limited  # type: ignore[method-assign]
    run.train(1)
    run.save()
    try:
        while run.manager.poll() is None:
            time.sleep(0.01)
    except InputError as error:
        return str(error), run.load().step
    raise AssertionError("no error")


@pytest.mark.parametrize("how", ["one rank's disk is full", "index does not fit"])
def test_disk_full(model_folder: Path, tmp_path: Path, how: str) -> None:
    recipe = with_checkpoints(recipe_for(model_folder, layout("TP2")), tmp_path)
    for message, step in run_ranks(failing_rank, 2, recipe, how):
        assert message == (
            f"checkpoint.dir: the checkpoint of step 2 could not be written to {tmp_path}/checkpoints: File too large;"
            " nothing of it was left, the newest checkpoint is still step-00000001"
        )
        assert step == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def many_rank(recipe: Recipe, steps: int) -> list[str]:
    run = Run(recipe)
    for _ in range(steps):
        run.train(1)
        run.save()
    run.manager.finish()
    return sorted(path.name for path in (Path(recipe.checkpoint.dir or "") / "checkpoints").iterdir())


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3, 4]), (1, [4]), (2, [3, 4])])
def test_keep(model_folder: Path, tmp_path: Path, keep: int, left: list[int]) -> None:
    recipe = with_checkpoints(recipe_for(model_folder), tmp_path, keep=keep)
    assert run_ranks(many_rank, 1, recipe, 4) == [[f"step-{step:08d}" for step in left]]


def test_leftovers_are_removed(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".step-00000009.deadbeef" / "rng").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000009").mkdir()  # looks like one, but has no manifest
    recipe = with_checkpoints(recipe_for(model_folder), tmp_path)
    assert run_ranks(many_rank, 1, recipe, 1) == [["step-00000001", "step-00000009"]]
    assert run_ranks(load_rank, 1, recipe)[0][3].step == 1


def test_never_resumed_and_overwritten(model_folder: Path, tmp_path: Path) -> None:
    run_ranks(many_rank, 1, with_checkpoints(recipe_for(model_folder), tmp_path), 2)
    never = with_checkpoints(recipe_for(model_folder), tmp_path, resume="never")
    with pytest.raises(RankFailure, match=r"InputError: checkpoint\.dir: .* another run's results .*step-00000002"):
        run_ranks(many_rank, 1, never, 1)
    names = run_ranks(many_rank, 1, replace(never, checkpoint=replace(never.checkpoint, overwrite=True)), 1)
    assert names == [["step-00000001"]]


def test_folder_cannot_be_written(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RankFailure, match=r"InputError: checkpoint\.dir: .*/run can't be written: Not a directory"):
        run_ranks(many_rank, 1, with_checkpoints(recipe_for(model_folder), tmp_path / "run"), 1)


# --- what can't be loaded ---------------------------------------------------------------------------------------------


def refused_rank(recipe: Recipe) -> str:
    run = Run(recipe)
    before = run.shards()
    with pytest.raises(InputError) as caught:
        run.load()
    assert all(torch.equal(a[3], b[3]) for a, b in zip(before, run.shards(), strict=True)), "something was loaded"
    return str(caught.value)


@pytest.fixture
def saved_run(model_folder: Path, tmp_path: Path) -> Path:
    run_ranks(many_rank, 1, with_checkpoints(recipe_for(model_folder), tmp_path / "run"), 1)
    return tmp_path / "run"


def test_another_model(tmp_path: Path, saved_run: Path) -> None:
    wider = tiny_folder(tmp_path / "wider", "qwen2-tied", intermediate_size=128)
    (message,) = run_ranks(refused_rank, 1, with_checkpoints(recipe_for(wider), saved_run))
    assert "step-00000001: a checkpoint of another model: intermediate_size is 96 there, 128 in" in message
    (saved_run / "checkpoints" / "step-00000001" / "mcore_swift.json").write_text('{"files": {}, "optimizer_step": 1}')
    (saved_run / "checkpoints" / "step-00000001" / "hf" / "config.json").write_bytes(
        (wider / "config.json").read_bytes()
    )
    (message,) = run_ranks(refused_rank, 1, with_checkpoints(recipe_for(wider), saved_run))
    assert "decoder.layers.0.mlp.linear_fc1.weight has shape [192, 64], this model needs [256, 64]" in message


def test_another_precision(model_folder: Path, saved_run: Path) -> None:
    messages = run_ranks(
        refused_rank, 2, with_checkpoints(recipe_for(model_folder, layout("TP2"), dtype="bf16"), saved_run)
    )
    assert "was saved as torch.float32, this run holds it as torch.bfloat16" in messages[1]


def test_damaged(model_folder: Path, saved_run: Path) -> None:
    recipe, path = with_checkpoints(recipe_for(model_folder), saved_run), saved_run / "checkpoints" / "step-00000001"
    data = path / "__0_0.distcp"
    size = data.stat().st_size
    os.truncate(data, size - 100)
    (message,) = run_ranks(refused_rank, 1, recipe)
    assert f"__0_0.distcp has {size - 100} bytes, {size} were written; remove the folder" in message
    data.unlink()
    (message,) = run_ranks(refused_rank, 1, recipe)
    assert "__0_0.distcp is missing" in message
    (path / "mcore_swift.json").write_text("{")
    (message,) = run_ranks(refused_rank, 1, recipe)
    assert "mcore_swift.json: damaged" in message


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def test_nothing_is_executed(model_folder: Path, saved_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved_run)
    path = saved_run / "checkpoints" / "step-00000001"
    (path / ".metadata").write_bytes(pickle.dumps(Evil()))
    (path / "mcore_swift.json").write_text('{"files": {}, "optimizer_step": 1}')
    (message,) = run_ranks(refused_rank, 1, with_checkpoints(recipe_for(model_folder), saved_run))
    assert "index is damaged: it names posix.system" in message and not (saved_run / "executed").exists()


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
