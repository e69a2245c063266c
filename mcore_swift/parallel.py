"""How a job's ranks are laid out: sizes, checks, and Megatron's process groups.

The only module that uses `megatron.core.parallel_state`: the rest asks for the sizes and ranks here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, cast

from mcore_swift.errors import InputError
from mcore_swift.pipeline import PipelineWish
from mcore_swift.platform import Platform
from mcore_swift.recipe import ParallelSection
from mcore_swift.recipe_checks.job import JOB, Job
from mcore_swift.recipe_checks.table import refuse

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """The resolved layout of `world_size` ranks: tp × pp × cp × dp, with pp split in vpp chunks a rank."""

    tp: int
    pp: int
    vpp: int
    cp: int
    ep: int
    etp: int
    dp: int
    sequence_parallel: bool
    pipeline: PipelineWish = field(default_factory=PipelineWish)
    cp_comm_type: str | None = None  # None: what the model can use, see models.context_rules
    hierarchical_cp: tuple[int, ...] | None = None

    @property
    def length_multiple(self) -> int:
        """What a sequence's length is a multiple of: each CP rank takes two equal chunks, and SP cuts them again."""
        return self.tp * (2 * self.cp if self.cp > 1 else 1)

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tp * self.pp * self.cp

    @property
    def world_size(self) -> int:
        return self.model_parallel_size * self.dp

    def record(self) -> dict[str, Any]:
        """The layout as JSON gives it back: what a checkpoint notes, and compares."""
        return json.loads(json.dumps(asdict(self)))

    def __str__(self) -> str:
        extra = "".join(f" {n.upper()}{v}" for n, v in (("vpp", self.vpp), ("cp", self.cp), ("ep", self.ep)) if v > 1)
        return f"TP{self.tp}{'+SP' if self.sequence_parallel else ''} PP{self.pp}{extra} DP{self.dp}"


def resolve(section: ParallelSection, *, world_size: int | None) -> ParallelPlan:
    """Fills in what the recipe leaves open. `world_size` None: as many ranks as the layout needs.

    Raises InputError when the sizes do not fit `world_size`.
    """
    job = Job(section, world_size)
    refuse(JOB, job)
    sequence_parallel = section.tp > 1 if section.sequence_parallel is None else section.sequence_parallel
    return ParallelPlan(
        tp=section.tp,
        pp=section.pp,
        vpp=section.vpp,
        cp=section.cp,
        ep=section.ep,
        etp=job.etp,
        dp=job.dp,
        sequence_parallel=sequence_parallel,
        pipeline=PipelineWish(
            layout=section.pipeline_layout,
            first_stage_layers=section.first_stage_layers,
            last_stage_layers=section.last_stage_layers,
            account_embedding=section.account_embedding,
            account_loss=section.account_loss,
        ),
        cp_comm_type=section.cp_comm_type,
        hierarchical_cp=tuple(section.hierarchical_cp) if section.hierarchical_cp else None,
    )


def initialize(plan: ParallelPlan, platform: Platform, *, seed: int) -> None:
    """Joins the job's process group (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and makes Megatron's groups."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != plan.world_size:
        raise InputError(f"parallel: {plan} needs {plan.world_size} ranks, but WORLD_SIZE is {world_size}")
    device = platform.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        dist.init_process_group(platform.backend, device_id=device if platform.name == "cuda" else None)
    _make_groups(plan, gloo=platform.name == "cpu")
    model_parallel_cuda_manual_seed(seed)


def imagine(plan: ParallelPlan, *, rank: int) -> None:
    """Takes the place of `rank` in a job that doesn't run: torch's fake process group stands for the other ranks."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=plan.world_size)
    _make_groups(plan, gloo=False)
    model_parallel_cuda_manual_seed(1)


def _make_groups(plan: ParallelPlan, *, gloo: bool) -> None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=plan.tp,
        pipeline_model_parallel_size=plan.pp,
        virtual_pipeline_model_parallel_size=plan.vpp if plan.vpp > 1 else None,
        context_parallel_size=plan.cp,
        hierarchical_context_parallel_sizes=list(plan.hierarchical_cp) if plan.hierarchical_cp else None,
        expert_model_parallel_size=plan.ep,
        expert_tensor_parallel_size=plan.etp,
        create_gloo_process_groups=gloo,
    )


