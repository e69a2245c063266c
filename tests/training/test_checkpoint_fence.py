"""Two attempts at one run: the later one decides, whenever it comes; the earlier one commits nothing any more."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from mcore_swift.errors import NeverRestart
from mcore_swift.recipe import Recipe
from mcore_swift.training.checkpoint_fence import AttemptFolder
from tests.distributed.harness import run_ranks
from tests.distributed.rank_model import recipe_for
from tests.training.checkpoint_run import Run, with_checkpoints

ROUNDS = 40


def commit_until_overtaken(checkpoints: Path, number: int) -> None:
    """Commits step after step, as fast as it goes, until it isn't allowed to."""
    os.environ["MCORE_SWIFT_ATTEMPT"] = str(number)
    attempt, step = AttemptFolder.open(checkpoints), 0
    try:
        while True:
            folder = attempt.path / f"new-{step}"
            folder.mkdir()
            (folder / "attempt").write_text(str(number))
            attempt.commit(folder, checkpoints / f"step-{step % 7:08d}")  # now and then one that is there already
            attempt.clear()
            step += 1
    except (NeverRestart, FileNotFoundError):
        pass
    with pytest.raises(NeverRestart, match=f"this is attempt {number}, and attempt [29] has taken"):
        attempt.check()


def owners(checkpoints: Path) -> dict[str, str]:
    return {path.name: (path / "attempt").read_text() for path in checkpoints.glob("step-*")}


@pytest.mark.slow
def test_the_later_attempt_wins_every_race(tmp_path: Path) -> None:
    draw = random.Random(7)
    seen = 0
    for turn in range(ROUNDS):
        checkpoints = tmp_path / str(turn)
        checkpoints.mkdir()
        pids = []
        for number in (1, 2):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    if number == 2:
                        time.sleep(draw.random() * 0.004)
                    commit_until_overtaken(checkpoints, number)
                    code = 0
                except NeverRestart:  # attempt 1 came after attempt 2
                    code = 0
                finally:
                    os._exit(code)
            pids.append(pid)
        time.sleep(draw.random() * 0.02)
        os.environ["MCORE_SWIFT_ATTEMPT"] = "9"
        try:
            last = AttemptFolder.open(checkpoints)
        finally:
            del os.environ["MCORE_SWIFT_ATTEMPT"]
        found = owners(checkpoints)
        seen += len(found)
        time.sleep(0.005)
        assert owners(checkpoints) == found  # nobody else commits, replaces or deletes
        assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0]
        last.check()
        assert owners(checkpoints) == found and [p.name for p in checkpoints.glob(".*")] == [".attempt-9"]
    assert seen > ROUNDS  # there was something to protect


def test_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [AttemptFolder.open(tmp_path).number for _ in range(2)] == [1, 2]  # started by hand
    monkeypatch.setenv("MCORE_SWIFT_ATTEMPT", "2")
    with pytest.raises(NeverRestart, match="attempt 2 of this run has been started before"):
        AttemptFolder.open(tmp_path)
    monkeypatch.setenv("MCORE_SWIFT_ATTEMPT", "1")
    with pytest.raises(NeverRestart, match="attempt 2 has taken this run over; this is attempt 1"):
        AttemptFolder.open(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".attempt-2"]


def overtaken_rank(recipe: Recipe) -> list[str]:
    """An attempt that is cut off while it saves, and goes on after another one has started."""
    run = Run(recipe)
    run.train(1)
    run.save()
    first = run.manager.finish()
    run.train(1)
    run.save()
    AttemptFolder.open(run.manager.folder)  # another job
    messages = []
    for work in (run.manager.finish, run.save, run.manager.confirm):
        with pytest.raises(NeverRestart) as caught:
            work()
        messages.append(str(caught.value))
    assert run.manager.newest() == first
    return messages


def test_a_stale_attempt_cannot_commit(model_folder: Path, tmp_path: Path) -> None:
    (messages,) = run_ranks(overtaken_rank, 1, with_checkpoints(recipe_for(model_folder), tmp_path))
    assert all("this is attempt 1, and attempt 2 has taken the run over" in message for message in messages)
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000001"]
