"""The preflight of a Slurm job: one step over all its nodes, and what follows for each."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from launch.agent.job import read_json, write_json
from launch.preflight.judge import Judgement, judge
from launch.preflight.limits import read_limits
from launch.slurm.prepare import Settings

if TYPE_CHECKING:
    from launch.slurm.job import Stop


def preflight(run: Path, settings: Settings, hosts: Sequence[str], stop: Stop) -> dict[str, str]:
    """Runs it and returns the nodes to leave out, with the reason; slow ones only as far as spares replace them."""
    from launch.slurm.job import preflight_words, say

    limits = read_limits((settings.preflight or "").split())
    number = f"{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    folder = run / "preflight" / number
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with _clock() as address:
        stop.run(preflight_words(settings, folder, hosts, address), seconds=limits.seconds)
    reports = {host: report for host in hosts if (report := read_json(folder / f"{host}.json")) is not None}
    found = judge(hosts, reports, limits)
    write_json(folder / "judgement.json", {"bad": found.bad, "slow": found.slow})
    say(f"preflight: {len(hosts) - len(found.bad)} of {len(hosts)} nodes are good, {time.monotonic() - start:.1f} s")
    return left_out(found, hosts, nodes=settings.nodes)


def left_out(found: Judgement, hosts: Sequence[str], *, nodes: int) -> dict[str, str]:
    """The bad nodes, and as many slow ones as there are good nodes to spare; slow ones that stay are reported."""
    from launch.slurm.job import say

    out = {host: "; ".join(texts) for host, texts in found.bad.items()}
    for host, texts in found.slow.items():
        if host in out:
            continue
        if len(hosts) - len(out) > nodes:
            out[host] = "slow: " + "; ".join(texts)
        else:
            say(f"preflight: {host} is slow and stays, for there is no spare: {'; '.join(texts)}")
    return out


@contextmanager
def _clock() -> Iterator[str]:
    """Tells nodes this host's time over TCP; gives HOST:PORT."""
    with socket.create_server(("", 0)) as server:
        threading.Thread(target=_answer, args=(server,), daemon=True).start()
        yield f"{os.environ.get('SLURMD_NODENAME') or socket.gethostname()}:{server.getsockname()[1]}"


def _answer(server: socket.socket) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:  # closed
            return
        with connection:
            connection.settimeout(1)
            try:
                connection.recv(1)
                connection.sendall(repr(time.time()).encode())
            except OSError:
                continue
