"""`mcore-swift convert`: Hugging Face ↔ Megatron as a copy of byte ranges: no model, no GPU, no process group.

DST is written as `.DST.partial` beside it and appears by one rename, whole. A run that was killed leaves the partial
folder with a journal, and the same command goes on from there; a lock keeps two conversions out of one DST.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ckpt_tools import transfer as engine
from ckpt_tools.plan import plan_transfer
from ckpt_tools.source import HFSource, MegatronSource, is_gguf, open_source
from ckpt_tools.torch_dist import CheckpointPlan, optimizer_bytes
from mcore_swift.errors import InputError
from mcore_swift.training.checkpoint_folder import MANIFEST, sync
from mcore_swift.weights.dist_index import read_index
from mcore_swift.weights.hf_folder import copy_metadata

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
MAX_SHARD_BYTES = 5 * 10**9
JOURNAL = "journal"
LOCK_PATIENCE = 2.0  # seconds
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
    left_aside: int = 0  # bytes of optimizer state, which a Hugging Face folder has no place for

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
) -> Report:
    """Converts Hugging Face → Megatron, Megatron → Hugging Face, or GGUF → Hugging Face: found from the contents.

    source: a path, or a hub id, which is looked up in the local cache (and downloaded only with `download`).
    dtype: bf16, fp16 or fp32 for all tensors; None keeps each one's own. max_shard_size: bytes of a file.
    strict: NaN and Inf are refused. Raises InputError for whatever is wrong with the input, before DST exists.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype: found {dtype!r}; allowed: {', '.join(DTYPES)}")
    destination = Path(os.path.abspath(destination))
    path = find_source(source, download=download)
    _check_destination(path, destination)
    if is_gguf(path):
        return _convert_gguf(path, destination, dtype, max_shard_size=max_shard_size, config=config, dry_run=dry_run)
    opened = open_source(path, config=config)
    partial = destination.with_name(f".{destination.name}.partial")
    bulk, layout = plan_transfer(
        opened, partial, dtype=DTYPES.get(dtype or ""), max_shard_bytes=max_shard_size or MAX_SHARD_BYTES
    )
    planned = Report(
        direction="Hugging Face → Megatron" if bulk.to_megatron else "Megatron → Hugging Face",
        tensors=len(bulk.targets),
        files=len(layout.sizes),
        bytes_read=bulk.bytes_read,
        bytes_written=bulk.nbytes,
        seconds=bulk.nbytes / USUAL_SPEED,
        left_aside=0 if bulk.to_megatron else optimizer_bytes(read_index(opened.path)),
    )
    if dry_run:
        return planned
    fingerprint = _fingerprint(opened, layout, dtype=dtype)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _locked(destination):
            job = _Job(opened, bulk, layout, partial, destination, dtype)
            return _run(job, fingerprint, planned, workers=workers or min(4, os.cpu_count() or 1), strict=strict)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            shutil.rmtree(partial, ignore_errors=True)
            raise InputError(
                f"{destination}: {error.strerror}: {_size(sum(layout.sizes.values()))} are needed,"
                f" {_size(shutil.disk_usage(destination.parent).free)} are free; nothing was left there"
            ) from error
        place = "" if error.filename is None else f"{error.filename}: "
        raise InputError(f"{destination}: can't be written: {place}{error.strerror or error}") from error


@dataclass(frozen=True)
class _Job:
    source: HFSource | MegatronSource
    bulk: engine.Transfer
    layout: CheckpointPlan
    partial: Path
    destination: Path
    dtype: str | None


def _run(job: _Job, fingerprint: str, planned: Report, *, workers: int, strict: bool) -> Report:
    bulk, partial = job.bulk, job.partial
    begun = time.perf_counter()
    if job.destination.exists():  # the one who had the lock before has finished it
        raise InputError(f"{job.destination}: exists already; name a folder that doesn't")
    journal = partial / JOURNAL
    _prepare(partial, job.layout, fingerprint)
    earlier = engine.read_journal(journal)
    left = [number for number in range(len(bulk.tasks)) if number not in earlier]
    resumed = planned.bytes_written - sum(_task_bytes(bulk, number) for number in left)
    bad: dict[str, int] = {}

    def count(number: int, values: int) -> None:
        name = bulk.tasks[number].name
        if values:
            bad[name] = bad.get(name, 0) + values
        if values and strict:
            raise InputError(f"{job.source.path}: tensor {name} has {values} NaN or infinite values (--strict)")

    try:
        for number, values in earlier.items():
            count(number, values)
        with _progress(planned.bytes_written, resumed) as advance:
            for done in engine.run_tasks(bulk, left, journal, workers=workers):
                advance(done.nbytes)
                count(done.number, done.nonfinite)
    except InputError:  # going on would not help: nothing half-written stays
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _finish(job)
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


