"""A checkpoint is there whole or not at all; what cannot be resumed is refused before anything is loaded."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_swift.cli import main
from mcore_swift.errors import InputError
from mcore_swift.recipe import Recipe
from tests.distributed.harness import RankFailure, run_ranks
from tests.distributed.rank_model import recipe_for
from tests.distributed.tiny_models import tiny_folder
from tests.training.checkpoint_run import (
    Run,
    layout,
    load_rank,
    with_checkpoints,
)


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


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


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(moment, marks=pytest.mark.nightly)
        for moment in ("one rank writes", "index is written", "before the rename")
    ]
    + [slow("after the rename")],
)
def test_killed_while_saving(model_folder: Path, tmp_path: Path, moment: str) -> None:
    recipe = with_checkpoints(recipe_for(model_folder, layout("TP2")), tmp_path, keep=1)
    with pytest.raises(RankFailure, match="died without a word"):
        run_ranks(dying_rank, 2, recipe, moment)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    newest = 2 if moment == "after the rename" else 1
    assert [name for name in names if not name.startswith(".")] == [f"step-{step:08d}" for step in range(1, newest + 1)]
    assert any((tmp_path / "checkpoints").glob(".attempt-1/step-00000002.*")) == (
        moment in ("index is written", "before the rename")
    )
    loaded = run_ranks(load_rank, 2, recipe)
    assert loaded[0][3].step == newest
    assert [path.name for path in (tmp_path / "checkpoints").glob(".*")] == [".attempt-2"]


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
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name != ".attempt-1"] == [
        "step-00000001"
    ]
    assert not any((tmp_path / "checkpoints" / ".attempt-1").iterdir())


def many_rank(recipe: Recipe, steps: int) -> list[str]:
    run = Run(recipe)
    for _ in range(steps):
        run.train(1)
        run.save()
    run.manager.finish()
    return sorted(path.name for path in (Path(recipe.checkpoint.dir or "") / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(("keep", "left"), [slow(0, [1, 2, 3, 4]), slow(1, [4]), (2, [3, 4])])
def test_keep(model_folder: Path, tmp_path: Path, keep: int, left: list[int]) -> None:
    recipe = with_checkpoints(recipe_for(model_folder), tmp_path, keep=keep)
    assert run_ranks(many_rank, 1, recipe, 4) == [[f"step-{step:08d}" for step in left]]


def test_leftovers_are_removed(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".step-00000009.deadbeef" / "rng").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000009").mkdir()  # looks like one, but has no manifest
    recipe = with_checkpoints(recipe_for(model_folder), tmp_path)
    assert run_ranks(many_rank, 1, recipe, 1) == [["step-00000001", "step-00000009"]]
    assert not (tmp_path / "checkpoints" / ".step-00000009.deadbeef").exists()
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
    assert f"__0_0.distcp has {size - 100} bytes, {size} were written" in message
    data.unlink()
    (message,) = run_ranks(refused_rank, 1, recipe)
    assert "__0_0.distcp is missing" in message
    (path / "mcore_swift.json").write_text("{")
    (message,) = run_ranks(refused_rank, 1, recipe)
    assert "mcore_swift.json: damaged" in message


# --- bits that changed on the disk ------------------------------------------------------------------------------------


def flip(path: Path, place: float) -> None:
    """Turns one bit of a file over, `place` of its length from the beginning."""
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 0x10
    path.write_bytes(bytes(data))


def resumed_rank(recipe: Recipe) -> int:
    run = Run(recipe)
    state = run.manager.resume(models=run.model.models, optimizer=run.model.optimizer)
    return state.step if state is not None else 0


@pytest.fixture(scope="module")
def two_checkpoints(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A run at TP2 with checkpoints of step 1 and 2; the second one's folder."""
    run = tmp_path_factory.mktemp("two") / "run"
    recipe = with_checkpoints(recipe_for(model_folder, layout("TP2")), run)
    run_ranks(many_rank, 2, recipe, 2)
    return recipe, run / "checkpoints" / "step-00000002"


def test_a_flipped_bit_is_found_named_and_passed_over(
    two_checkpoints: tuple[Recipe, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    recipe, newest = two_checkpoints
    whole = (newest / "__1_0.distcp").read_bytes()
    flip(newest / "__1_0.distcp", 0.5)
    assert run_ranks(resumed_rank, 2, recipe) == [1, 1]
    lines = [line for line in capfd.readouterr().err.splitlines() if "damaged" in line]
    assert len(lines) == 1 and "going on from step-00000001" in lines[0]
    assert f"{newest}: this checkpoint is damaged: __1_0.distcp is not what was written: its CRC-32 is " in lines[0]
    (newest / "__1_0.distcp").write_bytes(whole)
    assert run_ranks(resumed_rank, 2, recipe) == [2, 2]


@pytest.mark.parametrize("name", ["__0_0.distcp", "rng/00001.pt", ".metadata", "hf/config.json", "mcore_swift.json"])
def test_no_file_can_change_unseen(
    two_checkpoints: tuple[Recipe, Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, newest = two_checkpoints
    whole = (newest / name).read_bytes()
    assert main(["inspect", str(newest), "--check"]) == 0
    count = len([path for path in newest.rglob("*") if path.is_file()]) - 1
    assert f"checked: {count} files" in capsys.readouterr().out
    for place in (0.3, 0.9):
        flip(newest / name, place)
        assert main(["inspect", str(newest), "--check"]) == 1
        assert f"damaged: {newest}" in (out := capsys.readouterr().out) and name in out
        (newest / name).write_bytes(whole)


def test_a_checkpoint_older_than_checksums(
    model_folder: Path, saved_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved_run / "checkpoints" / "step-00000001"
    manifest = json.loads((path / "mcore_swift.json").read_text())
    del manifest["crc32"]
    (path / "mcore_swift.json").write_text(json.dumps(manifest))
    assert run_ranks(resumed_rank, 1, with_checkpoints(recipe_for(model_folder), saved_run)) == [1]
    assert main(["inspect", str(path), "--check"]) == 0
    assert "checked: files' sizes; it is older than checksums" in capsys.readouterr().out
    assert main(["inspect", str(model_folder), "--check"]) == 2
    assert "--check compares a run's checkpoint with its record" in capsys.readouterr().err


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
