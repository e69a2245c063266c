"""The training loop: steps, evaluation, checkpoints, export; everything that it reports goes through callbacks."""

from __future__ import annotations

import contextlib
import gc
import math
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mcore_swift import parallel, stop
from mcore_swift.data.loader import LoaderShape, Wanted, build_loaders
from mcore_swift.data.tokenizer import load_tokenizer
from mcore_swift.errors import InputError, StopRequested
from mcore_swift.flops import peak_flops, training_flops
from mcore_swift.models.build import ModelSource
from mcore_swift.models.stages import describe
from mcore_swift.objectives.objective import Objective
from mcore_swift.objectives.registry import build_objective
from mcore_swift.parallel import ParallelPlan
from mcore_swift.platform import Platform
from mcore_swift.recipe import Recipe
from mcore_swift.recipe_checks.job import Batches
from mcore_swift.recipe_checks.objective import reference_of
from mcore_swift.recipe_io import dump_recipe
from mcore_swift.training import adapters, heartbeat, reference, setup
from mcore_swift.training.callbacks import Callback, RunEnd, RunInfo, StepRecord, build_callbacks
from mcore_swift.training.checkpoint import CheckpointManager, TrainState
from mcore_swift.training.checkpoint_folder import checkpoint_step
from mcore_swift.training.optimizer import set_learning_rate
from mcore_swift.training.schedule import check_schedule, learning_rate
from mcore_swift.training.step import eval_step, train_step
from mcore_swift.training.sums import Means, StepResult
from mcore_swift.weights.hf_folder import export

if TYPE_CHECKING:
    from mcore_swift.data.loader import EvalLoader, TrainLoader


