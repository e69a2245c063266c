"""The ranks of a run on this machine: joins those that torchrun or srun started, or forks its own.

Forking after one import of torch and Megatron starts every rank in a moment and shares the libraries' memory. It is
safe as long as the parent has neither touched CUDA nor started threads, so the parent only imports, waits, passes
signals on, and says why the run ended: a rank reports its exception through a pipe, because the exit code of a process
can't carry a message, and the first failure is the one that explains the others.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from types import FrameType

from mcore_swift import rank_env, stop
from mcore_swift.errors import (
    EXIT_FAILED,
    EXIT_INPUT,
    EXIT_NEVER_RESTART,
    EXIT_TRY_AGAIN,
    InputError,
    NeverRestart,
    StopRequested,
)

POLL_SECONDS = 0.05
SETTLE_SECONDS = 0.5  # after the first failure seen: the rank that caused it may still be on its way out
GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL
EXIT_INTERRUPTED = 128 + signal.SIGINT  # as a shell reports it
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1

Entry = Callable[[], int | None]


def launch(fn: Entry, *, ranks: int, preload: Callable[[], None], threads: int) -> int:
    """Runs `fn` in every rank and returns the run's exit code (`fn` returning None means 0).

    Under torchrun or srun this process is one rank, and `ranks` is not used. Otherwise `preload` (imports only) runs
    once and `fn` in `ranks` forked processes, or right here when there is one. The variables of `rank_env` are set for
    `fn`; `threads` CPU threads serve each rank's torch.

    Raises InputError as `fn` raised it in whichever rank failed first. Any other failure of a forked rank is printed
    with its rank and becomes exit code 1; that of a rank that runs right here propagates. StopRequested becomes 75,
    NeverRestart 93.
    """
    joined = rank_env.joined(os.environ)
    if joined is None and ranks > 1:
        return _fork(fn, ranks=ranks, preload=preload, threads=threads)
    environment = rank_env.local(rank=0, ranks=1, port=rank_env.free_port()) if joined is None else joined
    with _environment(environment | {"OMP_NUM_THREADS": str(threads)}):
        preload()
        _set_threads(threads)
        try:
            return fn() or 0
        except StopRequested as request:
            return _stopped(str(request))


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _set_threads(threads: int) -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def _stopped(message: str) -> int:
    print(f"mcore-swift: stopped: {message}", file=sys.stderr)
    return EXIT_TRY_AGAIN


# ---- the parent ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Report:
    """The exception that ended a rank."""

    kind: str  # input, stop, never, interrupt or failure
    message: str
    traceback: str
    time: float  # seconds of CLOCK_MONOTONIC, which all processes of a machine share


@dataclass
class _Child:
    rank: int
    pid: int
    pipe: int  # the end that the parent reads
    code: int | None = None  # None while it runs; negative: the signal that killed it
    ended: float = 0.0  # when it failed, or when its end was seen; CLOCK_MONOTONIC
    text: bytes = b""  # its report, as far as it came
    report: _Report | None = None

    @property
    def failed(self) -> bool:
        return self.code not in (None, 0, EXIT_TRY_AGAIN)

    @property
    def blame(self) -> tuple[int, float]:
        """Sorts failures: what a user or the kernel did, then exceptions and aborts, as peers of a lost rank see."""
        first = self.code == -signal.SIGKILL or (self.report is not None and self.report.kind in ("input", "interrupt"))
        return (0 if first else 1, self.ended)


def _fork(fn: Entry, *, ranks: int, preload: Callable[[], None], threads: int) -> int:
    with _environment({"OMP_NUM_THREADS": "1"}):  # read when torch is imported: no thread pool in the parent
        preload()
    torch = sys.modules.get("torch")
    assert torch is None or not torch.cuda.is_initialized(), "CUDA was initialized before the ranks were forked"
    port, parent = rank_env.free_port(), os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    children: list[_Child] = []
    for rank in range(ranks):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.environ.update(rank_env.local(rank=rank, ranks=ranks, port=port), OMP_NUM_THREADS=str(threads))
            _run_child(fn, parent=parent, pipe=write, threads=threads)
        os.close(write)
        os.set_blocking(read, False)
        children.append(_Child(rank, pid, read))
    with _forwarding(children) as forwarded:
        _pass_on(stop.FLAG.received, children)  # what came before the ranks were there
        try:
            return _wait(children, forwarded)
        finally:
            _end(children)


def _wait(children: list[_Child], forwarded: list[int]) -> int:
    """Waits for all ranks, or for the first failure; returns the exit code or raises InputError."""
    while _poll(children) and not any(child.failed for child in children):
        time.sleep(POLL_SECONDS)
    if any(child.failed for child in children):
        deadline = time.monotonic() + SETTLE_SECONDS
        while _poll(children) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return _explain(min((child for child in children if child.failed), key=lambda child: child.blame), forwarded)
    stopped = [child for child in children if child.code == EXIT_TRY_AGAIN]
    return _stopped(stopped[0].report.message if stopped[0].report else "by a rank") if stopped else 0


def _explain(child: _Child, forwarded: list[int]) -> int:
    """Says why the rank that failed first did; returns the exit code or raises what the caller is to handle."""
    code, report = child.code, child.report
    assert code
    if report is not None and report.kind == "input":
        raise InputError(report.message)
    if report is not None and report.kind == "interrupt":
        raise KeyboardInterrupt
    if report is not None and report.kind == "never":
        raise NeverRestart(report.message)
    if report is not None:
        print(f"mcore-swift: rank {child.rank} failed:\n{report.traceback}", file=sys.stderr, end="")
        return code
    if code > 0:
        print(f"mcore-swift: rank {child.rank} ended with exit code {code}", file=sys.stderr)
        return code
    if -code in forwarded:
        return 128 - code  # as a shell reports it
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    print(
        f"mcore-swift: rank {child.rank} was killed by signal {-code}, {signal.Signals(-code).name}{hint}",
        file=sys.stderr,
    )
    return EXIT_FAILED


def _poll(children: list[_Child]) -> bool:
    """Notes what the ranks reported and which have ended; returns whether some still run."""
    for child in children:
        if child.code is not None:
            continue
        pid, status = os.waitpid(child.pid, os.WNOHANG)
        with contextlib.suppress(BlockingIOError):  # nothing there
            child.text += os.read(child.pipe, 1 << 20)
        if pid:
            child.code = os.waitstatus_to_exitcode(status)
            child.report = _Report(**json.loads(child.text)) if child.text and child.code >= 0 else None
            child.ended = child.report.time if child.report else time.monotonic()
    return any(child.code is None for child in children)


@contextlib.contextmanager
def _forwarding(children: list[_Child]) -> Iterator[list[int]]:
    """Passes signals on to the ranks; gives the list of those that came. The second Ctrl-C waits no longer."""
    came: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        came.append(number)
        _pass_on(number, children)
        if number == signal.SIGINT and came.count(number) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pass_on(number: int, children: list[_Child]) -> None:
    for child in children if number else ():
        if child.code is None:
            os.kill(child.pid, number)


def _end(children: list[_Child]) -> None:
    """Ends the ranks that still run: SIGTERM, then SIGKILL to them and to what they started."""
    for child in children:
        if child.code is None:
            os.kill(child.pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while _poll(children) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    for child in children:
        if child.code is None:
            with contextlib.suppress(ProcessLookupError):  # it never came to have a group of its own
                os.killpg(child.pid, signal.SIGKILL)
            os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)
        os.close(child.pipe)


# ---- a forked rank ---------------------------------------------------------------------------------------------------


def _run_child(fn: Entry, *, parent: int, pipe: int, threads: int) -> None:
    """Runs `fn`, reports how it ended, and leaves the process: nothing of the parent's may run a second time."""
    code = EXIT_FAILED
    try:
        _die_with(parent)
        os.setpgid(0, 0)  # a terminal's Ctrl-C reaches the parent alone, which passes it on once
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in stop.STOP_SIGNALS:  # one that comes before the rank is ready must not kill it without a word
            signal.signal(number, stop.FLAG.receive if stop.FLAG.installed else signal.SIG_DFL)
        _set_threads(threads)
        code = fn() or 0
    except BaseException as error:
        code, kind = _exit_code(error)
        text = "".join(traceback.format_exception(error))
        report = _Report(kind=kind, message=str(error), traceback=text, time=time.monotonic())
        with os.fdopen(pipe, "wb") as stream:
            stream.write(json.dumps(asdict(report)).encode())
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _exit_code(error: BaseException) -> tuple[int, str]:
    kinds: list[tuple[type[BaseException], int, str]] = [
        (InputError, EXIT_INPUT, "input"),
        (StopRequested, EXIT_TRY_AGAIN, "stop"),
        (NeverRestart, EXIT_NEVER_RESTART, "never"),
        (KeyboardInterrupt, EXIT_INTERRUPTED, "interrupt"),
    ]
    return next(((code, kind) for known, code, kind in kinds if isinstance(error, known)), (EXIT_FAILED, "failure"))


def _die_with(parent: int) -> None:
    """Has the kernel kill this process when the parent dies, however it dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel was told
        os._exit(EXIT_FAILED)