@contextlib.contextmanager
def _locked(destination: Path) -> Iterator[None]:
    """Holds the lock of `destination`; the kernel lets go of it when the process dies. Raises InputError if held."""
    path = destination.with_name(f".{destination.name}.lock")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        held = _try_lock(descriptor, path)
        if not held:
            raise InputError(
                f"{destination}: another conversion is writing it; wait for that one, or choose another DST"
            )
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, path: Path) -> bool:
    """Locks the file. A killed run's workers, which hold the lock too, take a moment to die: they are waited for."""
    deadline = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.stat(path).st_ino == os.fstat(descriptor).st_ino  # else its holder has just removed it
        except FileNotFoundError:
            return False
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)


def _fingerprint(source: HFSource | MegatronSource, layout: CheckpointPlan, *, dtype: str | None) -> str:
    """Says whether a partial folder was begun for the same result: the source's files and what is planned from them."""
    files = {block.file for stored in (*source.stored.values(), *source.scales.values()) for block in stored.blocks}
    stats = {str(path.resolve()): path.stat() for path in files}
    content: dict[str, Any] = {
        "files": sorted((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats.items()),
        "sizes": layout.sizes,
        "config": source.model.raw,
        "dtype": dtype,
        "tensors": [(name, item.dtype, item.shape) for name, item in layout.tensors.items()],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# --- the partial folder -----------------------------------------------------------------------------------------------


def _prepare(partial: Path, layout: CheckpointPlan, fingerprint: str) -> None:
    """Creates the files at full size, with everything but the tensors; leaves a folder begun for the same result."""
    mark = partial / JOURNAL / "begun"
    if mark.is_file() and mark.read_text() == fingerprint:
        return
    shutil.rmtree(partial, ignore_errors=True)
    (partial / JOURNAL).mkdir(parents=True)
    for name, size in layout.sizes.items():
        with (partial / name).open("wb") as file:
            # Claims the space now: a full disk is found before hours of writing, and not in the middle of a file.
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
            file.truncate(size)
            for owner, start, data in layout.fixed:
                if owner == name:
                    file.seek(start)
                    file.write(data)
    mark.with_suffix(".new").write_text(fingerprint)
    os.rename(mark.with_suffix(".new"), mark)


def _finish(job: _Job) -> None:
    """Writes the small files and gives the folder its name."""
    for name, content in job.layout.small.items():
        (job.partial / name).write_bytes(content)
    home = job.partial / "hf" if job.bulk.to_megatron else job.partial
    home.mkdir(exist_ok=True)
    dtype = DTYPES[job.dtype] if job.dtype else "BF16" if job.source.scales else None
    copy_metadata(job.source.model, home, dtype=dtype)
    shutil.rmtree(job.partial / JOURNAL)
    if job.bulk.to_megatron:
        _write_manifest(job.partial)
    for path in (*job.partial.rglob("*"), job.partial):  # a power cut must not leave a folder that only looks whole
        sync(path)
    os.rename(job.partial, job.destination)


def _write_manifest(folder: Path) -> None:
    """What the trainer looks for in a checkpoint: that it is in full, and that it holds weights only."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    manifest = {
        "format": 1,
        "step": 0,
        "loader": {},
        "samples": 0,
        "optimizer_step": None,
        "plan": None,
        "recipe": "",
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
        "files": {path.relative_to(folder).as_posix(): path.stat().st_size for path in files},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


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
            f"optimizer state ({_size(report.left_aside)}) is left aside: a Hugging Face folder has no place for it;"
            f" `mcore-swift train` resumes from {source} itself, at any layout"
        )
    return 0