def make_run_dir(folder: Path) -> None:
    """Creates the run's folder. Raises InputError when it can't be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"checkpoint.dir: {folder} can't be written: {error.strerror}") from error


def unweighable(recipe: Recipe, objective: Objective) -> str:
    """Why rows of this run's data can't have weights; "" where they can."""
    if recipe.model.mtp_loss_scale:
        return "the loss of multi-token prediction (model.mtp_loss_scale) has none"
    if recipe.objective.name == "distill":
        return "distillation weighs all rows alike (objective.name)"
    if objective.matching is not None:
        return "a pair has no loss of its own where the batch's pairs are sorted (objective.loss)"
    return ""


class Trainer:
    """One run on this rank: builds everything, then `run` trains to the end, or to the agreed stop."""

    def __init__(self, recipe: Recipe, source: ModelSource, plan: ParallelPlan, platform: Platform) -> None:
        import torch.distributed as dist

        self.recipe, self.source, self.plan, self.platform = recipe, source, plan, platform
        self.started = time.monotonic()
        self.stop = stop.FLAG
        self.stop.install()
        heartbeats = heartbeat.from_environment()
        self.callbacks: list[Callback] = [*heartbeats]
        self._tell("on_phase", "load")
        parallel.initialize(plan, platform, seed=recipe.runtime.seed)
        platform.check_precision(recipe.precision)
        self.device = platform.current_device()
        self.is_reporter = dist.get_rank() == 0
        self.run_dir = Path(recipe.checkpoint.dir) if recipe.checkpoint.dir else None
        if self.run_dir is not None:
            parallel.on_first_rank(lambda: make_run_dir(Path(recipe.checkpoint.dir or "")))
        if self.is_reporter:
            self.callbacks += build_callbacks(recipe, run_dir=self.run_dir)
        self.objective = build_objective(recipe.objective)
        self.train_loader, self.eval_loader = self._loaders()
        self.total_steps = self._total_steps()
        check_schedule(recipe.schedule, total_steps=self.total_steps)
        self.model = setup.build(recipe, source, plan, platform)
        self.reference = reference.build(recipe, source, self.model.models, platform)
        if reference_of(recipe) == "precomputed":
            reference.keep(recipe, source, self.model.models, platform, [self.train_loader, self.eval_loader])
        self.checkpoints = self._checkpoints()
        self.step = 0

    def _loaders(self) -> tuple[TrainLoader, EvalLoader | None]:
        recipe, place = self.recipe, parallel.ranks()
        tokenizer = None
        if recipe.data.format != "synthetic":
            tokenizer = load_tokenizer(self.source.tokenizer, chat_template=self.source.chat_template)
        shape = LoaderShape(
            global_batch_size=recipe.schedule.global_batch_size,
            micro_batch_size=recipe.schedule.micro_batch_size,
            sequence_length=recipe.data.sequence_length,
            dp_rank=place.dp,
            dp_size=place.dp_size,
            pad_multiple=self.plan.length_multiple,
        )
        objective = self.objective
        wanted = Wanted(
            recipe.objective.name,
            unit=objective.unit,
            probes=objective.divergence,
            scored=objective.scored,
            unweighable=unweighable(recipe, objective),
        )
        return build_loaders(
            recipe.data,
            shape=shape,
            tokenizer=tokenizer,
            seed=recipe.runtime.seed,
            vocab_size=self.source.vocab_size,
            adapters=list(recipe.adapter.several),
            wanted=wanted,
        )

    def _total_steps(self) -> int:
        schedule, samples = self.recipe.schedule, self.train_loader.samples_per_epoch
        if schedule.steps is not None:
            return schedule.steps
        if samples is None:
            raise InputError(
                "schedule.epochs: the length of streamed data is not known beforehand; give schedule.steps"
            )
        return max(1, math.ceil((schedule.epochs or 0) * samples / schedule.global_batch_size))

    def _checkpoints(self) -> CheckpointManager | None:
        if self.run_dir is None:
            return None
        return CheckpointManager(
            self.recipe.checkpoint,
            run_dir=self.run_dir,
            source=self.source,
            recipe_text=dump_recipe(self.recipe),
            plan=self.plan,
        )

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Trains. Raises StopRequested after the checkpoint of a requested stop."""
        self._resume()
        outcome = "failed"
        self._tell("on_start", self._info())
        gc.collect()
        gc.freeze()  # or every full collection goes through all that was imported and built
        try:
            self._loop()
            outcome = "finished"
        except StopRequested:
            outcome = "stopped"
            raise
        finally:
            hf = (
                self.run_dir / "hf"
                if self.run_dir and outcome == "finished" and adapters.exports_model(self.recipe)
                else None
            )
            self._tell("on_end", self._end(outcome, hf))

    def _resume(self) -> None:
        if self.checkpoints is None or self.recipe.checkpoint.resume == "never":
            return
        state = self.checkpoints.resume(models=self.model.models, optimizer=self.model.optimizer)
        if state is None:
            return
        self.train_loader.load_state_dict(state.loader)
        self.step = state.step

    def _loop(self) -> None:
        recipe = self.recipe
        saved = self.step
        # A run that was stopped behind its last step may not have been evaluated there.
        evaluated = self.step if self.step < self.total_steps else -1
        early = self.stop.agreed(self.device)
        if early:  # it came while everything was loaded: what is saved already is all there is
            raise StopRequested(f"{signal.Signals(early).name} was received before step {self.step + 1}")
        while self.step < self.total_steps:
            self._step()
            if self.checkpoints and recipe.checkpoint.interval and self.step % recipe.checkpoint.interval == 0:
                self._save()
                saved = self.step
            if recipe.schedule.eval_interval and self.step % recipe.schedule.eval_interval == 0:
                self._evaluate()
                evaluated = self.step
            self._committed()
            if asked := self.stop.agreed(self.device):
                self._leave(asked, saved=saved)
        if self.eval_loader is not None and evaluated != self.step and (asked := self._evaluate()):
            self._leave(asked, saved=saved)  # whoever goes on from there evaluates, and exports
        if self.checkpoints and recipe.checkpoint.final and saved != self.step:
            self._save()
        self._finish_saves()
        if self.run_dir and recipe.checkpoint.export:
            self._export(self.run_dir)

    def _leave(self, asked: int, *, saved: int) -> NoReturn:
        """Raises StopRequested for that signal, with the step saved. `saved`: the step that was saved last."""
        if saved != self.step:
            self._save()
        self._finish_saves()
        where = (
            f"checkpoint saved after step {self.step}"
            if self.checkpoints
            else "nothing is saved without checkpoint.dir"
        )
        raise StopRequested(f"{signal.Signals(asked).name} was received; {where}")

    def _step(self) -> None:
        if self.step + 1 in self.recipe.schedule.skip_steps:
            self.train_loader.micro_batches(self.step)  # a stream moves on
            self.step += 1
            return
        begin = time.perf_counter()
        rate = learning_rate(self.step, schedule=self.recipe.schedule, total_steps=self.total_steps)
        set_learning_rate(self.model.optimizer, rate, self.recipe.optimizer.weight_decay)
        if self.model.sampling is not None:
            self.model.sampling.begin(self.step)
        batches = self.train_loader.micro_batches(self.step)
        with self._profiled():
            result = train_step(
                self.model.models, self.model.optimizer, batches, self.objective, self.device, self.reference
            )
        self.step += 1
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            name = getattr(getattr(self.train_loader, "samples", None), "row_name", str)
            rows = f" Rows of the data: {', '.join(map(name, result.bad_rows[:8]))}." if result.bad_rows else ""
            raise RuntimeError(
                f"step {self.step}: loss {result.loss}, gradient norm {result.grad_norm}: not finite.{rows}"
                " The last checkpoint is from before this step; lower the learning rate or look at this step's data."
            )
        self._tell("on_step", self._record(result, rate, time.perf_counter() - begin))

    @contextlib.contextmanager
    def _profiled(self) -> Iterator[None]:
        """Traces the step if the recipe asks for it: RUN/profile/step-N.rank-R.json, for Perfetto."""
        number = self.step + 1
        if self.run_dir is None or number not in self.recipe.runtime.profile_steps:
            yield
            return
        import torch.distributed as dist
        from torch.profiler import profile

        folder = self.run_dir / "profile"
        folder.mkdir(exist_ok=True)
        with profile() as trace:
            yield
            self.platform.synchronize()
        trace.export_chrome_trace(str(folder / f"step-{number:08d}.rank-{dist.get_rank():05d}.json"))

    def _evaluate(self) -> int:
        """Evaluates, and returns 0; or the signal that asks to stop, which may come while there is much left to do."""
        if self.eval_loader is None:
            return 0
        self._tell("on_phase", "evaluate")
        means = Means()
        for number, batches in enumerate(self.eval_loader.batches()):
            if number == self.recipe.schedule.eval_batches:
                break
            if asked := self.stop.agreed(self.device):
                return asked
            means.add(eval_step(self.model.models, batches, self.objective, self.device, self.reference))
        if not means.tally:
            raise InputError("data.validation: not one token of the validation data counts for the loss")
        self._tell("on_eval", self.step, {f"eval_{name}": value for name, value in means.values().items()})
        return 0

    # --- saving -------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.checkpoints is None:
            return
        self._tell("on_phase", "save")
        self.model.sync_parameters()
        state = TrainState(
            step=self.step,
            loader=self.train_loader.state_dict(),
            samples=self.step * self.recipe.schedule.global_batch_size,
        )
        self.checkpoints.save(state, models=self.model.models, optimizer=self.model.optimizer)
        self._tell("on_phase", "train")

    def _committed(self) -> None:
        self._announce(self.checkpoints.poll() if self.checkpoints else None)

    def _finish_saves(self) -> None:
        self._tell("on_phase", "save")
        self._announce(self.checkpoints.finish() if self.checkpoints else None)

    def _announce(self, path: Path | None) -> None:
        if path is not None:
            self._tell("on_checkpoint", checkpoint_step(path), path)

    def _export(self, folder: Path) -> None:
        if self.checkpoints is not None:
            self.checkpoints.confirm()
        self._tell("on_phase", "export")
        self.model.sync_parameters()
        if self.recipe.adapter.name != "none":
            adapters.write(self.recipe, self.model, folder)
            return
        export(self.model.chunks, self.model.rules, self.source, folder / "hf", dtype=self.model.export_dtype)

    def _flops(self, result: StepResult) -> float:
        recipe = self.recipe
        # What is trained of a model in parts is not counted: the speed that is shown is never too high.
        frozen = recipe.adapter.name != "none" or recipe.model.partly_frozen or recipe.optimizer.lisa_layers is not None
        return float(
            training_flops(
                self.model.shape,
                tokens=result.computed_tokens,
                sum_squared_lengths=round(result.sum_squared_lengths),
                labels=result.loss_tokens,
                frozen=frozen,
            )
        )

    # --- reporting ----------------------------------------------------------------------------------------------------

    def _tell(self, hook: str, *values: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(*values)

    def _record(self, result: StepResult, rate: float, seconds: float) -> StepRecord:
        return StepRecord(
            step=self.step,
            loss=result.loss,
            lr=rate,
            grad_norm=result.grad_norm,
            tokens=result.tokens,
            loss_tokens=result.loss_tokens,
            flops=self._flops(result),
            seconds=seconds,
            world_size=self.plan.world_size,
            memory_gib=self.platform.memory_gib(),
            skipped=result.skipped,
            extra=result.metrics,
        )

    def _info(self) -> RunInfo:
        precision = "fp8" if self.recipe.precision.fp8 else "bf16" if self.model.config.bf16 else "fp32"
        return RunInfo(
            model_name=self.source.folder.resolve().name,
            num_parameters=self.model.num_parameters,
            layout=str(self.plan),
            scored=self.source.scored,
            base_weights=self.model.quantized,
            pipeline=describe(self.source, self.plan, micro_batches=Batches(self.recipe, self.plan).micro_batches),
            world_size=self.plan.world_size,
            device_name=self.platform.device_name(),
            device_unit="GPU" if self.platform.name == "cuda" else "rank",
            peak_flops=peak_flops(self.platform.device_name(), precision),
            total_steps=self.total_steps,
            steps_done=self.step,
            recipe_text=dump_recipe(self.recipe),
            command=" ".join(["mcore-swift", *sys.argv[1:]]),
            run_dir=self.run_dir,
            data_counts=self.train_loader.report(),
        )

    def _end(self, outcome: Any, hf: Path | None) -> RunEnd:
        newest = self.checkpoints.newest() if self.checkpoints else None
        return RunEnd(
            outcome=outcome,
            steps_done=self.step,
            seconds=time.monotonic() - self.started,
            hf_dir=hf,
            checkpoint=newest,
        )
