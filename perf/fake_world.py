"""A job of a thousand ranks on one machine: the real Megatron modules of a rank of each kind, without their storage.

torch's fake process group says that it has all the ranks and exchanges nothing; parameters lie on the meta device,
where a tensor has a shape and no bytes. The ranks of a pipeline stage hold equal parts of the same tensors: built are
its first rank, which holds their beginnings, and of stages that are alike one last rank, which holds their ends.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from multiprocessing import get_context
from typing import Any

from mcore_swift.models.build import ModelSource
from mcore_swift.models.keys import global_shapes, weight_rules
from mcore_swift.parallel import ParallelPlan
from mcore_swift.platform import Platform
from perf.parameters import EXPERTS, VOCABULARY, Parameters, stage_parameters


@dataclass(frozen=True)
class Part:
    """A rank's part of one global tensor (of one expert's slice of it)."""

    key: str
    expert: int | None
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    main: bool  # False: a further copy of a tensor that another stage holds

    @property
    def end(self) -> tuple[int, ...]:
        return tuple(offset + size for offset, size in zip(self.offset, self.shape, strict=True))


@dataclass(frozen=True)
class BuiltRank:
    """One rank's modules in numbers."""

    rank: int
    stage: int
    parameters: Parameters
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Check:
    """Something that must hold of the built ranks, and whether it does."""

    what: str
    wrong: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        return not self.wrong


def kinds(plan: ParallelPlan, chunks: Sequence[str]) -> list[int]:
    """The first rank of each pipeline stage, and the last one of the first stage with such chunks."""
    size = plan.world_size // plan.pp
    unlike = {tuple(chunks[stage :: plan.pp]): stage for stage in reversed(range(plan.pp))}
    return sorted({stage * size for stage in range(plan.pp)} | {stage * size + size - 1 for stage in unlike.values()})


def build(source: ModelSource, plan: ParallelPlan, platform: Platform, ranks: Sequence[int]) -> list[BuiltRank]:
    """Builds these ranks of the job, in as many forked processes as there are cores. Needs `platform` installed."""
    import mcore_swift.models.layers  # noqa: F401  (imported once, before the forks)

    workers = min(len(ranks), os.cpu_count() or 1)
    with get_context("fork").Pool(workers, initializer=_enter, initargs=(source, plan, platform)) as pool:
        return pool.map(_build, ranks, chunksize=1)


_job: tuple[ModelSource, ParallelPlan, Platform]  # a forked process's: a family's table can't be sent to it


def _enter(*job: Any) -> None:
    import warnings

    import torch

    global _job
    _job = job
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def _build(rank: int) -> BuiltRank:
    return build_rank(*_job, rank=rank)


def build_rank(source: ModelSource, plan: ParallelPlan, platform: Platform, *, rank: int) -> BuiltRank:
    """Takes the place of `rank` in the job that `plan` describes, and leaves it again."""
    import torch

    from mcore_swift import parallel
    from mcore_swift.models.build import build_chunks, transformer_config
    from mcore_swift.platform.meta import no_storage
    from mcore_swift.weights.live import local_shards

    parallel.imagine(plan, rank=rank)
    try:
        extra: dict[str, object] = {
            "init_model_with_meta_device": True,
            "perform_initialization": False,
            "use_cpu_initialization": False,
        }
        config = transformer_config(source, plan, platform, dtype=torch.bfloat16, extra=extra)
        with no_storage():
            chunks = build_chunks(source, config, plan, platform)
            parts = [
                Part(s.key, s.expert, s.global_shape, s.offset, tuple(s.data.shape), s.main)
                for s in local_shards(chunks)
            ]
        counts = {True: 0, False: 0}
        for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
            assert parameter.is_meta
            counts[getattr(parameter, "allreduce", True)] += parameter.numel()  # Megatron's mark of expert parallelism
        return BuiltRank(rank, parallel.ranks().pp, Parameters(counts[True], counts[False]), tuple(parts))
    finally:
        parallel.shutdown()


# --- checks -----------------------------------------------------------------------------------------------------------


