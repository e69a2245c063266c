"""Context parallelism's share of a step: every rank of the group has the same micro-batches, and keeps its part.

Documents are padded here, and prompts of pairs shared, behind the loaders, so that which samples a step sees doesn't
depend on the layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from mcore_swift import parallel
from mcore_swift.data.batch import MicroBatch
from mcore_swift.data.context_split import lengthen, pad_documents, part_of
from mcore_swift.data.shared_prompts import share_prompts

# A rank's tokens are a multiple of it: FP8 matrix products want 16, and none is slower for it.
TOKENS_MULTIPLE = 16


def share(batches: Sequence[MicroBatch], *, prompts: bool = False) -> list[MicroBatch]:
    """This rank's part of a step's micro-batches; the whole of them without context parallelism.

    prompts: those of pairs are computed once; of packed micro-batches, and not under context parallelism. With that,
    packed ones leave with one length over the step, which pipeline stages need; rows must have a multiple of 2·cp·tp
    positions already (`ParallelPlan.length_multiple`).
    """
    place = parallel.ranks()
    if prompts:
        assert place.cp_size == 1
        stages = dist.get_world_size(parallel.pp_group())
        return share_prompts(batches, multiple=TOKENS_MULTIPLE * place.tp_size, even=stages > 1)
    if place.cp_size == 1:
        return list(batches)
    if batches[0].cu_seqlens is not None:
        batches = _one_length([pad_documents(batch, 2 * place.cp_size) for batch in batches], place)
    return [part_of(batch, size=place.cp_size, rank=place.cp) for batch in batches]


def _one_length(batches: list[MicroBatch], place: parallel.Ranks) -> list[MicroBatch]:
    multiple = TOKENS_MULTIPLE * place.cp_size * place.tp_size
    longest = max(batch.tokens.size(1) for batch in batches)
    return [lengthen(batch, -(-longest // multiple) * multiple) for batch in batches]
