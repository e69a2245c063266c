"""The layout tests see the faults that other stacks were bitten by: each is planted here, and must be found.

A fault is planted in this process and inherited by the forked ranks. The run must end (a crash would prove nothing) and
then differ from one rank's. That the same case passes without the fault is what the other files of this folder show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_swift.data.batch import MicroBatch
from mcore_swift.objectives.objective import Loss, Objective, Scores
from mcore_swift.objectives.registry import OBJECTIVES
from mcore_swift.objectives.sft import sft
from mcore_swift.recipe import MoeSection, ObjectiveSection, ParallelSection
from tests.distributed.harness import prepared
from tests.distributed.rank_model import Trained, recipe_for, train
from tests.distributed.test_layouts import assert_same_run
from tests.distributed.tiny_models import tiny_folder

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Fault:
    """`plant` changes the code under test; the layout is one that must then fail."""

    plant: Callable[[Patch], None]
    layout: ParallelSection
    variant: str = "qwen2-tied"
    packing: bool = True
    moe: MoeSection = field(default_factory=MoeSection)


# --- context parallelism ----------------------------------------------------------------------------------------------


def cp_sum(value: torch.Tensor) -> torch.Tensor:
    from megatron.core import parallel_state
    from torch.distributed.nn import functional

    group: Any = parallel_state.get_context_parallel_group()
    return functional.all_reduce(value, group=group)


def loss_summed_twice(patch: Patch) -> None:
    """The objective adds up over context parallel ranks, as everything around it does again."""

    def twice(scores: Scores, options: ObjectiveSection) -> Loss:
        once = sft(scores, options)
        return replace(once, total=cp_sum(once.total))

    patch.setitem(OBJECTIVES, "sft", Objective(twice, "labels"))


def rotary_offset_on_rank_1_packed(patch: Patch) -> None:
    from megatron.core.models.common.embeddings import rope_utils

    right = rope_utils._get_thd_freqs_on_this_cp_rank

    def wrong(cp_rank: int, *args: Any) -> torch.Tensor:
        return right(cp_rank, *args).roll(int(cp_rank == 1), dims=0)

    patch.setattr(rope_utils, "_get_thd_freqs_on_this_cp_rank", wrong)


def rotary_offset_on_rank_1_rows(patch: Patch) -> None:
    from megatron.core.models.common.embeddings import rotary_pos_embedding

    right = rotary_pos_embedding.get_pos_emb_on_this_cp_rank

    def wrong(pos_emb: torch.Tensor, seq_dim: int, cp_group: Any) -> torch.Tensor:
        return right(pos_emb.roll(int(cp_group.rank() == 1), dims=seq_dim), seq_dim, cp_group)

    patch.setattr(rotary_pos_embedding, "get_pos_emb_on_this_cp_rank", wrong)


def zigzag_in_wrong_order(patch: Patch) -> None:
    """Tokens are dealt out in plain blocks, while attention and RoPE take them for a zigzag."""
    from mcore_swift.training import context

    right = context.part_of

    def in_blocks(batch: MicroBatch, *, size: int, rank: int) -> MicroBatch:
        def block(values: torch.Tensor) -> torch.Tensor:
            return values.chunk(size, dim=1)[rank]

        return replace(
            right(batch, size=size, rank=rank),
            tokens=block(batch.tokens),
            labels=block(batch.labels),
            loss_mask=block(batch.loss_mask),
        )

    patch.setattr(context, "part_of", in_blocks)


def labels_of_another_part(patch: Patch) -> None:
    """Labels are shifted after the cut, instead of before: the last one of each chunk is wrong."""
    from mcore_swift.training import context

    right = context.part_of

    def shifted(batch: MicroBatch, *, size: int, rank: int) -> MicroBatch:
        part = right(batch, size=size, rank=rank)
        return replace(part, labels=torch.where(part.loss_mask > 0, part.tokens.roll(-1, dims=1), 0))

    patch.setattr(context, "part_of", shifted)


def keys_gradient_of_own_queries_only(patch: Patch) -> None:
    """The gradients of gathered keys and values are cut, but not summed over the ranks."""
    from mcore_swift.models import attention

    right = attention.gather_from_sequence_parallel_region

    def wrong(value: torch.Tensor, *, tensor_parallel_output_grad: bool, group: Any) -> torch.Tensor:
        return right(value, tensor_parallel_output_grad=False, group=group)

    patch.setattr(attention, "gather_from_sequence_parallel_region", wrong)


# --- pipelines --------------------------------------------------------------------------------------------------------


def no_boundaries_on_middle_stages(patch: Patch) -> None:
    """cu_seqlens reach the first and the last stage only: in between, documents attend to one another."""
    from mcore_swift import parallel
    from mcore_swift.training import step

    right = step.packed_params

    def wrong(batch: MicroBatch) -> Any:
        place = parallel.ranks()
        return right(batch) if place.pp == 0 or place.is_last_stage else None

    patch.setattr(step, "packed_params", wrong)


# --- experts ----------------------------------------------------------------------------------------------------------


def aux_loss_scaled_by_ep(patch: Patch) -> None:
    from megatron.core import parallel_state

    from mcore_swift.models.router import Router

    right = Router.get_aux_loss_coeff

    def wrong(self: Any, kind: str) -> float:
        return right(self, kind) * parallel_state.get_expert_model_parallel_world_size()

    patch.setattr(Router, "get_aux_loss_coeff", wrong)


def expert_gradients_of_the_wrong_group(patch: Patch) -> None:
    """They are averaged over all data parallel ranks, which hold other experts, like the dense ones' gradients."""
    import torch.distributed as dist
    from megatron.core.distributed import DistributedDataParallel

    from mcore_swift import parallel

    right = DistributedDataParallel.finish_grad_sync

    def wrong(self: Any, *args: Any, **kwargs: Any) -> None:
        right(self, *args, **kwargs)
        for buffer in self.expert_parallel_buffers:
            dist.all_reduce(buffer.grad_data, group=parallel.dp_group())
            buffer.grad_data /= dist.get_world_size(parallel.dp_group())

    patch.setattr(DistributedDataParallel, "finish_grad_sync", wrong)


