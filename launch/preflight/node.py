"""What a node finds out about itself alone. A check returns what is wrong, in words that name the remedy."""

from __future__ import annotations

import os
import platform
import resource
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from launch.preflight.limits import Limits

GIB = 2**30
WRITTEN_BYTES = 16 * 2**20
VERSIONS = ("torch", "megatron-core", "transformer-engine", "nvidia-nccl-cu13", "mcore-swift")
QUERY = (
    "driver_version",
    "name",
    "ecc.errors.uncorrected.volatile.total",
    "clocks_event_reasons.hw_slowdown",
    "clocks_event_reasons.hw_thermal_slowdown",
    "remapped_rows.failure",
    "memory.used",
)
USED_MIB = 2048  # more than a driver needs: somebody else's process


def problems(folder: Path, limits: Limits) -> list[str]:
    """Everything but GPUs, clock and speed."""
    return [*_space(folder, limits), *_shared(folder, limits), *_resources(limits), *_interface()]


def versions() -> dict[str, str]:
    """What must be equal on all nodes."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def clock_skew(address: str, *, seconds: float = 5.0) -> float:
    """Seconds that this node's clock is ahead of that of `address` (HOST:PORT, the batch node answers)."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        before = time.time()
        connection.sendall(b"?")
        theirs = float(connection.recv(64))
        return (before + time.time()) / 2 - theirs


def gpus(expected: int) -> tuple[list[str], dict[str, str]]:
    """What is wrong with the node's GPUs, as NVML says through nvidia-smi; and the driver's and GPUs' versions."""
    try:
        text = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return [f"nvidia-smi doesn't answer: {error}"], {}
    rows = [[value.strip() for value in line.split(",")] for line in text.splitlines() if line.strip()]
    wrong = [] if len(rows) >= expected else [f"{len(rows)} GPUs, expected {expected}"]
    for number, row in enumerate(rows):
        values: dict[str, str] = dict(zip(QUERY, row, strict=False))
        wrong += [f"GPU {number}: {text}" for text in _gpu(values)]
    first: dict[str, str] = dict(zip(QUERY, rows[0], strict=False)) if rows else {}
    return wrong, {"driver": first.get("driver_version", ""), "GPU": first.get("name", "")}


def _gpu(values: Mapping[str, str]) -> list[str]:
    wrong = []
    ecc = values.get(QUERY[2], "0")
    if ecc.isdigit() and int(ecc):
        wrong.append(f"{ecc} uncorrected memory errors: reset it")
    wrong += [f"slowed down: {name.split('.')[1]}" for name in QUERY[3:5] if values.get(name) == "Active"]
    if values.get("remapped_rows.failure") not in (None, "0", "No", "[N/A]"):
        wrong.append("a bad memory row could not be replaced: exchange it")
    used = values.get("memory.used", "0")
    if used.isdigit() and int(used) > USED_MIB:
        wrong.append(f"{used} MiB are in use before the start: another process is there")
    return wrong


def _space(folder: Path, limits: Limits) -> list[str]:
    wrong = []
    temporary = Path(os.environ.get("TMPDIR", "/tmp"))
    for place, least in ((folder, limits.disk_gib), (temporary, limits.tmp_gib), (Path("/dev/shm"), limits.shm_gib)):
        try:
            free = shutil.disk_usage(place).free / GIB
        except OSError as error:
            wrong.append(f"{place}: {error.strerror}")
            continue
        if free < least:
            wrong.append(f"{place}: {free:.2f} GiB free, at least {least:g} are needed")
    status = os.statvfs(folder)
    if status.f_files and status.f_favail < limits.inodes:  # some file systems don't count
        wrong.append(f"{folder}: {status.f_favail} files can be made, at least {limits.inodes:g} are needed")
    return wrong


def _shared(folder: Path, limits: Limits) -> list[str]:
    """Writes, syncs and reads back a file of 16 MiB."""
    path = folder / f".write-{secrets.token_hex(8)}"  # nodes in namespaces may share names and process ids
    content = os.urandom(1024) * (WRITTEN_BYTES // 1024)
    try:
        start = time.monotonic()
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        speed = WRITTEN_BYTES / 1e6 / (time.monotonic() - start)
        same = path.read_bytes() == content
    except OSError as error:
        return [f"{folder}: can't be written: {error.strerror}"]
    finally:
        path.unlink(missing_ok=True)
    if not same:
        return [f"{folder}: reads back other bytes than were written"]
    return [f"{folder}: {speed:.0f} MB/s, at least {limits.shared_mb_s:g} are needed"] * (speed < limits.shared_mb_s)


def _resources(limits: Limits) -> list[str]:
    wrong = []
    for kind, name, least, unit in (
        (resource.RLIMIT_NOFILE, "open files (ulimit -n)", limits.nofile, 1),
        (resource.RLIMIT_MEMLOCK, "GiB of locked memory (ulimit -l)", limits.memlock_gib, GIB),
    ):
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY and hard / unit < least:
            wrong.append(f"{hard / unit:g} {name}, at least {least:g} are needed")
    return wrong


def _interface() -> list[str]:
    """The interface that NCCL and gloo were told to use is there and up."""
    wrong = []
    for name in {os.environ.get(variable, "") for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")}:
        exact = name.lstrip("=")
        if not exact or name.startswith("^") or "," in name:
            continue
        states = [path / "operstate" for path in Path("/sys/class/net").glob(f"{exact}*")]
        if not states:
            wrong.append(f"network interface {exact}: not there; found {sorted(os.listdir('/sys/class/net'))}")
        elif not any(state.read_text().strip() in ("up", "unknown") for state in states):
            wrong.append(f"network interface {exact}: down")
    return wrong