def checks(
    source: ModelSource, plan: ParallelPlan, chunks: Sequence[str], built: Sequence[BuiltRank], *, layers: str
) -> list[Check]:
    """What the built ranks, those of `kinds`, are held to. `layers`: Platform.layers that they were built with."""
    mtp = "m" in chunks[-1]
    rules = {key: rule for key, rule in weight_rules(source).items() if mtp or not key.startswith("mtp.")}
    shapes = {key: shape for key, shape in global_shapes(source).items() if key in rules}
    found = {part.key for rank in built for part in rank.parts}
    names = [name for rule in rules.values() for _, name in rule.parts()]
    formula = stage_parameters(source, plan, chunks, layers=layers)
    total = sum(prod(shape) for shape in shapes.values())
    summed = _sum_over_ranks(plan, built, shapes)
    return [
        Check(
            f"{len(found):,} tensors on the stages ↔ {len(names):,} tensors of a Hugging Face folder, none left over",
            tuple(sorted(found ^ rules.keys())),
        ),
        Check("they have the shapes that config.json asks for", tuple(_misshapen(plan, built, shapes))),
        Check("the parts of a stage's ranks fill each tensor from its beginning to its end", tuple(_gaps(plan, built))),
        Check(
            f"the parts of all ranks, copies counted once, are the model's {total:,} numbers",
            () if summed == total else (f"they are {summed:,}",),
        ),
        Check(
            "a rank's parameters are as many as the formula says",
            tuple(
                f"rank {rank.rank} has {rank.parameters}, not {formula[rank.stage]}"
                for rank in built
                if rank.parameters != formula[rank.stage]
            ),
        ),
    ]


Shapes = Mapping[str, tuple[int, ...]]


def _misshapen(plan: ParallelPlan, built: Sequence[BuiltRank], shapes: Shapes) -> list[str]:
    wrong = set()
    for part in (part for rank in built for part in rank.parts):
        shape = shapes.get(part.key, ())
        inner = shape[1:] if EXPERTS in part.key else shape
        padding = part.whole[0] - inner[0] if inner else 0
        if part.whole[1:] != inner[1:] or not 0 <= padding < (plan.tp if part.key in VOCABULARY else 1):
            wrong.add(f"{part.key} is {list(part.whole)}, not {list(inner)}")
    return sorted(wrong)


def _gaps(plan: ParallelPlan, built: Sequence[BuiltRank]) -> list[str]:
    """Tensors that the parts of a stage's ranks don't fill, if the ranks between first and last are like these two."""
    size, wrong = plan.world_size // plan.pp, []
    for rank in built:
        place = rank.rank % size
        for (key, expert), pieces in _by_tensor(rank).items():
            whole = prod(pieces[0].whole)
            fills = sum(prod(piece.shape) for piece in pieces) * _holders(plan, pieces) == whole
            begins = place > 0 or not any(pieces[0].offset)
            ends = place < size - 1 or pieces[-1].end == pieces[-1].whole
            if not (fills and begins and ends):
                wrong.append(f"{key}{'' if expert is None else f' of expert {expert}'} on rank {rank.rank}")
    return wrong


def _by_tensor(rank: BuiltRank) -> dict[tuple[str, int | None], list[Part]]:
    """The rank's parts by tensor: one each, but for a gated MLP's tensors, of which a rank has a part of each half."""
    found: dict[tuple[str, int | None], list[Part]] = {}
    for part in rank.parts:
        found.setdefault((part.key, part.expert), []).append(part)
    return found


def _holders(plan: ParallelPlan, pieces: Sequence[Part]) -> int:
    """Ranks that share out the tensor (of one expert) among them; 1 where each has the whole."""
    if sum(prod(piece.shape) for piece in pieces) == prod(pieces[0].whole):
        return 1
    return plan.etp if EXPERTS in pieces[0].key else plan.tp


def _sum_over_ranks(plan: ParallelPlan, built: Sequence[BuiltRank], shapes: Shapes) -> int:
    """Numbers on all ranks, those held by several counted once, vocabulary padding left out."""
    size, total = plan.world_size // plan.pp, 0
    for rank in (rank for rank in built if rank.rank % size == 0):
        for (key, _), pieces in _by_tensor(rank).items():
            if pieces[0].main:
                held = sum(prod(piece.shape) for piece in pieces) * _holders(plan, pieces)
                total += held * (plan.ep if EXPERTS in key else 1)
            if pieces[0].main and key in VOCABULARY:
                total -= prod(pieces[0].whole) - prod(shapes[key])
    return total
