"""`mcore-swift convert`: Hugging Face ↔ Megatron as a copy of byte ranges: no model, no GPU, no process group.

DST is written as `.DST.partial` beside it and appears by one rename, whole. A run that was killed leaves the partial
folder with a journal, and the same command goes on from there; a lock keeps two conversions out of one DST.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ckpt_tools import transfer as engine
from ckpt_tools.partial import DTYPES, Job, Part, fingerprint_of, finish, locked, prepare
from ckpt_tools.plan import plan_transfer
from ckpt_tools.source import HFSource, MegatronSource, is_gguf, open_source
from ckpt_tools.torch_dist import optimizer_bytes, optimizer_states
from mcore_swift.errors import InputError
from mcore_swift.weights.dist_index import read_index

MAX_SHARD_BYTES = 5 * 10**9
WORKERS = 4  # they wait for the disk half of their time: 4 were fastest on 2 cores (perf/results)
USUAL_SPEED = 500e6  # bytes a second, for the estimate of --dry-run
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Report:
    """What a conversion did, or would do (`seconds` is then an estimate)."""

    direction: str
    tensors: int
    files: int
    bytes_read: int
    bytes_written: int
    seconds: float
    resumed: int = 0  # bytes that an earlier, interrupted run had written
    nonfinite: dict[str, int] = field(default_factory=dict)  # tensor → its NaN and infinite values
    left_aside: int = 0  # bytes of optimizer state that was not asked for

    def line(self) -> str:
        speed = (self.bytes_written - self.resumed) / max(self.seconds, 1e-9) / 1e6
        resumed = f", {_size(self.resumed)} of them by an earlier run" if self.resumed else ""
        return (
            f"{self.direction}: {self.tensors} tensors, {_size(self.bytes_written)} in {self.files} files{resumed},"
            f" {self.seconds:.1f} s ({speed:,.0f} MB/s)"
        )


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB, 2GiB. Raises InputError for anything else, and for less than 1 MB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)", text.strip(), re.IGNORECASE)
    unit = match[2].upper() if match else "?"
    unit = unit if unit.endswith("B") or not unit else f"{unit}B"
    size = int(float(match[1]) * _UNITS[unit]) if match and unit in _UNITS else 0
    if size < 10**6:
        raise InputError(f"--max-shard-size: found {text!r}; allowed is a size of at least 1MB such as 5GB or 500MB")
    return size


def convert(
    source: str | Path,
    destination: Path,
    *,
    dtype: str | None = None,
    workers: int | None = None,
    max_shard_size: int | None = None,
    dry_run: bool = False,
    config: Path | None = None,
    strict: bool = False,
    download: bool = False,
    optimizer: bool = False,
) -> Report:
    """Converts Hugging Face → Megatron, Megatron → Hugging Face, or GGUF → Hugging Face: found from the contents.

    source: a path, or a hub id, which is looked up in the local cache (and downloaded only with `download`).
    dtype: bf16, fp16 or fp32 for all tensors; None keeps each one's own. max_shard_size: bytes of a file.
    strict: NaN and Inf are refused. optimizer: what a Megatron checkpoint's optimizer holds of each weight (Adam's
    moments; fp32 weights where the model's are coarser) goes to DST/optimizer/NAME, safetensors of the weights' names,
    in the dtype that it is stored in. Raises InputError for whatever is wrong with the input, before DST exists.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype: found {dtype!r}; allowed: {', '.join(DTYPES)}")
    destination = Path(os.path.abspath(destination))
    path = find_source(source, download=download)
    _check_destination(path, destination)
    if is_gguf(path):
        if optimizer:
            raise InputError(f"{path}: a GGUF file holds no optimizer state (--optimizer)")
        return _convert_gguf(path, destination, dtype, max_shard_size=max_shard_size, config=config, dry_run=dry_run)
    opened = open_source(path, config=config)
    partial = destination.with_name(f".{destination.name}.partial")
    bulk, layout = plan_transfer(
        opened, partial, dtype=DTYPES.get(dtype or ""), max_shard_bytes=max_shard_size or MAX_SHARD_BYTES
    )
    job = Job(opened, destination, dtype, [Part(opened, bulk, layout, partial)])
    if optimizer:
        job.parts.extend(_optimizer_parts(opened, partial, max_shard_bytes=max_shard_size or MAX_SHARD_BYTES))
    planned = Report(
        direction="Hugging Face → Megatron" if bulk.to_megatron else "Megatron → Hugging Face",
        tensors=sum(len(part.bulk.targets) for part in job.parts),
        files=sum(len(part.layout.sizes) for part in job.parts),
        bytes_read=sum(part.bulk.bytes_read for part in job.parts),
        bytes_written=(written := sum(part.bulk.nbytes for part in job.parts)),
        seconds=written / USUAL_SPEED,
        left_aside=0 if bulk.to_megatron or optimizer else optimizer_bytes(read_index(opened.path)),
    )
    if dry_run:
        return planned
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with locked(destination):
            return _run(job, planned, workers=workers or WORKERS, strict=strict)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            shutil.rmtree(partial, ignore_errors=True)
            needed = sum(sum(part.layout.sizes.values()) for part in job.parts)
            raise InputError(
                f"{destination}: {error.strerror}: {_size(needed)} are needed,"
                f" {_size(shutil.disk_usage(destination.parent).free)} are free; nothing was left there"
            ) from error
        place = "" if error.filename is None else f"{error.filename}: "
        raise InputError(f"{destination}: can't be written: {place}{error.strerror or error}") from error


