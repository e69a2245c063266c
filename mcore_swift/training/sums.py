"""A step's sums, added up over micro-batches and ranks, and divided once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mcore_swift import parallel
from mcore_swift.data.batch import MicroBatch
from mcore_swift.objectives.objective import Objective, sizes

if TYPE_CHECKING:
    from torch import Tensor


EXTREMES = ("_min", "_max")  # how the names of what isn't summed end


@dataclass(frozen=True)
class StepResult:
    """Sums over the whole job, the same on every rank."""

    loss: float  # mean over what the objective counts: labels, pairs or answers
    metrics: dict[str, float]
    loss_tokens: int  # labels that count
    tokens: int  # positions of the micro-batches, padding included (not probes, nor what context parallelism adds)
    sum_squared_lengths: float  # Σ document length², for attention FLOPs
    computed_tokens: int  # those that pass the layers, fewer where prompts are shared; for all other FLOPs
    grad_norm: float = 0.0
    skipped: bool = False
    tally: float = 0.0  # what the loss is a mean over
    counts: dict[str, float] = field(default_factory=dict)  # the same of each of the objective's metrics
    bad_rows: tuple[int, ...] = ()  # rows of the answers whose loss is not finite


def summarize(
    sums: list[dict[str, Tensor]],
    batches: Sequence[MicroBatch],
    device: torch.device,
    *,
    computed: Sequence[MicroBatch],
) -> StepResult:
    """Adds up over micro-batches and data parallel ranks; every rank of the job gets the result.

    `sums` are of this rank's parts; `batches` are whole, and so is what is `computed` of them: the first of a context
    parallel group counts their sizes.
    """
    squared = sum(_sum_squared_lengths(batch) for batch in batches)
    positions = float(sum(batch.tokens.numel() for batch in batches))
    passed = float(sum(batch.tokens.numel() for batch in computed))
    labels = sum(float(batch.loss_mask.count_nonzero()) for batch in batches)
    group = parallel.pp_group()
    last = dist.get_world_size(group) - 1
    known: list[Any] = [sorted(sums[0].keys() - {"finite"}) if sums else None]
    if last > 0:
        dist.broadcast_object_list(known, group=group, group_src=last)
    names: list[str] = [name for name in known[0] if not name.endswith(EXTREMES)]
    extremes = _extremes([name for name in known[0] if name.endswith(EXTREMES)], sums, device)
    values = torch.zeros(len(names) + 4, dtype=torch.float64, device=device)
    if sums:
        values[: len(names)] = torch.stack(
            [torch.stack([part[name].double() for part in sums]).sum() for name in names]
        )
        if parallel.ranks().cp == 0:
            values[-4:] = torch.tensor([labels, positions, squared, passed], dtype=torch.float64)
        dist.all_reduce(values, group=parallel.dp_group())
    if last > 0:
        dist.broadcast(values, group=group, group_src=last)
    *found, labels, positions, squared, passed = values.tolist()
    totals = dict(zip(names, found, strict=True))
    count = totals.pop("count")
    loss, tally = totals.pop("loss") / max(count, 1.0), totals.pop("tally", count)
    counts = {name.removesuffix(":count"): n for name, n in totals.items() if name.endswith(":count")}
    return StepResult(
        loss=loss,
        metrics=with_margin({name: totals[f"{name}:total"] / n for name, n in counts.items() if n}) | extremes,
        loss_tokens=round(labels),
        tokens=round(positions),
        sum_squared_lengths=squared,
        computed_tokens=round(passed),
        tally=tally,
        counts=counts,
        bad_rows=() if math.isfinite(loss) else bad_rows(sums, batches),
    )


def _extremes(names: list[str], sums: list[dict[str, Tensor]], device: torch.device) -> dict[str, float]:
    """The smallest and largest of all micro-batches and ranks; what no micro-batch has is left out. Collective."""
    if not names:
        return {}
    signs = torch.tensor([1.0 if name.endswith("_max") else -1.0 for name in names], device=device)
    largest = torch.full_like(signs, -torch.inf)
    for part in sums:
        largest = torch.maximum(largest, signs * torch.stack([part[name].float() for name in names]))
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=parallel.dp_group())
    group = parallel.pp_group()
    dist.broadcast(largest, group=group, group_src=dist.get_world_size(group) - 1)
    return {name: value for name, value in zip(names, (signs * largest).tolist(), strict=True) if math.isfinite(value)}


def bad_rows(sums: list[dict[str, Tensor]], batches: Sequence[MicroBatch]) -> tuple[int, ...]:
    """The rows of the global batch's answers that have no finite log-probability; where all have, those of the
    micro-batches that have no finite loss. Collective over the job."""
    answers: list[int] = []
    of_batches: list[int] = []
    for part, batch in zip(sums, batches, strict=False):
        if batch.sequences is not None and not part["loss"].isfinite():
            of_batches += batch.sequences.row.tolist()
            answers += batch.sequences.row[~part["finite"].cpu()].tolist()
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (answers, of_batches))
    found = [row for rows, _ in every for row in rows] or [row for _, rows in every for row in rows]
    return tuple(sorted(set(found)))


def global_sizes(objective: Objective, batches: Sequence[MicroBatch], device: torch.device) -> dict[str, Tensor]:
    """What the global batch holds: `sizes` of all its micro-batches, float64 scalars. Collective.

    `batches` are whole, and the same on the ranks of a context parallel group.
    """
    mine = [sizes(batch) for batch in batches]
    values = torch.tensor([sum(each[name] for each in mine) for name in mine[0]], dtype=torch.float64, device=device)
    dist.all_reduce(values, group=parallel.dp_group())
    return dict(zip(mine[0], values / parallel.ranks().cp_size, strict=True))


def _sum_squared_lengths(batch: MicroBatch) -> float:
    if batch.cu_seqlens is None:
        return float(batch.tokens.size(0) * batch.tokens.size(1) ** 2)
    return float(batch.cu_seqlens.diff().double().square().sum())


class Means:
    """The loss and the metrics of several global batches together, each a mean over what it counts."""

    def __init__(self) -> None:
        self.tally = 0.0
        self._totals: dict[str, float] = {}
        self._counts: dict[str, float] = {}
        self._extremes: dict[str, float] = {}

    def add(self, result: StepResult) -> None:
        self.tally += result.tally
        self._add("loss", result.loss, result.tally)
        for name, value in result.metrics.items():
            if name in result.counts:
                self._add(name, value, result.counts[name])
            elif name.endswith(EXTREMES):
                best = min if name.endswith("_min") else max
                self._extremes[name] = best(value, self._extremes.get(name, value))

    def _add(self, name: str, value: float, count: float) -> None:
        self._totals[name] = self._totals.get(name, 0.0) + value * count
        self._counts[name] = self._counts.get(name, 0.0) + count

    def values(self) -> dict[str, float]:
        means = {name: total / self._counts[name] for name, total in self._totals.items() if self._counts[name]}
        return with_margin(means) | self._extremes


def with_margin(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics with `margin`, by how much chosen answers are rewarded more: a difference of two means, taken last.

    Of single answers a batch may hold many of one kind and few of the other, so no mean of differences would be right.
    """
    if not {"reward_chosen", "reward_rejected"} <= metrics.keys():
        return metrics
    return metrics | {"margin": metrics["reward_chosen"] - metrics["reward_rejected"]}
