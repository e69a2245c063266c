"""Runs a test's ranks as forks of the pytest process: megatron is imported once and a case costs about a second.

`run_ranks(fn, 4, argument)` calls `fn(argument)` in four processes that find RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT in their environment, and returns what they returned. `prepared()` imports what they share; it installs the
CPU platform in this process too, which must happen before megatron's first import.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib
import logging
import os
import pickle
import random
import selectors
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

import torch

from mcore_swift.platform import Platform, select

SHARED = (
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.distributed.finalize_model_grads",
    "megatron.core.models.mimo",  # its optimizer asks for it
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "mcore_swift.models.layers",
    "mcore_swift.peft.adapters",
    "mcore_swift.training.checkpoint",
    "mcore_swift.training.optimizer_state",
    "mcore_swift.training.setup",
    "mcore_swift.training.step",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
)
GRACE = 5.0  # seconds that the other ranks have to report once one has failed
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class RankFailure(AssertionError):
    """A rank raised, died or ran out of time. The message starts with the traceback of the first to fail."""


@functools.cache
def prepared() -> Platform:
    """Imports what the ranks need, once, and returns the CPU platform, installed in this process."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    platform = select("cpu")
    platform.install()
    logging.getLogger("megatron").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in SHARED:
            importlib.import_module(module)
    return platform


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Calls `fn(*args)` on `world_size` forked ranks; returns their results (pickled through pipes) in rank order.

    Raises RankFailure when a rank raises, dies, or is not done after `timeout` seconds. No rank outlives the call.
    """
    prepared()
    torch.set_num_threads(1)  # another test may have raised it: a fork of a process with an OpenMP pool hangs in it
    _forget_process_groups()
    sys.stdout.flush()
    sys.stderr.flush()
    port = _free_port()
    ranks: list[_Rank] = []
    try:
        for number in range(world_size):
            ranks.append(_start(number, world_size, port, fn, args, [rank.pipe for rank in ranks]))
        order = _collect(ranks, timeout)
    finally:
        for rank in ranks:
            rank.end()
    failures = [rank for rank in order if not rank.succeeded] + [rank for rank in ranks if rank not in order]
    if failures:
        stories = [rank.story(world_size, timeout) for rank in failures]
        others = [f"{story.splitlines()[0].split(':')[0]}: {story.splitlines()[-1]}" for story in stories[1:]]
        raise RankFailure("\n".join([stories[0].rstrip(), *others]))
    return [rank.result for rank in ranks]


def _forget_process_groups() -> None:
    """Lets go of the process groups of tests that ran in this process. Megatron's rotary embeddings remember their last
    32 arguments, groups among them. A fork that drops one waits for ever: the group's threads are not there."""
    from megatron.core.models.common.embeddings import rotary_pos_embedding, yarn_rotary_pos_embedding

    for kind in (rotary_pos_embedding.RotaryEmbedding, yarn_rotary_pos_embedding.YarnRotaryEmbedding):
        cast(Any, kind.forward).cache_clear()


def in_fork[**P](test: Callable[P, None]) -> Callable[P, None]:
    """A test that runs in a fork: after a backward pass in this process, torch refuses one in its later forks."""

    @functools.wraps(test)
    def forked(*args: P.args, **kwargs: P.kwargs) -> None:
        run_ranks(functools.partial(test, *args, **kwargs), 1)

    return forked


@dataclass(eq=False)
class _Rank:
    """A forked rank as its parent sees it. It sends one pickle: (succeeded, result or traceback)."""

    number: int
    pid: int
    pipe: int
    received: bytearray = field(default_factory=bytearray)
    succeeded: bool = False
    result: Any = None
    done: bool = False

    def read(self) -> bool:
        """Takes what the pipe has; True once the rank has closed it."""
        part = os.read(self.pipe, 1 << 20)
        self.received += part
        if not part:
            self.done = True
            with contextlib.suppress(EOFError, pickle.UnpicklingError):  # died before it had sent all
                self.succeeded, self.result = pickle.loads(bytes(self.received))
        return self.done

    def end(self) -> None:
        if not self.done:
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.pipe)

    def story(self, world_size: int, timeout: float) -> str:
        what = self.result or ("died without a word" if self.done else f"not done (time limit {timeout:.0f} s)")
        return f"--- rank {self.number} of {world_size}: {what}"


def _collect(ranks: list[_Rank], timeout: float) -> list[_Rank]:
    """Reads all pipes until they are closed or time is up; returns the ranks that are done, in that order."""
    order: list[_Rank] = []
    deadline = time.monotonic() + timeout
    with selectors.DefaultSelector() as selector:
        for rank in ranks:
            selector.register(rank.pipe, selectors.EVENT_READ, rank)
        while len(order) < len(ranks) and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                if key.data.read():
                    selector.unregister(key.fileobj)
                    order.append(key.data)
                    if not key.data.succeeded:
                        deadline = min(deadline, time.monotonic() + GRACE)
    return order


def _start(
    number: int, world_size: int, port: int, fn: Callable[..., Any], args: tuple[Any, ...], siblings: list[int]
) -> _Rank:
    reader, writer = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        for pipe in (reader, *siblings):
            os.close(pipe)
        _child(number, world_size, port, parent, writer, fn, args)
    os.close(writer)
    return _Rank(number, pid, reader)


def _child(
    number: int, world_size: int, port: int, parent: int, writer: int, fn: Callable[..., Any], args: tuple[Any, ...]
) -> NoReturn:
    """A rank's life. It always ends in os._exit: unwinding would run the parent's pytest teardown a second time."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        os.environ |= {
            "RANK": str(number),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        gc.freeze()  # nor may the collector end one: see `_forget_process_groups`
        # After a fork the first call rebuilds torch's thread pool: two autograd threads at once would crash in it.
        torch.set_num_threads(1)
        torch.manual_seed(number)  # ranks that agree must not owe it to a shared random state
        try:
            message = pickle.dumps((True, fn(*args)))
        except BaseException:
            message = pickle.dumps((False, traceback.format_exc()))
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(message)
        sys.stdout.flush()
        sys.stderr.flush()
        code = 0
    finally:
        os._exit(code)


def _free_port() -> int:
    """A port below those that the kernel hands out: one of theirs could be a connection's before rank 0 listens."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
