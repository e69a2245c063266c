"""The harness that the multi-rank tests stand on: results, tracebacks, time limits, and no process left behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from tests.distributed import harness
from tests.distributed.harness import RankFailure, run_ranks


def place() -> tuple[str, str, int, int]:
    return os.environ["RANK"], os.environ["WORLD_SIZE"], os.getpid(), torch.get_num_threads()


def large(megabytes: int) -> torch.Tensor:
    return torch.full((megabytes << 18,), float(os.environ["RANK"]))


def fail_on_rank_one(folder: Path) -> None:
    (folder / os.environ["RANK"]).write_text(str(os.getpid()))
    if os.environ["RANK"] == "1":
        raise KeyError("what rank one says")
    time.sleep(60)


def exit_pytest() -> None:
    raise SystemExit(0)


def die() -> None:
    os._exit(0)


def write_pid_and_wait(path: Path) -> None:
    path.write_text(str(os.getpid()))
    time.sleep(60)


def nested(path: Path) -> None:
    run_ranks(write_pid_and_wait, 1, path)


def test_results_come_back_in_rank_order() -> None:
    found = run_ranks(place, 3)
    assert [rank for rank, *_ in found] == ["0", "1", "2"]
    assert {size for _, size, *_ in found} == {"3"}
    assert len({pid for *_, pid, _ in found} | {os.getpid()}) == 4
    assert {threads for *_, threads in found} == {1}
    assert "RANK" not in os.environ


def test_results_larger_than_a_pipe() -> None:
    found = run_ranks(large, 2, 8)
    assert all(torch.equal(tensor, torch.full((8 << 18,), float(rank))) for rank, tensor in enumerate(found))


def test_a_failing_rank_shows_its_traceback_and_ends_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "GRACE", 0.5)
    started = time.monotonic()
    with pytest.raises(RankFailure, match="what rank one says") as failure:
        run_ranks(fail_on_rank_one, 2, tmp_path)
    assert time.monotonic() - started < 30
    assert str(failure.value).startswith("--- rank 1 of 2: Traceback")
    assert "in fail_on_rank_one" in str(failure.value)
    for path in tmp_path.iterdir():
        assert not Path(f"/proc/{path.read_text()}").exists()


def test_time_limit() -> None:
    with pytest.raises(RankFailure, match=r"rank 0 of 1: not done \(time limit 1 s\)"):
        run_ranks(time.sleep, 1, 60, timeout=1)


@pytest.mark.parametrize(("fn", "story"), [(exit_pytest, "SystemExit"), (die, "died without a word")])
def test_a_rank_that_exits_is_a_failure(fn: object, story: str) -> None:
    with pytest.raises(RankFailure, match=story):
        run_ranks(fn, 1)  # type: ignore[arg-type]


@pytest.mark.slow
def test_ranks_die_with_the_process_that_started_them(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with pytest.raises(RankFailure, match="not done"):  # which kills the rank that has started a rank
        run_ranks(nested, 1, path, timeout=3)
    deadline = time.monotonic() + 10
    while _runs(int(path.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(int(path.read_text()))


def _runs(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