def shutdown() -> None:
    """Leaves the job; the process may initialize another layout afterwards."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    # Megatron 0.19.2 forgets some of its groups. Kept, they would be freed by whoever makes the next ones: in a fork of
    # this process that is a crash, because the threads they join are not there.
    for name, value in list(vars(parallel_state).items()):
        if any(isinstance(group, dist.ProcessGroup) for group in (value if isinstance(value, list) else [value])):
            setattr(parallel_state, name, None)


@dataclass(frozen=True)
class Ranks:
    """This process's place in the layout."""

    tp: int
    pp: int
    dp: int
    dp_size: int
    is_last_stage: bool
    tp_size: int = 1
    cp: int = 0
    cp_size: int = 1


def ranks() -> Ranks:
    from megatron.core import parallel_state

    return Ranks(
        tp=parallel_state.get_tensor_model_parallel_rank(),
        pp=parallel_state.get_pipeline_model_parallel_rank(),
        dp=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        is_last_stage=parallel_state.is_pipeline_last_stage(ignore_virtual=True),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        cp=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
    )


def chunk_ends(chunk: int | None) -> tuple[bool, bool]:
    """Whether model chunk `chunk` of this rank (None: no interleaving) holds the embedding, and the output layer."""
    from megatron.core import parallel_state

    if chunk is None:
        return parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    return (
        parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
        parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
    )


def tp_group() -> ProcessGroup:
    from megatron.core import parallel_state

    return cast(Any, parallel_state.get_tensor_model_parallel_group())


def pp_group() -> ProcessGroup:
    from megatron.core import parallel_state

    return cast(Any, parallel_state.get_pipeline_model_parallel_group())


def cp_group() -> ProcessGroup:
    from megatron.core import parallel_state

    return cast(Any, parallel_state.get_context_parallel_group())


def dp_group() -> ProcessGroup:
    """Data parallel ranks, context parallel ones included (they share a batch's tokens)."""
    from megatron.core import parallel_state

    return cast(Any, parallel_state.get_data_parallel_group(with_context_parallel=True))


def stage_group() -> ProcessGroup:
    """All ranks of a pipeline stage: their tokens are the global batch's, each once where SP is on."""
    from megatron.core import parallel_state

    return cast(Any, parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))


def weight_groups() -> tuple[ProcessGroup, ProcessGroup]:
    """The ranks that share out a dense tensor, and the ranks that hold the same part of it."""
    return tp_group(), dp_group()


def expert_weight_groups() -> tuple[ProcessGroup, ProcessGroup]:
    """The same of one expert's tensors."""
    from megatron.core import parallel_state

    return (
        cast(Any, parallel_state.get_expert_tensor_parallel_group()),
        cast(Any, parallel_state.get_expert_data_parallel_group()),
    )


def expert_stack_groups() -> tuple[ProcessGroup, ProcessGroup]:
    """The same of all experts' tensors of a layer together."""
    from megatron.core import parallel_state

    return (
        cast(Any, parallel_state.get_expert_tensor_and_model_parallel_group()),
        cast(Any, parallel_state.get_expert_data_parallel_group()),
    )


def union_over_model(mine: Mapping[str, Any]) -> dict[str, Any]:
    """What the ranks of one model say together: pipeline stages and expert ranks have parts of their own."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    for group in (pp_group(), parallel_state.get_expert_model_parallel_group()):
        every: list[Any] = [None] * dist.get_world_size(cast(Any, group))
        dist.all_gather_object(every, mine, group=cast(Any, group))
        mine = {key: value for part in every for key, value in part.items()}
    return dict(mine)


def on_first_rank(action: Callable[[], None]) -> None:
    """Runs `action` on the job's first rank while the others wait. Its error is raised on every rank."""
    import torch.distributed as dist

    error: list[Exception | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except Exception as problem:  # every rank must hear of it, or the others wait for ever
            error[0] = problem
    dist.broadcast_object_list(error, src=0)
    if error[0] is not None:
        raise error[0]


def raise_together(error: Exception | None) -> None:
    """Raises the error of the lowest rank that has one on every rank, so that none is left waiting in a collective."""
    import torch.distributed as dist

    errors: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for problem in errors:
        if problem is not None:
            raise problem


def on_all_ranks(value: bool) -> bool:
    """Whether `value` is true on every rank. Collective."""
    import torch
    import torch.distributed as dist

    flag = torch.tensor(int(value), device=torch.cuda.current_device() if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())
