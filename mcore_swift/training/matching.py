"""What AOT compares an answer with (Melnyk et al. 2024, arXiv:2406.05882): the one of the same rank among all others.

TRL sorts the pairs of a device's batch, so there the loss depends on the layout. Here the global batch is sorted, in a
forward pass of the policy before the step, as KTO's divergence is estimated: then each pair's partners are numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mcore_swift import parallel
from mcore_swift.data.batch import MicroBatch

if TYPE_CHECKING:
    from torch import Tensor


def with_partners(batches: Sequence[MicroBatch], logps: Sequence[Tensor], *, paired: bool) -> list[MicroBatch]:
    """The micro-batches with `Sequences.partners`, where this rank has `logps`, the policy's. Collective over the data.

    paired: of pair i the difference of its answers' log-probabilities is x_i, and under the reference y_i; otherwise
    x_i is the log-ratio to the reference of the preferred answer, y_i that of the other. A pair's partners are the y of
    the same rank as x_i, and the x of the same rank as y_i.
    """
    if not logps:
        return list(batches)
    known = [batch.sequences for batch in batches]
    ours, theirs = torch.cat(list(logps)), torch.cat([each.ref_logps for each in known])  # type: ignore[union-attr, misc]
    if paired:
        x, y = ours[0::2] - ours[1::2], theirs[0::2] - theirs[1::2]
    else:
        x, y = (ours - theirs)[0::2], (ours - theirs)[1::2]
    partners = torch.stack(_partners(x, y), dim=1).flatten()
    own = partners.split([each.n for each in known])  # type: ignore[union-attr]
    return [
        replace(batch, sequences=replace(batch.sequences, partners=part))  # type: ignore[type-var]
        for batch, part in zip(batches, own, strict=True)
    ]


def _partners(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """For this rank's x and y, float32 [pairs], the y and x of the same rank in the global batch."""
    place, group = parallel.ranks(), parallel.dp_group()
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, (x.tolist(), y.tolist()), group=group)
    every = every[:: place.cp_size]  # ranks of a context parallel group follow each other, and have the same answers
    first = sum(len(values) for values, _ in every[: place.dp])
    mine = slice(first, first + len(x))
    all_x, all_y = (torch.tensor([v for part in every for v in part[side]], device=x.device) for side in (0, 1))
    sorted_x, sorted_y = (values.sort(stable=True) for values in (all_x, all_y))
    return sorted_y.values[sorted_x.indices.argsort()[mine]], sorted_x.values[sorted_y.indices.argsort()[mine]]
