"""Starting local ranks: results, failures, signals; the entries run in forked copies of this very process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mcore_swift import ranks
from mcore_swift.errors import InputError, StopRequested


def launch(fn: Callable[[], int | None], *, size: int = 2, preload: Callable[[], None] = lambda: None) -> int:
    return ranks.launch(fn, ranks=size, preload=preload, threads=1)


@pytest.fixture(autouse=True)
def outside_of_any_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")] + ["RANK", "WORLD_SIZE", "LOCAL_RANK"]:
        monkeypatch.delenv(name, raising=False)


def rank() -> int:
    return int(os.environ["RANK"])


def wait_for_the_end() -> None:
    time.sleep(60)


def test_ranks_reduce_over_gloo_with_the_threads_asked_for() -> None:
    import torch
    import torch.distributed as dist

    def reduce() -> int:
        dist.init_process_group("gloo")
        total = torch.tensor([float(rank() + 1)])
        dist.all_reduce(total)
        dist.destroy_process_group()
        sizes = (os.environ["WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"], os.environ["LOCAL_RANK"])
        right = total.item() == 6.0 and sizes == ("3", "3", str(rank())) and torch.get_num_threads() == 2
        return 0 if right else 3

    assert ranks.launch(reduce, ranks=3, preload=lambda: None, threads=2) == 0


def test_one_rank_runs_in_this_process_and_leaves_the_environment_as_it_was() -> None:
    seen: list[str] = []
    before = dict(os.environ)
    assert launch(lambda: seen.append(os.environ["WORLD_SIZE"]), size=1) == 0
    assert seen == ["1"] and dict(os.environ) == before


def test_preload_runs_once_in_the_parent(tmp_path: Path) -> None:
    def preload() -> None:
        with (tmp_path / "pids").open("a") as file:
            file.write(f"{os.getpid()} {os.environ['OMP_NUM_THREADS']}\n")

    assert launch(lambda: None, preload=preload) == 0
    assert (tmp_path / "pids").read_text() == f"{os.getpid()} 1\n"


def test_input_error_of_one_rank_is_raised_here_and_ends_the_other() -> None:
    def fail() -> None:
        if rank() == 1:
            raise InputError("model.path: no such folder")
        wait_for_the_end()

    start = time.monotonic()
    with pytest.raises(InputError, match=r"^model\.path: no such folder$"):
        launch(fail)
    assert time.monotonic() - start < 5


def test_the_cause_is_told_not_what_it_did_to_the_other_rank(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        time.sleep(0.2 * rank())
        raise RuntimeError(f"broken in rank {rank()}")

    assert launch(fail) == 1
    error = capfd.readouterr().err
    assert "rank 0 failed:\nTraceback" in error and "RuntimeError: broken in rank 0" in error
    assert "broken in rank 1" not in error


def test_input_error_is_the_cause_even_when_the_other_rank_failed_earlier() -> None:
    def fail() -> None:
        if rank() == 0:
            raise RuntimeError("connection closed by peer")
        time.sleep(0.2)
        raise InputError("the data set is empty")

    with pytest.raises(InputError, match="the data set is empty"):
        launch(fail)


def test_a_long_message_arrives_whole() -> None:
    def fail() -> None:
        raise InputError("é" * 50_000)

    with pytest.raises(InputError) as caught:
        launch(fail)
    assert str(caught.value) == "é" * 50_000


def test_a_killed_rank_is_told_with_its_signal(capfd: pytest.CaptureFixture[str]) -> None:
    def killed() -> None:
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        wait_for_the_end()

    assert launch(killed) == 1
    assert "rank 1 was killed by signal 9, SIGKILL (out of memory?)" in capfd.readouterr().err


def test_exit_code_of_a_rank_is_the_runs(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(lambda: 93 if rank() else 0) == 93
    assert "rank 1 ended with exit code 93" in capfd.readouterr().err


@pytest.mark.parametrize("size", [1, 2])
def test_stop_requested_is_try_again(size: int, capfd: pytest.CaptureFixture[str]) -> None:
    def stop() -> None:
        time.sleep(0.3 * rank())  # the slower rank still finishes its save
        raise StopRequested("checkpoint saved at step 7")

    assert launch(stop, size=size) == 75
    assert capfd.readouterr().err.count("checkpoint saved at step 7") == 1


def test_a_signal_to_the_parent_reaches_every_rank_once(tmp_path: Path) -> None:
    def obey() -> None:
        count = 0

        def handle(number: int, frame: object) -> None:
            nonlocal count
            count += 1

        signal.signal(signal.SIGTERM, handle)
        (tmp_path / f"ready{rank()}").touch()
        while rank() == 0 and not (tmp_path / "ready1").exists():
            time.sleep(0.01)
        if rank() == 0:
            os.kill(os.getppid(), signal.SIGTERM)
        for _ in range(500):
            if count:
                break
            time.sleep(0.01)
        time.sleep(0.1)
        if count == 1:
            raise StopRequested("saved")

    before = signal.getsignal(signal.SIGTERM)
    assert launch(obey) == 75
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_rank_that_ignores_sigterm_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 0.3)

    def stubborn() -> None:
        if rank() == 1:
            time.sleep(0.2)
            raise InputError("wrong")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        wait_for_the_end()

    start = time.monotonic()
    with pytest.raises(InputError):
        launch(stubborn)
    assert time.monotonic() - start < 5


PARENT = """
import os, sys, time
from mcore_swift import ranks
def entry():
    open(os.path.join(sys.argv[1], str(os.getpid())), "w").close()
    time.sleep(60)
sys.exit(ranks.launch(entry, ranks=2, preload=lambda: None, threads=1))
"""


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that ended but was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, -2)], ids=lambda x: str(int(x))
)
def test_ranks_die_with_the_parent(tmp_path: Path, number: signal.Signals, code: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while len(pids := [int(path.name) for path in tmp_path.iterdir()]) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(pids) == 2 and all(map(is_alive, pids))
    time.sleep(0.2)
    process.send_signal(number)
    assert process.wait(timeout=20) == code  # -2: KeyboardInterrupt propagates here, Python ends by the signal itself
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_alive, pids))


def test_under_torchrun_this_process_is_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    joined = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
    for name, value in joined.items():
        monkeypatch.setenv(name, value)
    pid = os.getpid()
    assert launch(lambda: 0 if os.getpid() == pid and rank() == 1 else 3) == 0
