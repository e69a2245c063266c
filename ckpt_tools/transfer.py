"""The bulk of a conversion: rows from files into files, by one process or several, and what has been done so far.

A piece of a megabyte is read, looked through for NaN and Inf, and written while it is in the processor's cache, so
memory stays small whatever the model's size. Each finished task is a line in its worker's journal: a conversion that
was killed goes on where it stood.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from ckpt_tools.decode import BLOCK, decode_fp8
from ckpt_tools.plan import Task, Transfer
from ckpt_tools.source import as_bytes, as_tensor, read_expert, torch_dtype
from ckpt_tools.stored import Files, Stored, read_rows, row_chunks
from mcore_swift.errors import InputError
from mcore_swift.weights.rules import TensorRule

PIECE_BYTES = 1 << 20
PR_SET_PDEATHSIG = 1  # linux/prctl.h
SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
_LIBC = ctypes.CDLL(None)
# For each dtype: signed and unsigned integers of its width, and its +Inf's bits. A value is finite when its bits,
# without the sign, are less: two maxima decide it for a whole piece.
_BITS = {
    "F32": (np.int32, np.uint32, 0x7F800000),
    "F16": (np.int16, np.uint16, 0x7C00),
    "BF16": (np.int16, np.uint16, 0x7F80),
}


@dataclass
class Done:
    """A finished task: its number, bytes written, and how many values are NaN or infinite."""

    number: int
    nbytes: int
    nonfinite: int


@dataclass
class Worker:
    """Copies tasks of one transfer. Holds open files and a few buffers."""

    transfer: Transfer
    sources: Files = field(default_factory=Files)
    targets: Files = field(default_factory=lambda: Files(os.O_WRONLY))
    _scales: dict[str, Any] = field(default_factory=dict)

    def run(self, number: int) -> Done:
        """Copies task `number`. Raises InputError when a source file ends too early, OSError when writing fails."""
        task = self.transfer.tasks[number]
        target = self.transfer.targets[task.name]
        block = target.blocks[task.block]
        nonfinite = 0
        rule = self.transfer.packed(task.name)
        for first, piece in self._experts(rule, task, target) if rule else self._pieces(task, target):
            nonfinite += count_nonfinite(piece, target.dtype)
            start = block.start + (first - block.offset[0]) * target.row_bytes
            _write(self.targets[block.file], memoryview(piece), start)
        _start_writeback(self.targets[block.file], block.start, task, target)
        return Done(number, (task.last - task.first) * target.row_bytes, nonfinite)

    def _pieces(self, task: Task, target: Stored) -> Iterator[tuple[int, np.ndarray]]:
        """A task's bytes piece by piece in one buffer, each with its first row."""
        out = np.empty(min(PIECE_BYTES + target.row_bytes, (task.last - task.first) * target.row_bytes), np.uint8)
        for first, last in row_chunks(task.first, task.last, target.row_bytes, budget=PIECE_BYTES):
            piece = out[: (last - first) * target.row_bytes]
            self._fill(piece, task, target, first, last)
            yield first, piece

    def _experts(self, rule: TensorRule, task: Task, target: Stored) -> Iterator[tuple[int, np.ndarray]]:
        """The same for a target with packed experts on either side: an expert is read, and turned, as a whole."""
        rows = self.transfer.expert_rows(task.name)
        for expert in range(task.first // rows, -(-task.last // rows)):
            start = expert * rows
            first, last = max(task.first, start), min(task.last, start + rows)
            own = self._expert(rule, expert)[first - start : last - start].to(torch_dtype(target.dtype))
            yield first, as_bytes(own)

    def _expert(self, rule: TensorRule, expert: int) -> Any:
        name = rule.hf[0]
        if self.transfer.to_megatron:
            scales = self.transfer.scales.get(name)
            return rule.unpack(read_expert(self.transfer.sources[name], scales, expert, self.sources))
        stored = self.transfer.sources[rule.key]
        rows = stored.shape[0] // rule.stack
        raw = np.empty(rows * stored.row_bytes, np.uint8)
        read_rows(stored, expert * rows, (expert + 1) * rows, raw, self.sources)
        return rule.pack(as_tensor(raw, stored.dtype, (rows, *stored.shape[1:])))

    def _fill(self, out: np.ndarray, task: Task, target: Stored, first: int, last: int) -> None:
        for name, low, high, row in self.transfer.segments(task.name, first, last):
            source = self.transfer.sources[name]
            part = out[row * target.row_bytes : (row + high - low) * target.row_bytes]
            if source.dtype == target.dtype:
                read_rows(source, low, high, part, self.sources)
            else:
                self._decode(part, name, source, target, low, high)

    def _decode(self, out: np.ndarray, name: str, source: Stored, target: Stored, low: int, high: int) -> None:
        raw = np.empty((high - low) * source.row_bytes, np.uint8)
        read_rows(source, low, high, raw, self.sources)
        values = as_tensor(raw, source.dtype, (high - low, *source.shape[1:]))
        if name in self.transfer.scales:
            values = decode_fp8(values, self._scale(name, low, high), first_row=low % BLOCK)
        as_tensor(out, target.dtype, (high - low, *target.shape[1:])).copy_(values.to(torch_dtype(target.dtype)))

    def _scale(self, name: str, low: int, high: int) -> Any:
        scales = self.transfer.scales[name]
        first, last = low // BLOCK, -(-high // BLOCK)
        raw = np.empty((last - first) * scales.row_bytes, np.uint8)
        read_rows(scales, first, last, raw, self.sources)
        return as_tensor(raw, scales.dtype, (last - first, *scales.shape[1:]))

    def close(self) -> None:
        self.sources.close()
        self.targets.close()


def count_nonfinite(data: np.ndarray, dtype: str) -> int:
    """How many values of raw bytes, uint8 [n], are NaN or infinite."""
    signed, unsigned, infinity = _BITS[dtype]
    if not data.size:
        return 0
    sign = 1 << (8 * np.dtype(unsigned).itemsize - 1)
    if data.view(signed).max() < infinity and data.view(unsigned).max() < sign + infinity:
        return 0
    return int(((data.view(unsigned) & unsigned(sign - 1)) >= infinity).sum())


def _write(descriptor: int, data: memoryview, start: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, start)
        data, start = data[count:], start + count


def _start_writeback(descriptor: int, start: int, task: Task, target: Stored) -> None:
    """Asks the kernel to begin to write the task's bytes to the disk, so that the sync at the end has less to wait for.

    Advice only: where the file system doesn't know it, nothing happens.
    """
    length = (task.last - task.first) * target.row_bytes
    offset = start + (task.first - target.blocks[task.block].offset[0]) * target.row_bytes
    _LIBC.sync_file_range(
        descriptor, ctypes.c_int64(offset), ctypes.c_int64(length), ctypes.c_uint(SYNC_FILE_RANGE_WRITE)
    )


# --- the journal ------------------------------------------------------------------------------------------------------


def read_journal(folder: Path) -> dict[int, int]:
    """Finished tasks → number of their NaN and Inf values. A line that a kill cut short counts for nothing."""
    done = {}
    for path in folder.glob("worker-*"):
        for line in path.read_text().splitlines(keepends=True):
            words = line.split()
            if line.endswith("\n") and len(words) == 2:
                done[int(words[0])] = int(words[1])
    return done


class Journal:
    """One worker's journal; a line is written when the task's bytes are with the operating system."""

    def __init__(self, folder: Path) -> None:
        self._file = os.open(folder / f"worker-{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(self._file, b"\n")  # ends the line that another process of this number may have been killed in

    def add(self, done: Done) -> None:
        os.write(self._file, f"{done.number} {done.nonfinite}\n".encode())

    def close(self) -> None:
        os.close(self._file)


# --- workers ----------------------------------------------------------------------------------------------------------


def run_tasks(transfer: Transfer, numbers: list[int], journal: Path, *, workers: int) -> Iterator[Done]:
    """Runs tasks in `workers` processes, or in this one; yields each as it is done (also if it was not finite).

    Raises what a worker ran into: InputError, OSError; RuntimeError when one died.
    """
    if workers > 1 and len(numbers) > 1:
        yield from _run_forked(transfer, numbers, journal, workers=min(workers, len(numbers)))
        return
    worker, log = Worker(transfer), Journal(journal)
    try:
        for number in numbers:
            done = worker.run(number)
            log.add(done)
            yield done
    finally:
        worker.close()
        log.close()


def _run_forked(transfer: Transfer, numbers: list[int], journal: Path, *, workers: int) -> Iterator[Done]:
    context = multiprocessing.get_context("fork")  # the plan is shared as it lies in memory, torch is imported once
    position = context.Value("q", 0)
    processes: dict[Any, Any] = {}
    for _ in range(workers):
        reader, writer = context.Pipe(duplex=False)
        arguments = (transfer, numbers, journal, position, writer, os.getpid())
        process = context.Process(target=_child, args=arguments, daemon=True)
        process.start()
        writer.close()
        processes[reader] = process
    try:
        while processes:
            for reader in wait(list(processes)):
                message = _receive(reader)
                if message is None:
                    process = processes.pop(reader)
                    process.join()
                    if process.exitcode:
                        raise RuntimeError(f"a worker died (exit code {process.exitcode}); the same command goes on")
                elif isinstance(message, Done):
                    yield message
                else:
                    raise message
    finally:
        for process in processes.values():
            process.kill()
            process.join()


def _receive(reader: Any) -> Any:
    try:
        return reader.recv()
    except EOFError:
        return None


def _child(
    transfer: Transfer, numbers: list[int], journal: Path, position: Any, writer: Connection, parent: int
) -> None:
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a worker must not write on after the lock is gone
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    if os.getppid() != parent:
        os._exit(1)
    import torch

    torch.set_num_threads(1)  # threads of OpenMP don't survive a fork, and workers are the parallelism here
    worker, log = Worker(transfer), Journal(journal)
    try:
        while True:
            with position.get_lock():
                index, position.value = position.value, position.value + 1
            if index >= len(numbers):
                return
            done = worker.run(numbers[index])
            log.add(done)
            writer.send(done)
    except (InputError, OSError) as error:
        writer.send(error)
    finally:
        worker.close()
        log.close()
