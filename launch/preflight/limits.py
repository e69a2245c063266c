"""What a node must have and reach. Every limit can be given another value: `--limit NAME=VALUE`, site.env for Slurm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from mcore_swift.errors import InputError, nearest


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Smallest, or where it says so largest, values that are accepted."""

    disk_gib: float = 20.0  # free where the run's folder lies
    inodes: float = 10_000  # free there
    tmp_gib: float = 1.0  # free for temporary files
    shm_gib: float = 1.0  # free in /dev/shm: NCCL's and the data loader's buffers
    shared_mb_s: float = 10.0  # MB/s of a synced write in the run's folder
    nofile: float = 4096  # open files a process: sockets, shards, shared memory
    memlock_gib: float = 1.0  # memory that may be pinned; InfiniBand registers its buffers there
    clock_seconds: float = 1.0  # at most: from the nodes' median; file times and NCCL's timeouts are compared
    slow: float = 0.75  # share of the nodes' median speed below which a node is slow
    seconds: float = 60.0  # at most: for the whole preflight


def read_limits(words: Sequence[str]) -> Limits:
    """`NAME=VALUE` words over the defaults. Raises InputError."""
    limits, names = Limits(), [field.name for field in fields(Limits)]
    for word in words:
        name, _, text = word.partition("=")
        if name not in names:
            raise InputError(f"preflight: unknown limit {name!r}.{nearest(name, names)} Allowed: {', '.join(names)}")
        try:
            limits = replace(limits, **{name: float(text)})
        except ValueError:
            raise InputError(f"preflight: {name}: found {text!r}; it must be a number") from None
    return limits
