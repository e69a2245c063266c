"""Rules about a layout and the job's number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mcore_swift.recipe import ParallelSection, Recipe
from mcore_swift.recipe_checks.table import Row

if TYPE_CHECKING:
    from mcore_swift.parallel import ParallelPlan


@dataclass(frozen=True)
class Job:
    """A layout that is wanted of a number of ranks. `world_size` None: as many as it needs."""

    parallel: ParallelSection
    world_size: int | None

    @property
    def model_ranks(self) -> int:
        return self.parallel.tp * self.parallel.pp * self.parallel.cp

    @property
    def dp(self) -> int:
        wanted = self.parallel.dp
        return wanted if wanted is not None else (self.world_size or self.model_ranks) // self.model_ranks

    @property
    def etp(self) -> int:
        return self.parallel.etp if self.parallel.etp is not None else self.parallel.tp

    @property
    def stage_ranks(self) -> int:
        return self.parallel.tp * self.parallel.cp * self.dp

    @property
    def expert_ranks(self) -> int:
        return self.parallel.ep * self.etp

    @property
    def needed(self) -> int:
        return self.model_ranks * self.dp


_SIZES = "tp {r.parallel.tp} × pp {r.parallel.pp} × cp {r.parallel.cp}"

JOB: list[Row[Job]] = [
    Row(
        "parallel",
        "tp × pp × cp that does not divide the job's ranks",
        lambda r: r.world_size is not None and r.world_size % r.model_ranks,
        _SIZES + " = {r.model_ranks} ranks do not divide the job's {r.world_size} ranks",
        "change a size or the number of ranks",
    ),
    Row(
        "parallel",
        "tp × pp × cp × dp that is not the job's ranks",
        lambda r: r.world_size is not None and r.needed != r.world_size,
        _SIZES + " × dp {r.dp} = {r.needed} ranks, but the job has {r.world_size}",
        "leave parallel.dp out, or change the number of ranks",
    ),
    Row(
        "parallel.ep parallel.etp",
        "ep × etp that does not divide the tp × cp × dp ranks of a pipeline stage",
        lambda r: (r.parallel.ep > 1 or r.parallel.etp is not None) and r.stage_ranks % r.expert_ranks,
        "ep {r.parallel.ep} × etp {r.etp} = {r.expert_ranks} ranks do not divide the {r.stage_ranks} ranks"
        " of a pipeline stage (tp {r.parallel.tp} × cp {r.parallel.cp} × dp {r.dp})",
        "lower ep or etp, or use more ranks",
    ),
]


@dataclass(frozen=True)
class Batches:
    """A global batch shared out over the ranks of a layout."""

    recipe: Recipe
    plan: ParallelPlan

    @property
    def per_step(self) -> int:
        """Samples of all data parallel ranks' micro-batches, of which the global batch must be a multiple."""
        return self.recipe.schedule.micro_batch_size * self.plan.dp

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one rank in a step."""
        return self.recipe.schedule.global_batch_size // self.per_step


BATCHES: list[Row[Batches]] = [
    Row(
        "schedule.global_batch_size",
        "not a multiple of schedule.micro_batch_size x the data parallel size that the ranks leave",
        lambda r: r.recipe.schedule.global_batch_size % r.per_step,
        "{r.recipe.schedule.global_batch_size} is not a multiple of schedule.micro_batch_size"
        " {r.recipe.schedule.micro_batch_size} x dp {r.plan.dp}",
        "change one of them, or the number of ranks",
    ),
    Row(
        "schedule.global_batch_size",
        "micro-batches that are not a multiple of parallel.pp, with parallel.vpp > 1",
        lambda r: r.plan.vpp > 1 and r.micro_batches % r.plan.pp,
        "{r.recipe.schedule.global_batch_size} makes {r.micro_batches} micro-batches a rank, but parallel.vpp > 1 needs"
        " a multiple of parallel.pp {r.plan.pp}",
        "change one of them",
    ),
]
