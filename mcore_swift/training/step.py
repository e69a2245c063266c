"""One optimizer step, or one evaluation, on Megatron's pipeline schedules.

The forward step turns a micro-batch into per-token log-probabilities on the last stage and hands them to the objective.
Sums and counts are added up over micro-batches and data parallel ranks before they are divided, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from mcore_swift import parallel
from mcore_swift.data.batch import MicroBatch
from mcore_swift.objectives.objective import Objective
from mcore_swift.training import balance, context

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.packed_seq_params import PackedSeqParams
    from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """Sums over the whole job, the same on every rank."""

    loss: float  # mean over the labels that count
    metrics: dict[str, float]
    loss_tokens: int
    tokens: int  # positions of the micro-batches, padding included (not what context parallelism adds)
    sum_squared_lengths: float  # Σ document length², for attention FLOPs
    grad_norm: float = 0.0
    skipped: bool = False


def packed_params(batch: MicroBatch) -> PackedSeqParams | None:
    """Megatron's description of a packed micro-batch, or None for an unpacked one.

    Under context parallelism Transformer Engine demands the padded boundaries, too. Ours are the padded ones: it takes
    the same tensor given twice to mean that there is no padding between documents, and has its fastest kernels left.
    """
    if batch.cu_seqlens is None:
        return None
    from megatron.core.packed_seq_params import PackedSeqParams

    padded = batch.cu_seqlens if parallel.ranks().cp_size > 1 else None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        cu_seqlens_q_padded=padded,  # type: ignore[arg-type]
        cu_seqlens_kv_padded=padded,  # type: ignore[arg-type]
        max_seqlen_q=batch.max_seqlen,  # type: ignore[arg-type]
        max_seqlen_kv=batch.max_seqlen,  # type: ignore[arg-type]
    )


def forward_step(
    objective: Objective, batches: Iterator[MicroBatch], model: Any, return_schedule_plan: bool = False
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
    """Megatron's forward step function: the model's output, and the function that turns it into a loss.

    The batches are this rank's parts: the loss is a sum over them, so context parallel ranks add up like data parallel
    ones.
    """
    from mcore_swift.peft import adapters

    batch = next(batches)
    adapters.route(model, batch.adapter)
    if batch.chosen is not None:
        _adapters(model).begin(batch.chosen)
    # To hide experts' exchange, Megatron asks for the steps of a forward pass, to mix them with a backward pass's.
    run = model.build_schedule_plan if return_schedule_plan else model
    output = run(
        batch.tokens,
        batch.position_ids,
        None,
        labels=batch.labels,
        loss_mask=batch.loss_mask,
        packed_seq_params=packed_params(batch),
        padding_mask=None if batch.real is None else ~batch.real,
    )
    adapters.follow_route(model, output, batch.adapter)

    def loss(negative_logps: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        result = objective(-negative_logps.float(), None, batch)
        sums = {
            "loss": result.total.detach(),
            "count": result.count,
            **{k: v.detach() for k, v in result.metrics.items()},
        }
        return result.total, result.count, sums

    return output, loss


def parts(batches: Sequence[MicroBatch], device: torch.device, models: Sequence[Any] = ()) -> list[MicroBatch]:
    """What this rank computes of its micro-batches, on its device, with the positions that `models` ask for."""
    shared = context.share(batches)
    wanted = getattr(_adapters(models[0]), "wanted", None) if models else None
    if wanted is not None:
        marks = context.share([replace(batch, real=wanted(batch)) for batch in batches])
        shared = [replace(batch, chosen=mark.real) for batch, mark in zip(shared, marks, strict=True)]
    return [batch.to(device) for batch in shared]


def _adapters(model: Any) -> Any:
    """The adapters of a chunk, wrapped or not; None if it has none."""
    return getattr(getattr(model, "module", model), "adapters", None)


def run_schedule(
    models: Sequence[torch.nn.Module], batches: Sequence[MicroBatch], objective: Objective, *, forward_only: bool
) -> list[dict[str, Tensor]]:
    """Runs all micro-batches through Megatron's schedule; the last stage gets each one's sums back."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    iterators = [iter(batches) for _ in models]
    tokens = batches[0].tokens
    return get_forward_backward_func()(
        forward_step_func=partial(forward_step, objective),
        data_iterator=iterators if len(models) > 1 else iterators[0],  # type: ignore[arg-type]
        model=list(models) if len(models) > 1 else models[0],  # type: ignore[arg-type]
        num_microbatches=len(batches),
        seq_length=tokens.size(1) * parallel.ranks().cp_size,  # Megatron divides again
        micro_batch_size=tokens.size(0),
        forward_only=forward_only,
    )


