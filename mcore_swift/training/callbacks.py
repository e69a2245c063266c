"""What a run tells the world: the trainer calls these hooks on its one reporting rank, with plain numbers.

The trainer knows none of the outputs, the outputs know nothing of Megatron. Every output is one small class:
`progress.ProgressLine`, `metrics.MetricsFile`, `trackers.TensorBoard`, `trackers.WandB`, `summary.Summary`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mcore_swift.errors import InputError
from mcore_swift.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What is known before the first step of this start of the run."""

    model_name: str
    num_parameters: int  # of the whole model
    layout: str  # such as "TP1 PP2 DP1"
    world_size: int
    device_name: str  # one device of the reporting rank
    device_unit: Literal["GPU", "rank"]  # what a rate is divided by: "rank" on the CPU platform
    peak_flops: float | None  # FLOP/s of one device in the precision that the run uses; None: no MFU
    total_steps: int
    steps_done: int  # > 0: resumed after so many steps
    recipe_text: str  # the resolved recipe as YAML
    command: str  # what was typed to start the run; typed again, it resumes
    run_dir: Path | None
    scored: bool = False  # the model gives scores, not text
    base_weights: str = ""  # how an adapter's frozen weights are held, if in four bits, and what that costs
    pipeline: str = ""  # what lies on its stages and how long they wait; "" without stages
    data_counts: Mapping[str, int | float | str] = field(default_factory=dict)  # the data report, in its own words


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step of the whole job."""

    step: int  # finished steps, so the first is 1
    loss: float
    lr: float
    grad_norm: float
    tokens: int  # positions processed by all ranks, padding included
    loss_tokens: int  # tokens that the loss is the mean of
    flops: float  # model FLOPs of all ranks
    seconds: float
    world_size: int
    memory_gib: float | None  # most allocated so far on this device; on CPU the process's resident size
    skipped: bool = False  # the optimizer refused the gradients (inf or NaN)
    extra: Mapping[str, float] = field(default_factory=dict)  # an objective's own metrics

    @property
    def tokens_per_second(self) -> float:
        """Positions a second and device."""
        return self.tokens / self.seconds / self.world_size

    @property
    def flops_per_second(self) -> float:
        """Model FLOP/s of one device."""
        return self.flops / self.seconds / self.world_size

    def mfu(self, peak_flops: float | None) -> float | None:
        """Model FLOPs utilization as a fraction, None where the peak is unknown."""
        return None if peak_flops is None else self.flops_per_second / peak_flops


@dataclass(frozen=True, kw_only=True)
class RunEnd:
    """How this start of the run ended. Once `on_start` was called, `on_end` follows in every case."""

    outcome: Literal["finished", "stopped", "failed"]
    steps_done: int
    seconds: float  # wall time of this start, set-up and saving included
    hf_dir: Path | None = None  # the exported Hugging Face folder
    checkpoint: Path | None = None  # the newest complete checkpoint


class Callback:
    """One output of a run; every hook may stay empty."""

    def on_phase(self, phase: str) -> None:
        """Called when the run begins to load, evaluate, save or export, and when it goes back to train."""

    def on_start(self, info: RunInfo) -> None:
        """Called once, before the first step."""

    def on_step(self, record: StepRecord) -> None:
        """Called after each optimizer step."""

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called after an evaluation that followed `step` finished steps; the names start with "eval_"."""

    def on_checkpoint(self, step: int, path: Path) -> None:
        """Called when a checkpoint is complete on disk."""

    def on_end(self, end: RunEnd) -> None:
        """Called once, at the very end."""


def build_callbacks(recipe: Recipe, *, run_dir: Path | None) -> list[Callback]:
    """The outputs that the recipe asks for, in the order they are to be called; without a run folder: the line alone.

    Call it on the reporting rank before the model is built: raises InputError where W&B is asked for and can't be had.
    """
    from mcore_swift.training.metrics import MetricsFile
    from mcore_swift.training.progress import ProgressLine
    from mcore_swift.training.summary import Summary
    from mcore_swift.training.trackers import TensorBoard, WandB

    progress = ProgressLine(interval=recipe.logging.interval)
    if run_dir is None:
        if recipe.logging.wandb_project is not None:
            raise InputError(
                f"logging.wandb_project is {recipe.logging.wandb_project!r}, but checkpoint.dir is not set: "
                "W&B keeps its files in the run's folder, so give checkpoint.dir, or leave logging.wandb_project out."
            )
        return [progress]
    callbacks: list[Callback] = [progress, MetricsFile()]
    if recipe.logging.tensorboard:
        callbacks.append(TensorBoard())
    if recipe.logging.wandb_project is not None:
        callbacks.append(WandB(recipe))
    # Last: it reads what the others have written, and its text stays at the bottom of the screen.
    return [*callbacks, Summary()]