def _optimizer_parts(source: HFSource | MegatronSource, partial: Path, *, max_shard_bytes: int) -> Iterator[Part]:
    """A part for each kind of state. Raises InputError when there is none."""
    states = optimizer_states(read_index(source.path)) if isinstance(source, MegatronSource) else []
    if not states or not isinstance(source, MegatronSource):
        raise InputError(
            f"{source.path}: holds no optimizer state (--optimizer); a checkpoint that `mcore-swift train` wrote with"
            " checkpoint.optimizer=true does"
        )
    for name in states:
        state = MegatronSource(source.path, config=source.config, state=name)
        folder = partial / "optimizer" / name
        yield Part(state, *plan_transfer(state, folder, dtype=None, max_shard_bytes=max_shard_bytes), folder)


def _run(job: Job, planned: Report, *, workers: int, strict: bool) -> Report:
    begun = time.perf_counter()
    if job.destination.exists():  # the one who had the lock before has finished it
        raise InputError(f"{job.destination}: exists already; name a folder that doesn't")
    fingerprint = fingerprint_of(job)
    left: list[list[int]] = []
    resumed = planned.bytes_written
    bad: dict[str, int] = {}

    def count(part: Part, number: int, values: int) -> None:
        name = part.bulk.tasks[number].name
        if values:
            bad[name] = bad.get(name, 0) + values
        if values and strict:
            raise InputError(f"{job.source.path}: tensor {name} has {values} NaN or infinite values (--strict)")

    try:
        prepare(job, fingerprint)
        for part in job.parts:
            earlier = engine.read_journal(part.journal)
            left.append([number for number in range(len(part.bulk.tasks)) if number not in earlier])
            resumed -= sum(_task_bytes(part.bulk, number) for number in left[-1])
            for number, values in earlier.items():
                count(part, number, values)
        with _progress(planned.bytes_written, resumed) as advance:
            for part, numbers in zip(job.parts, left, strict=True):
                for done in engine.run_tasks(part.bulk, numbers, part.journal, workers=workers):
                    advance(done.nbytes)
                    count(part, done.number, done.nonfinite)
    except InputError:  # going on would not help: nothing half-written stays
        shutil.rmtree(job.partial, ignore_errors=True)
        raise
    finish(job)
    return replace(planned, seconds=time.perf_counter() - begun, resumed=resumed, nonfinite=bad)


def _task_bytes(bulk: engine.Transfer, number: int) -> int:
    task = bulk.tasks[number]
    return (task.last - task.first) * bulk.targets[task.name].row_bytes


# --- the source and the destination -----------------------------------------------------------------------------------


def find_source(source: str | Path, *, download: bool) -> Path:
    """The path of `source`: itself, or the snapshot of a hub id in the local cache. Raises InputError if not there."""
    path = Path(source)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or str(source).startswith("."):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), local_files_only=not download))
    except (LocalEntryNotFoundError, HFValidationError):
        hint = "it could not be downloaded" if download else "--download fetches it"
        raise InputError(
            f"{source}: no such folder, and no model of this name in the hub's local cache; {hint}"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise InputError(f"{source}: could not be downloaded: {error}") from None


def _check_destination(source: Path, destination: Path) -> None:
    if destination.exists() or destination.is_symlink():
        raise InputError(f"{destination}: exists already; name a folder that doesn't")
    if source.is_dir() and destination.resolve().is_relative_to(source.resolve()):
        raise InputError(f"{destination}: lies inside the source {source}; name a folder outside")


# --- GGUF -------------------------------------------------------------------------------------------------------------


def _convert_gguf(
    path: Path,
    destination: Path,
    dtype: str | None,
    *,
    max_shard_size: int | None,
    config: Path | None,
    dry_run: bool,
) -> Report:
    from ckpt_tools.gguf import GGUFFile, convert_gguf

    if max_shard_size is not None or config is not None:
        option = "--config" if config is not None else "--max-shard-size"
        raise InputError(
            f"{option} can't be used with a GGUF file: its folder gets one weights file and its own config"
        )
    tensors = GGUFFile(path).tensors.values()
    width = 4 if dtype == "fp32" else 2
    size = sum(int(tensor.n_elements) for tensor in tensors) * width
    begun = time.perf_counter()
    if not dry_run:
        convert_gguf(path, destination, dtype=dtype or "bf16")
    seconds = size / (USUAL_SPEED / 10) if dry_run else time.perf_counter() - begun
    return Report("GGUF → Hugging Face", len(tensors), 1, path.stat().st_size, size, seconds)


# --- what a person sees -----------------------------------------------------------------------------------------------


def _size(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


@contextlib.contextmanager
def _progress(total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal with MB/s; nothing where there is none."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("convert", total=total, completed=done)
        yield lambda count: bar.advance(task, count)


def convert_verb(*, source: str, destination: Path, dry_run: bool, max_shard_size: str | None, **options: Any) -> int:
    """The command: converts, and prints what was done (or would be) and what a person should know."""
    size = None if max_shard_size is None else parse_size(max_shard_size)
    report = convert(source, destination, dry_run=dry_run, max_shard_size=size, **options)
    if dry_run:
        print(
            f"{report.direction}: would read {_size(report.bytes_read)} and write {_size(report.bytes_written)}"
            f" ({report.tensors} tensors in {report.files} files) to {destination}, in about {report.seconds:.0f} s"
        )
        return 0
    for name, count in report.nonfinite.items():
        print(f"mcore-swift: warning: {name} has {count} NaN or infinite values", file=sys.stderr)
    print(f"{destination}: {report.line()}")
    if report.left_aside:
        print(
            f"optimizer state ({_size(report.left_aside)}) is left aside; --optimizer converts it, too"
            f" (`mcore-swift train` resumes from {source} itself, at any layout)"
        )
    return 0
