"""Checkpoints of a run: written in the background, committed by one rename, resumed exactly.

RUN/checkpoints/step-00000020/  a Megatron `torch_dist` checkpoint: model and optimizer in the global tensor space, plus
    mcore_swift.json            what the run needs to go on: step, data position, layout, recipe, files' sizes, CRC-32
    hf/                         configuration and tokenizer, so that the folder stands alone
    rng/00003.pt                random states of rank 3

An attempt writes into RUN/checkpoints/.attempt-K/step-00000020.RANDOM. The first rank renames it when every rank has
written and synced its part, so a kill at any moment leaves either the whole step or none. Attempts have folders of
their own, and a later attempt takes those of earlier ones away: see `checkpoint_fence`.

Nothing heavy is imported here: a platform must be installed before Megatron is.
"""

from __future__ import annotations

import contextlib
import functools
import secrets
import shutil
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mcore_swift import parallel
from mcore_swift.errors import DamagedCheckpoint, InputError, NeverRestart
from mcore_swift.models.build import ModelSource
from mcore_swift.parallel import ParallelPlan
from mcore_swift.recipe import CheckpointSection
from mcore_swift.training.checkpoint_fence import AttemptFolder
from mcore_swift.training.checkpoint_folder import (
    MANIFEST,
    check_adapter,
    check_config,
    check_contents,
    checkpoint_source,
    checksum,
    complete_checkpoints,
    is_checkpoint,
    read_manifest,
    sync,
    write_manifest,
)
from mcore_swift.weights.hf_folder import copy_metadata

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer
    from torch.nn import Module

    from mcore_swift.weights.dist_checkpoint import PendingWrite, Saver
    from mcore_swift.weights.live import Fill

__all__ = ["CheckpointManager", "TrainState", "checkpoint_source", "is_checkpoint", "load_weights"]


@dataclass(frozen=True)
class TrainState:
    """Where a run stands after `step` steps, next to its model and optimizer."""

    step: int
    loader: dict[str, object]  # TrainLoader.state_dict()
    samples: int  # that have been trained on


def load_weights(
    path: Path, *, models: Sequence[Module], fill: Fill | None = None, optional: Collection[str] = ()
) -> None:
    """Fills the models, wrapped or not, from the weights of a Megatron checkpoint, at any layout and in any dtype.

    With `fill`, tensor by tensor, so that none but that one needs its memory. `optional`: global keys of tensors that
    stay what they are where the checkpoint hasn't got them. Raises InputError, on all ranks, when it
    is damaged or another model's; the latter before anything is loaded.
    """
    from mcore_swift.weights import dist_checkpoint, dist_index, live

    _manifest(path)

    def check() -> tuple[Any, Any]:
        index = dist_index.read_index(path)
        tensors = [item for item in dist_checkpoint.model_items(models).tensors() if not left(item.key, index)]
        dist_checkpoint.check_fits(tensors, index, path, same_dtype=False)
        return tensors, index

    def left(key: str, index: Any) -> bool:
        return key in optional and key not in index.state_dict_metadata

    def one_by_one() -> None:
        errors = []

        def write(item: Any, data: Any) -> None:
            if not errors:
                dist_checkpoint.read(dist_checkpoint.parts_of(item, data), path, index)

        for item in (item for item in live.global_tensors(models) if not left(item.key, index)):
            try:
                fill(item.data, functools.partial(write, item))  # type: ignore[misc]
            except InputError as error:  # filling may be a collective call: every rank goes through all tensors
                errors.append(error)
        if errors:
            raise errors[0]

    tensors, index = _together(check)
    _together(one_by_one if fill is not None else lambda: dist_checkpoint.read(tensors, path, index))


@dataclass
class _Save:
    """A save under way: the thread that writes this rank's part, and what it ran into."""

    state: TrainState
    folder: Path
    write: PendingWrite
    optimizer_step: int | None
    thread: threading.Thread
    checksums: dict[str, int] = field(default_factory=dict)  # of this rank's files, by name
    error: Exception | None = None