def summarize(sums: list[dict[str, Tensor]], batches: Sequence[MicroBatch], device: torch.device) -> StepResult:
    """Adds up over micro-batches and data parallel ranks; every rank of the job gets the result.

    `sums` are of this rank's parts, `batches` are whole: the first of a context parallel group counts their sizes.
    """
    squared = sum(_sum_squared_lengths(batch) for batch in batches)
    positions = float(sum(batch.tokens.numel() for batch in batches))
    group = parallel.pp_group()
    last = dist.get_world_size(group) - 1
    shared: list[Any] = [sorted(sums[0]) if sums else None]
    if last > 0:
        dist.broadcast_object_list(shared, group=group, group_src=last)
    names: list[str] = shared[0]
    values = torch.zeros(len(names) + 2, dtype=torch.float64, device=device)
    if sums:
        values[: len(names)] = torch.stack(
            [torch.stack([part[name].double() for part in sums]).sum() for name in names]
        )
        if parallel.ranks().cp == 0:
            values[-2], values[-1] = positions, squared
        dist.all_reduce(values, group=parallel.dp_group())
    if last > 0:
        dist.broadcast(values, group=group, group_src=last)
    found = dict(zip(names, values.tolist(), strict=False))
    count = max(found.pop("count"), 1.0)
    loss = found.pop("loss") / count
    return StepResult(
        loss=loss,
        metrics={name: value / count for name, value in found.items()},
        loss_tokens=int(count),
        tokens=int(values[-2].item()),
        sum_squared_lengths=float(values[-1].item()),
    )


def _sum_squared_lengths(batch: MicroBatch) -> float:
    if batch.cu_seqlens is None:
        return float(batch.tokens.size(0) * batch.tokens.size(1) ** 2)
    return float(batch.cu_seqlens.diff().double().square().sum())


def train_step(
    models: Sequence[Any],
    optimizer: MegatronOptimizer,
    batches: Sequence[MicroBatch],
    objective: Objective,
    device: torch.device,
) -> StepResult:
    """Forward and backward over the micro-batches, then the optimizer."""
    for model in models:
        model.zero_grad_buffer()
    optimizer.zero_grad()
    balance.reset(models)
    config = models[0].config
    labels = balance.set_loss_weight(config, batches, device)
    sums = run_schedule(models, parts(batches, device, models), objective, forward_only=False)
    updated, grad_norm, _ = cast(Any, optimizer).step()
    result = summarize(sums, batches, device)
    assert labels in (None, result.loss_tokens), "an objective that counts other things than labels"
    metrics = result.metrics | balance.metrics(config, models, device)
    return replace(result, metrics=metrics, grad_norm=float(grad_norm or 0.0), skipped=not updated)


@torch.no_grad()
def eval_step(
    models: Sequence[Any], batches: Sequence[MicroBatch], objective: Objective, device: torch.device
) -> StepResult:
    """The loss of these micro-batches; nothing is changed."""
    for model in models:
        model.eval()
    sums = run_schedule(models, parts(batches, device, models), objective, forward_only=True)
    for model in models:
        model.train()
    return summarize(sums, batches, device)
