"""One optimizer step, or one evaluation, on Megatron's pipeline schedules.

The forward step turns a micro-batch into per-token log-probabilities on the last stage, sums them over answers where
the batch has any, and hands them to the objective. Sums and counts are added up over micro-batches and data parallel
ranks before they are divided, once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from mcore_swift import parallel
from mcore_swift.data.batch import MicroBatch
from mcore_swift.data.probes import apart
from mcore_swift.objectives.objective import Answers, Distances, Objective, Scores
from mcore_swift.training import balance, context
from mcore_swift.training.matching import with_partners
from mcore_swift.training.output_rows import logps_at, output_rows
from mcore_swift.training.sums import StepResult, global_sizes, summarize

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.packed_seq_params import PackedSeqParams
    from torch import Tensor

    from mcore_swift.training.reference import Reference


Score = Callable[["Tensor", MicroBatch], tuple["Tensor", "Tensor", dict[str, "Tensor"]]]


def packed_params(batch: MicroBatch) -> PackedSeqParams | None:
    """Megatron's description of a packed micro-batch, or None for an unpacked one.

    Under context parallelism Transformer Engine demands the padded boundaries, too. Ours are the padded ones: it takes
    the same tensor given twice to mean that there is no padding between documents, and has its fastest kernels left.
    """
    if batch.cu_seqlens is None:
        return None
    from megatron.core.packed_seq_params import PackedSeqParams

    padded = batch.cu_seqlens if parallel.ranks().cp_size > 1 else None
    kind: Any = PackedSeqParams
    if batch.shared is not None:
        from mcore_swift.models.shared_prompts import SharedParams

        kind = partial(SharedParams, shared=batch.shared)
    return kind(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )


def forward_step(
    score: Score, batches: Iterator[MicroBatch], model: Any, return_schedule_plan: bool = False
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
    """Megatron's forward step function: the model's output, and the function that turns it into a loss.

    The batches are this rank's parts. `score` gets the last stage's output, which is −log p of the labels, [b, s] (of a
    model with a score: its positions' scores, negative), or what the batch's `compare` makes of it, and the batch.
    """
    from mcore_swift.peft import adapters

    batch = next(batches)
    adapters.route(model, batch.adapter)
    if batch.chosen is not None and _adapters(model) is not None:
        _adapters(model).begin(batch.chosen)
    outputs = batch.compare
    chunk = model.config.loss_chunk
    if outputs is None and (batch.output_rows is not None or chunk):
        outputs = partial(logps_at, batch.output_rows, chunk)
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
        **({} if outputs is None else {"output_processor": outputs}),
    )
    adapters.follow_route(model, output, batch.adapter)
    return output, lambda output: score(output, batch)


def score_loss(
    objective: Objective, totals: Mapping[str, Tensor], output: Tensor, batch: MicroBatch
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A micro-batch's loss, count, and the sums that `summarize` adds up. `output`: as `forward_step`'s score gets it.

    The loss of labels is a sum over this rank's part, so context parallel ranks add up like data parallel ones. Whole
    answers are on every rank of the group: each has the gradient of its own part, and the first one counts.
    """
    nll, *distances = output.float().unbind() if batch.compare is not None else [output.float()]
    answers = answers_of(-nll, batch)
    result = objective(Scores(-nll, batch, answers, totals, Distances(*distances) if distances else None))
    counts = float(objective.unit == "labels" or parallel.ranks().cp == 0)
    sums = {"loss": result.total.detach() * counts, "count": result.count * counts}
    for name, mean in result.metrics.items():
        sums |= {f"{name}:total": mean.total * counts, f"{name}:count": mean.count * counts}
    sums |= result.extremes
    if answers is not None:
        logps, others = answers.logps.detach(), answers.of.ref_logps
        sums["finite"] = (logps if others is None else logps + others).isfinite()
    return result.total, (result.count * counts).int(), sums


def answers_of(logps: Tensor, batch: MicroBatch) -> Answers | None:
    """Sums of a micro-batch's log-probabilities over its answers, whole ones on every context parallel rank.

    The gradient of a sum is that of each label, so it stays on the rank whose part the label is in. The sums are made
    by masking, because scattered additions come in any order on GPUs, and a resumed run must not differ by a bit.
    """
    sequences = batch.sequences
    if sequences is None:
        return None
    numbers = torch.arange(sequences.n, device=logps.device)
    labels = sequences.index.flatten()[None] == numbers[:, None]  # [n, b · s]
    values = torch.stack([logps * batch.loss_mask, logps, torch.ones_like(logps)]).flatten(1)
    sums = torch.where(labels[None], values[:, None], 0.0).sum(-1)
    if parallel.ranks().cp_size > 1:
        from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region

        sums = cast(Any, reduce_from_tensor_model_parallel_region(sums, group=parallel.cp_group()))
    return Answers(sums[0], sums[1], sums[2].detach(), sequences)


def parts(batches: Sequence[MicroBatch], device: torch.device, models: Sequence[Any]) -> list[MicroBatch]:
    """What this rank computes of its micro-batches, on its device, with the positions that `models` ask for, and those
    that pass the output layer."""
    shared = context.share(batches, prompts=models[0].config.share_prompts)
    wanted = getattr(_adapters(models[0]), "wanted", None)
    if wanted is not None:
        marks = context.share([replace(batch, real=wanted(batch)) for batch in batches])
        shared = [replace(batch, chosen=mark.real) for batch, mark in zip(shared, marks, strict=True)]
    return [replace(batch, output_rows=output_rows(batch)).to(device) for batch in shared]


def _adapters(model: Any) -> Any:
    """The adapters of a chunk, wrapped or not; None if it has none."""
    return getattr(getattr(model, "module", model), "adapters", None)


def run_schedule(
    models: Sequence[torch.nn.Module], batches: Sequence[MicroBatch], score: Score, *, forward_only: bool
) -> list[dict[str, Tensor]]:
    """Runs all micro-batches through Megatron's schedule; the last stage gets what `score` says of each."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from mcore_swift.peft import adapters

    iterators = [iter(batches) for _ in models]
    tokens = batches[0].tokens
    with contextlib.nullcontext() if forward_only else adapters.steady(models):
        return get_forward_backward_func()(
            forward_step_func=partial(forward_step, score),
            data_iterator=iterators if len(models) > 1 else iterators[0],  # type: ignore[arg-type]
            model=list(models) if len(models) > 1 else models[0],  # type: ignore[arg-type]
            num_microbatches=len(batches),
            seq_length=tokens.size(1) * parallel.ranks().cp_size,  # Megatron divides again
            micro_batch_size=tokens.size(0),
            forward_only=forward_only,
        )


@contextlib.contextmanager
def evaluating(models: Sequence[Any]) -> Iterator[None]:
    """The models without dropout, back in training mode afterwards."""
    for model in models:
        _set_training(model, False)
    try:
        yield
    finally:
        for model in models:
            _set_training(model, True)


def _set_training(model: torch.nn.Module, mode: bool) -> None:
    """Module.train, which takes a process several milliseconds for a large model: a reference's pass begins with it."""
    vars(model)["training"] = mode
    for child in model._modules.values():
        if child is not None:
            _set_training(child, mode)


@torch.no_grad()
def answer_logps(models: Sequence[Any], batches: list[MicroBatch]) -> list[Tensor]:
    """The answers' log-probabilities under the models as they are now: float32 [n] of each micro-batch; [] before the
    last pipeline stage. The batches are this rank's parts. Collective."""

    def score(output: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        logps = -output.float()
        answers = answers_of(logps, batch)
        assert answers is not None
        return logps.sum(), torch.ones((), dtype=torch.int32, device=logps.device), {"logps": answers.logps}

    with evaluating(models):
        return [found["logps"] for found in run_schedule(models, batches, score, forward_only=True)]


def divergence(models: Sequence[Any], probes: list[MicroBatch], totals: Mapping[str, Tensor]) -> Tensor:
    """KTO's estimate of the policy's divergence from the reference: a float64 scalar, at least 0. Collective.

    The mean over the global batch's probes of log π − log π_ref (section 4.1 of arXiv:2402.01306); nothing is divided
    before all ranks' sums are added. `probes`: this rank's parts of the micro-batches that hold them, `prepared`. Only
    the last pipeline stage's value is right, and used.
    """
    logps = answer_logps(models, probes)
    total = torch.zeros((), dtype=torch.float64, device=probes[0].tokens.device)
    for batch, found in zip(probes, logps, strict=False):
        if batch.sequences is not None and batch.sequences.ref_logps is not None:
            total += (found - batch.sequences.ref_logps).double().sum()
    if logps:
        dist.all_reduce(total, group=parallel.dp_group())
    return (total / parallel.ranks().cp_size / totals["probes"].clamp(min=1)).clamp(min=0)


def without_probes(batches: Sequence[MicroBatch]) -> tuple[Sequence[MicroBatch], Sequence[MicroBatch]]:
    """(a step's whole micro-batches, those of its probes); none where there are no probes.

    Only the first ones are trained: probes pass the models forward, once for the policy and once for the reference.
    """
    sequences, place = batches[0].sequences, parallel.ranks()
    if sequences is None or sequences.probe is None:
        return batches, []
    return apart(batches, multiple=context.TOKENS_MULTIPLE * place.cp_size * place.tp_size)


def prepared(
    models: Sequence[Any],
    objective: Objective,
    reference: Reference | None,
    batches: Sequence[MicroBatch],
    device: torch.device,
) -> list[MicroBatch]:
    """This rank's parts of a step's micro-batches, with what the objective needs to know of the reference, and of the
    global batch's other answers."""
    if objective.weigh is not None:
        batches = [objective.weigh(batch, objective.options) for batch in batches]
    mine = parts(batches, device, models)
    mine = mine if reference is None else reference(mine)
    if objective.matching is not None:
        mine = with_partners(mine, answer_logps(models, mine), paired=objective.matching == "pairs")
    return mine


def _needs_totals(objective: Objective, batches: Sequence[MicroBatch]) -> bool:
    """The same on all ranks."""
    return objective.unit != "labels" or batches[0].weighted


def _computed(batches: Sequence[MicroBatch], mine: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
    """What passes the layers of whole micro-batches: these, or those with shared prompts.

    FLOPs and the balance of experts are of what is computed, tokens a second of the data.
    """
    return batches if mine[0].shared is None else mine


def train_step(
    models: Sequence[Any],
    optimizer: MegatronOptimizer,
    batches: Sequence[MicroBatch],
    objective: Objective,
    device: torch.device,
    reference: Reference | None = None,
) -> StepResult:
    """Forward and backward over the micro-batches, then the optimizer.

    `reference` fills in the answers' log-probabilities under the reference policy, in passes of its own.
    """
    for model in models:
        model.zero_grad_buffer()
    optimizer.zero_grad()
    config = models[0].config
    totals: dict[str, Tensor] = {}
    if _needs_totals(objective, batches) or balance.has_losses(config):
        # First: a GPU's host would wait for the reference.
        totals = global_sizes(objective, batches, device)
    batches, probes = without_probes(batches)
    mine = prepared(models, objective, reference, batches, device)
    if probes:
        totals["kl"] = divergence(models, prepared(models, objective, reference, probes, device), totals)
    balance.reset(config, models)
    balance.set_loss_weight(config, _computed(batches, mine), device, count=totals.get(objective.unit))
    sums = run_schedule(models, mine, partial(score_loss, objective, totals), forward_only=False)
    updated, grad_norm, _ = cast(Any, optimizer).step()
    result = summarize(sums, batches, device, computed=_computed(batches, mine))
    metrics = result.metrics | balance.metrics(config, models, device)
    return replace(result, metrics=metrics, grad_norm=float(grad_norm or 0.0), skipped=not updated)


@torch.no_grad()
def eval_step(
    models: Sequence[Any],
    batches: Sequence[MicroBatch],
    objective: Objective,
    device: torch.device,
    reference: Reference | None = None,
) -> StepResult:
    """The loss of these micro-batches; nothing is changed."""
    totals = global_sizes(objective, batches, device) if _needs_totals(objective, batches) else {}
    batches, probes = without_probes(batches)
    mine = prepared(models, objective, reference, batches, device)
    if probes:
        totals["kl"] = divergence(models, prepared(models, objective, reference, probes, device), totals)
    with evaluating(models):
        sums = run_schedule(models, mine, partial(score_loss, objective, totals), forward_only=True)
    return summarize(sums, batches, device, computed=_computed(batches, mine))
