"""The same numbers for two viewers: TensorBoard (in the run's folder) and Weights & Biases (when asked for)."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path

from mcore_swift.errors import InputError
from mcore_swift.recipe import Recipe
from mcore_swift.training.callbacks import Callback, RunEnd, RunInfo, StepRecord
from mcore_swift.training.metrics import step_row

_SPEED = ("tokens_per_second_per_gpu", "tflops_per_gpu", "mfu", "memory_gib", "seconds")


def tagged(row: Mapping[str, object]) -> dict[str, float]:
    """A step's row under the viewers' grouped names: train/… for what is learnt, speed/… for how fast."""
    return {
        f"{'speed' if name in _SPEED else 'train'}/{name}": float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, (int, float))
    }


def tagged_eval(metrics: Mapping[str, float]) -> dict[str, float]:
    """An evaluation's metrics as eval/…"""
    return {name.replace("_", "/", 1): value for name, value in metrics.items()}


class TensorBoard(Callback):
    """Event files in RUN/tensorboard; a resumed run hides the steps that it does again."""

    def on_start(self, info: RunInfo) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        assert info.run_dir is not None
        self._peak_flops = info.peak_flops
        purge_step = info.steps_done + 1 if info.steps_done else 0
        self._writer = SummaryWriter(str(info.run_dir / "tensorboard"), purge_step=purge_step)
        self._writer.add_text("recipe", f"```yaml\n{info.recipe_text}\n```", info.steps_done)

    def on_step(self, record: StepRecord) -> None:
        self._add(tagged(step_row(record, peak_flops=self._peak_flops)), record.step)

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        self._add(tagged_eval(metrics), step)

    def on_end(self, end: RunEnd) -> None:
        self._writer.close()

    def _add(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)


class WandB(Callback):
    """One W&B run, continued at a resume (its id is kept in RUN/wandb_run_id); WANDB_MODE=offline and the like work."""

    def __init__(self, recipe: Recipe) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise InputError(
                f"logging.wandb_project is {recipe.logging.wandb_project!r}, but the package wandb is not installed: "
                "run `pip install wandb`, or leave logging.wandb_project out."
            )
        self._recipe = recipe

    def on_start(self, info: RunInfo) -> None:
        import wandb  # pyright: ignore[reportMissingImports] (an extra)

        assert info.run_dir is not None
        self._peak_flops = info.peak_flops
        try:
            self._run = wandb.init(
                project=self._recipe.logging.wandb_project,
                name=self._recipe.logging.wandb_name,
                dir=str(info.run_dir),
                config=dataclasses.asdict(self._recipe),
                id=_stored_run_id(info) or None,
                resume="allow",
            )
        except wandb.errors.UsageError as error:
            raise InputError(
                f"logging.wandb_project is set, but W&B refuses: {error} "
                "(`wandb login` or WANDB_API_KEY signs in, WANDB_MODE=offline keeps everything local)"
            ) from None
        (info.run_dir / "wandb_run_id").write_text(self._run.id, encoding="utf-8")

    def on_step(self, record: StepRecord) -> None:
        # W&B ignores values for steps it has: those that a resumed run does again are equal anyway.
        self._run.log(tagged(step_row(record, peak_flops=self._peak_flops)), step=record.step)

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(tagged_eval(metrics), step=step)

    def on_end(self, end: RunEnd) -> None:
        self._run.finish(exit_code=1 if end.outcome == "failed" else 0)


def _stored_run_id(info: RunInfo) -> str:
    assert info.run_dir is not None
    path: Path = info.run_dir / "wandb_run_id"
    return path.read_text(encoding="utf-8").strip() if info.steps_done and path.exists() else ""