class CheckpointManager:
    """The checkpoints of one run. Every method but `newest` is called by all ranks, in the same order."""

    def __init__(
        self, section: CheckpointSection, *, run_dir: Path, source: ModelSource, recipe_text: str, plan: ParallelPlan
    ) -> None:
        """Makes the folder and takes it over from earlier attempts.

        Raises InputError when the folder can't be written, or holds another run's results that the recipe neither
        resumes nor allows to replace; NeverRestart when a later attempt has taken it over.
        """
        self.section, self.source, self.recipe_text, self.plan = section, source, recipe_text, plan
        self.run_dir, self.folder = run_dir, run_dir / "checkpoints"
        self.seed = int(yaml.safe_load(recipe_text)["runtime"]["seed"])
        self._saver: Saver | None = None
        self._pending: _Save | None = None
        self._committed: Path | None = None  # by a synchronous save; `poll` tells of it
        self._foreign = section.resume == "never"  # what is there belongs to another run
        self.attempt = AttemptFolder(self.folder, 0)
        parallel.on_first_rank(self._open)
        self.attempt = _from_first_rank(self.attempt)

    def _open(self) -> None:
        old = complete_checkpoints(self.folder)
        if self._foreign and not self.section.overwrite and (old or (self.run_dir / "hf").exists()):
            found = f"checkpoint {old[-1].name}" if old else "the exported model hf"
            raise InputError(
                f"checkpoint.dir: {self.run_dir} holds another run's results ({found}), and checkpoint.resume is never;"
                " choose another folder, or resume: auto to continue that run, or overwrite: true to replace it"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise InputError(f"checkpoint.dir: {self.run_dir} can't be written: {error.strerror or error}") from None
        self.attempt = AttemptFolder.open(self.folder)

    def newest(self) -> Path | None:
        """The newest complete checkpoint. Not a collective call."""
        return next(reversed(complete_checkpoints(self.folder)), None)

    @property
    def pending(self) -> bool:
        """Whether a save is under way."""
        return self._pending is not None

    def confirm(self) -> None:
        """Raises NeverRestart, on all ranks, when a later attempt has taken the run over."""
        parallel.on_first_rank(self.attempt.check)

    # --- resuming -----------------------------------------------------------------------------------------------------

    def resume(self, *, models: Sequence[Module], optimizer: MegatronOptimizer | None) -> TrainState | None:
        """Loads the newest checkpoint that isn't damaged, and says what was passed over; None where there is none.

        Raises what `load` does, and the first one's DamagedCheckpoint when all are: a run doesn't start anew by itself.
        """
        first: DamagedCheckpoint | None = None
        for path in reversed(_from_first_rank(complete_checkpoints(self.folder))):
            if first is not None:
                _say(f"{first}; going on from {path.name}")
            try:
                return self.load(path, models=models, optimizer=optimizer)
            except DamagedCheckpoint as error:
                first = first or error
        if first is not None:
            raise first
        return None

    def load(self, path: Path, *, models: Sequence[Module], optimizer: MegatronOptimizer | None) -> TrainState:
        """Fills models and optimizer in place and restores the random states; returns where the run stands.

        At the layout it was saved at, the run goes on bit for bit. At another one every number is the same but the
        random states, which belong to ranks, are made anew from (seed, step).
        Raises InputError, on all ranks, for another model's checkpoint or one without optimizer, DamagedCheckpoint for
        a damaged one.
        """
        from mcore_swift.training import optimizer_state, rng
        from mcore_swift.weights import dist_checkpoint, dist_index

        manifest = _manifest(path)
        _together(lambda: _check_share(path, manifest))
        if optimizer is not None and manifest.get("optimizer_step") is None:
            raise InputError(
                f"{path}: it holds weights only (checkpoint.optimizer was false), so the run can't be resumed from it;"
                " set checkpoint.resume: never and another checkpoint.dir, with this folder as model.path"
            )

        def work() -> None:
            check_config(path, self.source)
            theirs, ours = (yaml.safe_load(text) or {} for text in (manifest.get("recipe", ""), self.recipe_text))
            check_adapter(path, theirs.get("adapter", {}), ours["adapter"])
            index = dist_index.read_index(path)
            model = dist_checkpoint.model_items(models)
            state, put_back = [], lambda: None
            if optimizer is not None:
                state, put_back = optimizer_state.load_targets(optimizer, model.parts)
            dist_checkpoint.check_fits([*model.tensors(), *state], index, path, same_dtype=True)
            objects = [item for item in model.objects if item[2].unique_key in index.state_dict_metadata]
            wanted = [*model.tensors(), *state, *(item for _, _, item in objects)]
            values = dist_checkpoint.read(wanted, path, index)
            put_back()
            for chunk, name, item in objects:
                chunk.load_state_dict({name: values[item.unique_key]}, strict=False)

        _together(work)
        if optimizer is not None:
            optimizer_state.set_step(optimizer, manifest["optimizer_step"])
        if manifest["plan"] == self.plan.record():
            rng.set_states(_together(lambda: _read_rng(path)))
        else:
            rng.reseed(self.seed, manifest["step"])
        return TrainState(step=manifest["step"], loader=manifest["loader"], samples=manifest["samples"])

    # --- saving -------------------------------------------------------------------------------------------------------

    def save(self, state: TrainState, *, models: Sequence[Module], optimizer: MegatronOptimizer) -> None:
        """Starts to save, at a step's end. Training may go on at once: what is written is a copy.

        A save that is still under way is waited for first. With checkpoint.asynchronous: false, it is committed when
        this returns. Raises InputError, on all ranks, when the disk is full or the folder can't be written.
        """
        from mcore_swift.training import optimizer_state, rng
        from mcore_swift.weights import dist_checkpoint

        self.finish()
        folder = self._begin(state.step)
        model = dist_checkpoint.model_items(models)
        items = model.everything()
        if self.section.optimizer:
            items += optimizer_state.optimizer_items(optimizer, model.parts)
        self._saver = self._saver or dist_checkpoint.Saver()
        write = self._saver.prepare(items, folder)
        random_states = rng.get_states()

        def work() -> None:
            try:
                save.checksums = self._write(write, random_states)
            except Exception as error:  # told to all ranks, in a form that can be sent, by `poll`
                save.error = _os_error(error) or RuntimeError(traceback.format_exc())

        thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        step = _largest(optimizer_state.get_step(optimizer)) if self.section.optimizer else None
        save = self._pending = _Save(state, folder, write, step, thread)
        thread.start()
        if not self.section.asynchronous:
            self._committed = self.finish()

    def poll(self) -> Path | None:
        """Commits the save under way if all ranks have written their parts; the path of a checkpoint just committed."""
        if self._pending is None:
            committed, self._committed = self._committed, None
            return committed
        return self._complete() if parallel.on_all_ranks(not self._pending.thread.is_alive()) else None

    def finish(self) -> Path | None:
        """Waits for the save under way, if there is one, and commits it."""
        committed = None
        if self._pending is not None:
            self._pending.thread.join()
            committed = self._complete()
        self.attempt.settle()
        return committed

    def _begin(self, step: int) -> Path:
        """Makes the save's folder; the same one on all ranks."""
        folder = self.attempt.path / _from_first_rank(f"step-{step:08d}.{secrets.token_hex(4)}")

        def make() -> None:
            for path in (folder, folder / "rng", folder / "hf"):  # not its parent: that one's absence is the fence
                path.mkdir()

        with self._reporting(step, folder):
            parallel.on_first_rank(make)
        return folder

    def _write(self, write: PendingWrite, random_states: dict[str, Any]) -> dict[str, int]:
        """This rank's part, in the background; returns its files' checksums."""
        import torch
        import torch.distributed as dist

        rank = dist.get_rank()
        write.write()
        checksums = write.checksums
        states = write.folder / "rng" / f"{rank:05d}.pt"
        torch.save(random_states, states)
        sync(states)
        checksums[states.relative_to(write.folder).as_posix()] = checksum(states)
        if rank == 0:
            copy_metadata(self.source, write.folder / "hf")
            for path in (write.folder / "hf").iterdir():
                sync(path)
        return checksums

    def _complete(self) -> Path:
        """Turns the attempt into the checkpoint, on all ranks, or raises what any rank ran into, on all ranks."""
        assert self._pending is not None
        save, self._pending = self._pending, None
        save.thread.join()
        final = self.folder / f"step-{save.state.step:08d}"
        with self._reporting(save.state.step, save.folder):
            parallel.raise_together(save.error)
            save.write.finish()
            checksums = _gathered(save.checksums)
            parallel.on_first_rank(lambda: self._commit(save, final, checksums))
        self._foreign = False
        return final

    def _commit(self, save: _Save, final: Path, checksums: Mapping[str, int]) -> None:
        manifest = {
            "format": 1,
            **asdict(save.state),
            "optimizer_step": save.optimizer_step,
            "plan": self.plan.record(),
            "recipe": self.recipe_text,
            "versions": {name: version(name) for name in ("torch", "megatron-core")},
        }
        write_manifest(save.folder, manifest, checksums)
        for name in ("metadata.json", MANIFEST, "rng", "hf", "."):
            sync(save.folder / name)
        others = [path for path in complete_checkpoints(self.folder) if path != final]
        if self._foreign:  # never to be resumed by this run, not even after a kill in the next line
            for path in others:
                self.attempt.discard(path)
        self.attempt.commit(save.folder, final)
        sync(self.folder)
        if self.section.keep and not self._foreign:
            for path in others[: max(0, len(others) + 1 - self.section.keep)]:
                self.attempt.discard(path)
        self.attempt.clear()

    @contextlib.contextmanager
    def _reporting(self, step: int, folder: Path) -> Any:
        """Removes the attempt's folder when saving fails, and turns a full disk and the like into one clear message."""
        try:
            yield
        except NeverRestart:
            raise
        except Exception as error:

            def clean() -> None:
                self.attempt.check()  # when the run was taken over, that is the reason
                shutil.rmtree(folder, ignore_errors=True)

            parallel.on_first_rank(clean)
            newest = self.newest()
            rest = f"the newest checkpoint is still {newest.name}" if newest else "there is no earlier one"
            cause = _os_error(error)
            if cause is not None:
                raise InputError(
                    f"checkpoint.dir: the checkpoint of step {step} could not be written to {self.folder}:"
                    f" {cause.strerror or cause}; nothing of it was left, {rest}"
                ) from error
            raise RuntimeError(f"{self.folder}: the checkpoint of step {step} could not be written; {rest}") from error


def _os_error(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _largest(value: int) -> int:
    """Over all ranks. A rank with nothing to train has no optimizer that could count its updates."""
    import torch
    import torch.distributed as dist

    found = torch.tensor(value, device=torch.cuda.current_device() if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found.item())


def _together(work: Callable[[], Any]) -> Any:
    """Runs `work`, which must not communicate, on all ranks; an InputError of one is raised on all."""
    result, problem = None, None
    try:
        result = work()
    except InputError as error:
        problem = error
    parallel.raise_together(problem)
    return result


def _from_first_rank[T](value: T) -> T:
    """The first rank's value, on all ranks. Collective."""
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _say(text: str) -> None:
    """Prints once for the whole job."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        print(f"mcore-swift: {text}", file=sys.stderr, flush=True)


def _manifest(path: Path) -> dict[str, Any]:
    """The checkpoint's manifest, from the first rank, which looks whether all files are there in full. Collective."""
    import torch.distributed as dist

    manifest: list[Any] = [None]

    def check() -> None:
        manifest[0] = read_manifest(path)

    parallel.on_first_rank(check)
    dist.broadcast_object_list(manifest, src=0)
    return manifest[0]


def _check_share(path: Path, manifest: Mapping[str, Any]) -> None:
    """This rank's share of reading every file of the checkpoint once, mostly those that it then loads."""
    import torch.distributed as dist

    check_contents(path, manifest, share=dist.get_rank(), shares=dist.get_world_size())


def _gathered(mine: dict[str, int]) -> dict[str, int]:
    """All ranks' entries, on the first rank. Collective."""
    import torch.distributed as dist

    every: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, every, dst=0)
    return {name: value for part in every or [] for name, value in part.items()}


def _read_rng(path: Path) -> dict[str, Any]:
    import pickle

    import torch
    import torch.distributed as dist

    file = path / "rng" / f"{dist.get_rank():05d}.pt"
    try:
        return torch.load(file, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise DamagedCheckpoint(f"{file}: damaged: {error}") from None