def experts_in_another_order_on_rank_1(patch: Patch) -> None:
    """On the second expert parallel rank each expert gets its neighbour's tokens."""
    from megatron.core.transformer.moe.experts import SequentialMLP

    right = SequentialMLP.forward

    def wrong(self: Any, *args: Any) -> Any:
        own = self.local_experts
        if self.ep_group.rank() == 1:
            self.local_experts = torch.nn.ModuleList([*own[1:], own[0]])
        try:
            return right(self, *args)
        finally:
            self.local_experts = own

    patch.setattr(SequentialMLP, "forward", wrong)


EP2 = ParallelSection(ep=2, dp=2)
BALANCED = MoeSection(aux_loss="aux_loss", aux_loss_coeff=0.01)
CP2 = ParallelSection(cp=2)
FAULTS = {
    "aux loss scaled by EP": Fault(aux_loss_scaled_by_ep, EP2, "qwen3-moe", moe=BALANCED),
    "expert gradients of the wrong group": Fault(expert_gradients_of_the_wrong_group, EP2, "qwen3-moe"),
    "experts in another order on rank 1": Fault(experts_in_another_order_on_rank_1, EP2, "qwen3-moe"),
    "cu_seqlens not sent to middle stages": Fault(no_boundaries_on_middle_stages, ParallelSection(pp=4)),
    "CP loss summed twice": Fault(loss_summed_twice, CP2),
    "RoPE offset on CP rank 1, packed": Fault(rotary_offset_on_rank_1_packed, CP2),
    "RoPE offset on CP rank 1, rows": Fault(rotary_offset_on_rank_1_rows, CP2, packing=False),
    "zigzag in the wrong order, packed": Fault(zigzag_in_wrong_order, CP2),
    "zigzag in the wrong order, rows": Fault(zigzag_in_wrong_order, CP2, packing=False),
    "labels of another part": Fault(labels_of_another_part, CP2, packing=False),
    "gradients of keys not summed": Fault(keys_gradient_of_own_queries_only, CP2),
}


Runs = Callable[[Fault], tuple[Path, Trained]]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A variant's folder and its run on one rank, without any fault."""
    place, found = tmp_path_factory.mktemp("models"), {}

    def run(fault: Fault) -> tuple[Path, Trained]:
        key = (fault.variant, fault.moe)
        if key not in found:
            folder = tiny_folder(place / fault.variant, fault.variant)
            found[key] = folder, train(recipe_for(folder, moe=fault.moe))
        return found[key]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(one_rank: Runs, monkeypatch: Patch, name: str) -> None:
    fault = FAULTS[name]
    folder, expected = one_rank(fault)
    prepared()
    fault.plant(monkeypatch)
    found = train(recipe_for(folder, fault.layout, packing=fault.packing, moe=fault.moe))
    with pytest.raises(AssertionError):
        assert_same_run(found, expected)
