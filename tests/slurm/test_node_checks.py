"""What a node finds out about itself: each check is made to fail."""

from __future__ import annotations

import os
import resource
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.preflight import node
from launch.preflight.limits import Limits

LOW = Limits(disk_gib=0, inodes=0, tmp_gib=0, shm_gib=0, shared_mb_s=0, nofile=0, memlock_gib=0)


def test_a_node_that_has_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    assert node.problems(tmp_path, LOW) == []
    assert list(tmp_path.iterdir()) == []
    found = node.versions()
    assert found["torch"].startswith("2.") and found["python"].startswith("3.") and "megatron-core" in found


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"disk_gib": 1e9}, "GiB free, at least 1e+09 are needed"),
        ({"tmp_gib": 1e9}, "GiB free, at least 1e+09 are needed"),
        ({"shm_gib": 1e9}, "/dev/shm: "),
        ({"inodes": 1e18}, "files can be made, at least 1e+18 are needed"),
        ({"shared_mb_s": 1e9}, "MB/s, at least 1e+09 are needed"),
    ],
)
def test_limits_that_are_missed(tmp_path: Path, limits: dict[str, float], message: str) -> None:
    from dataclasses import replace

    (problem,) = node.problems(tmp_path, replace(LOW, **limits))
    assert message in problem


def test_limits_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (64, 65536))
    assert node.problems(tmp_path, Limits(disk_gib=0, tmp_gib=0, shm_gib=0, nofile=65537, inodes=0, shared_mb_s=0)) == [
        "65536 open files (ulimit -n), at least 65537 are needed",
        "6.10352e-05 GiB of locked memory (ulimit -l), at least 1 are needed",
    ]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        node.problems(tmp_path / "gone", LOW)


def test_network_interfaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib7")
    (problem,) = node.problems(tmp_path, LOW)
    assert problem.startswith("network interface ib7: not there; found [") and "lo" in problem
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    assert node.problems(tmp_path, LOW) == []
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^docker")
    assert node.problems(tmp_path, LOW) == []


def test_the_clock_is_compared_with_the_batch_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.slurm.preflight import _clock

    monkeypatch.setenv("SLURMD_NODENAME", "127.0.0.1")
    with _clock() as address:
        assert abs(node.clock_skew(address)) < 0.5
        before = node.time.time
        monkeypatch.setattr(node.time, "time", lambda: before() + 7 * (threading.current_thread().name == "MainThread"))
        assert abs(node.clock_skew(address) - 7) < 0.5
    with pytest.raises(OSError):
        node.clock_skew(f"127.0.0.1:{_closed_port()}", seconds=1)


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a program on PATH that prints what nvidia-smi would."""

    def put(rows: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\ncat <<'E'\n{rows}E\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return put


GOOD = "570.86.15, NVIDIA H100 80GB HBM3, 0, Not Active, Not Active, No, 4\n"


def test_gpus(nvidia_smi: Callable[[str], None]) -> None:
    nvidia_smi(GOOD * 8)
    assert node.gpus(8) == ([], {"driver": "570.86.15", "GPU": "NVIDIA H100 80GB HBM3"})
    nvidia_smi(GOOD * 7)
    assert node.gpus(8)[0] == ["7 GPUs, expected 8"]
    nvidia_smi(
        GOOD
        + "570.86.15, NVIDIA H100 80GB HBM3, 2, Not Active, Active, No, 4\n"
        + "570.86.15, NVIDIA H100 80GB HBM3, [N/A], Active, Not Active, Yes, 60000\n"
    )
    assert node.gpus(3)[0] == [
        "GPU 1: 2 uncorrected memory errors: reset it",
        "GPU 1: slowed down: hw_thermal_slowdown",
        "GPU 2: slowed down: hw_slowdown",
        "GPU 2: a bad memory row could not be replaced: exchange it",
        "GPU 2: 60000 MiB are in use before the start: another process is there",
    ]


def test_a_driver_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert node.gpus(8)[0][0].startswith("nvidia-smi doesn't answer: ")
