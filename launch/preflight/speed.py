"""Matrix products and all-reduces on a node and between pairs of nodes: what only shows when it is used.

Every stage runs in forks of this process, one a GPU (or one on the CPU), which has imported torch but not touched CUDA:
a stage that hangs is killed, and the next one starts afresh.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta

PORTS = 20_000, 12_000  # the first and how many
PRODUCT_SIZE = {"cuda": 8192, "cpu": 384}
REDUCED_BYTES = {"cuda": 256 * 2**20, "cpu": 2**20}
REPETITIONS = 5


def node(*, gpus: int, port: int, seconds: float) -> dict[str, float | str]:
    """{gemm: TFLOP/s of the slowest GPU, all_reduce: GB/s of the node's ranks} or {error: text}."""
    ranks = max(1, gpus)
    found = _in_forks(
        lambda local: _stage(local, ranks, f"127.0.0.1:{port}", gpus, seconds, product=True), ranks, seconds
    )
    if isinstance(found, str):
        return {"error": found}
    return {"gemm": min(speed for speed, _ in found), "all_reduce": min(speed for _, speed in found)}


def pair(first: str, second: str, me: str, *, gpus: int, port: int, seconds: float) -> dict[str, float | str]:
    """{all_reduce: GB/s of both nodes' ranks} or {error: text}; both nodes call it."""
    ranks, offset = max(1, gpus), 0 if me == first else max(1, gpus)
    found = _in_forks(
        lambda local: _stage(offset + local, 2 * ranks, f"{first}:{port}", gpus, seconds, product=False), ranks, seconds
    )
    return {"error": found} if isinstance(found, str) else {"all_reduce": min(speed for _, speed in found)}


def rounds(hosts: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Pairs of neighbours on a ring, so that every node meets two others; one round of a pair at a time for each."""
    even = [(hosts[index], hosts[index + 1]) for index in range(0, len(hosts) - 1, 2)]
    odd = [(hosts[index], hosts[index + 1]) for index in range(1, len(hosts) - 1, 2)]
    if len(hosts) > 2 and len(hosts) % 2 == 0:
        odd.append((hosts[-1], hosts[0]))
    return [pairs for pairs in (even, odd) if pairs]


def port_of(*words: object) -> int:
    first, count = PORTS
    return first + zlib.crc32(" ".join(map(str, words)).encode()) % count


# --- in a fork --------------------------------------------------------------------------------------------------------


def _stage(rank: int, ranks: int, address: str, gpus: int, seconds: float, *, product: bool) -> tuple[float, float]:
    """One rank: (TFLOP/s of a matrix product, GB/s of an all-reduce)."""
    import torch
    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[reportPrivateImportUsage]

    device = torch.device("cuda", rank % gpus) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    flops = _product(device) if product else 0.0
    host, _, port = address.rpartition(":")
    store = TCPStore(host, int(port), ranks, is_master=rank == 0, timeout=timedelta(seconds=seconds))
    backend = "nccl" if gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=seconds))
    speed = _all_reduce(device, ranks)
    dist.barrier()  # nobody takes the store away from the others
    return flops, speed


def _product(device: object) -> float:
    import torch

    on_gpu = torch.device(device).type == "cuda"  # type: ignore[arg-type]
    size, dtype = PRODUCT_SIZE["cuda" if on_gpu else "cpu"], torch.bfloat16 if on_gpu else torch.float32
    a = torch.ones(size, size, device=device, dtype=dtype)  # type: ignore[arg-type]
    seconds = _timed(lambda: a @ a, on_gpu)
    if float((a @ a)[-1, -1]) != size:
        raise RuntimeError(f"a matrix product of ones of size {size} has a wrong element: this device computes wrongly")
    return 2 * size**3 / seconds / 1e12


def _all_reduce(device: object, ranks: int) -> float:
    """Bytes of the tensor a second, in GB/s."""
    import torch
    import torch.distributed as dist

    on_gpu = torch.device(device).type == "cuda"  # type: ignore[arg-type]
    count = REDUCED_BYTES["cuda" if on_gpu else "cpu"] // 4
    x = torch.ones(count, device=device)  # type: ignore[arg-type]
    dist.all_reduce(x)
    if float(x.min()) != ranks or float(x.max()) != ranks:
        raise RuntimeError(f"an all-reduce of ones over {ranks} ranks gives {float(x.min())} to {float(x.max())}")
    x.zero_()
    return 4 * count / _timed(lambda: dist.all_reduce(x), on_gpu) / 1e9


def _timed(work: Callable[[], object], on_gpu: bool) -> float:
    """Seconds of the fastest of a few repetitions."""
    import torch

    best = float("inf")
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


# --- forks ------------------------------------------------------------------------------------------------------------


def _in_forks(
    work: Callable[[int], tuple[float, float]], count: int, seconds: float
) -> list[tuple[float, float]] | str:
    """Each fork's two numbers, or the first error; forks that are not done in `seconds` are killed."""
    pipes, pids = [], []
    for local in range(count):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            _fork_main(work, local, write)
        os.close(write)
        pipes.append(read)
        pids.append(pid)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not all(os.waitid(os.P_PID, pid, _EXITED) for pid in pids):
        time.sleep(0.02)
    late = 0
    for pid in pids:
        if os.waitid(os.P_PID, pid, _EXITED) is None:
            late += 1
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    answers = []
    for pipe in pipes:
        with os.fdopen(pipe, "rb") as file:
            answers.append(file.read())
    errors = [answer[1:].decode(errors="replace") for answer in answers if answer[:1] == b"!"]
    if errors:
        return errors[0]
    if late or not all(answers):
        return f"no answer within {seconds:.0f} s" if late else "a process of the test died"
    return [struct.unpack("dd", answer) for answer in answers]


_EXITED = os.WEXITED | os.WNOHANG | os.WNOWAIT


def _fork_main(work: Callable[[int], tuple[float, float]], local: int, pipe: int) -> None:
    try:
        answer = struct.pack("dd", *work(local))
    except BaseException as error:
        answer = f"!{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:500].encode()
    with contextlib.suppress(OSError):
        os.write(pipe, answer)
    os._exit(0)
