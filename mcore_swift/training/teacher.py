"""Distillation's teacher: a frozen model whose last hidden states are kept for a step, and compared in the student's.

They are much smaller than its logits, which are made again of a few tokens at a time, beside the student's. The teacher
has the student's layout, so the last pipeline stage's ranks have both models' states of the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch

from mcore_swift import parallel
from mcore_swift.data.batch import MicroBatch
from mcore_swift.objectives.divergence import Comparison, Head, Shard, compared, tokens_at_once
from mcore_swift.recipe import ObjectiveSection
from mcore_swift.training import step

if TYPE_CHECKING:
    from torch import Tensor


def teaching(chunks: Sequence[Any], options: ObjectiveSection) -> Callable[[list[MicroBatch]], list[MicroBatch]]:
    """What gives a step's micro-batches their comparison with the teacher, whose chunks on this rank these are.

    `options`: the objective's, filled. It is a `reference.Reference`: it runs the pipeline, forward only.
    """
    teacher = chunks[-1]

    def reference(batches: list[MicroBatch]) -> list[MicroBatch]:
        # How many labels count is needed on the host: asked for here, it doesn't wait for a GPU in the step itself.
        counted = [batch.loss_mask.t().flatten().nonzero()[:, 0] for batch in batches]
        found = hidden_states(chunks, batches)
        if not found:
            return batches
        return [
            replace(batch, compare=partial(compare, counted=positions, teacher=teacher, states=states, options=options))
            for batch, positions, states in zip(batches, counted, found, strict=True)
        ]

    return reference


@torch.no_grad()
def hidden_states(chunks: Sequence[Any], batches: list[MicroBatch]) -> list[Tensor]:
    """What enters the output layer, of each micro-batch: [s, b, hidden], this rank's part of s under sequence
    parallelism; [] before the last pipeline stage. The batches are this rank's parts. Collective."""

    def score(states: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        one = torch.ones((), dtype=torch.int32, device=states.device)
        return states.new_zeros(()), one, {"states": states}

    asked = [replace(batch, compare=lambda *, hidden_states, **_: hidden_states) for batch in batches]
    with step.evaluating(chunks):
        return [found["states"] for found in step.run_schedule(chunks, asked, score, forward_only=True)]


def compare(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor,
    scale_logits: Callable[[Tensor], Tensor],
    counted: Tensor,
    teacher: Any,
    states: Tensor,
    options: ObjectiveSection,
    **_: Any,
) -> Tensor:
    """In place of the student's output layer (GPTModel's output processor): `Comparison.values` of labels that count,
    0 elsewhere; float32 [4, b, s].

    hidden_states: the student's, states: the teacher's, as `hidden_states` gives them; counted: int64, the numbers of
    the labels that count, of all s · b.
    """
    with torch.no_grad():  # for its hooks: its weight may be on the way still, from the ranks that have updated it
        output_layer(hidden_states[:1], weight=output_weight)
    group = parallel.tp_group()
    weight: Tensor = output_layer.weight if output_weight is None else output_weight
    of = Comparison(
        labels=labels.t().flatten()[counted],
        states=_whole(states, output_layer).flatten(0, 1)[counted],
        head=_head(_output_weight(teacher), teacher, teacher._scale_logits),
        shard=Shard(group.rank() * weight.size(0), group if group.size() > 1 else None),
        options=options,
        at_once=tokens_at_once(weight.size(0)),
    )
    student = _whole(hidden_states, output_layer).flatten(0, 1)[counted]
    found = compared(student, _head(weight, teacher, scale_logits), of)
    values = found.new_zeros(len(found), labels.numel()).index_copy(1, counted, found)
    return values.view(len(found), *labels.t().shape).transpose(1, 2)


def _output_weight(model: Any) -> Tensor:
    tied = model.share_embeddings_and_output_weights
    return model.shared_embedding_or_output_weight() if tied else model.output_layer.weight


def _head(weight: Tensor, model: Any, scale: Callable[[Tensor], Tensor]) -> Head:
    """`weight` without the rows that pad the vocabulary, which is that of `model`."""
    return Head(weight[: model.true_vocab_size - parallel.tp_group().rank() * weight.size(0)], scale)


def _whole(states: Tensor, output_layer: Any) -> Tensor:
    """[s, b, hidden] on every tensor parallel rank; backward, the ranks' gradients are added up."""
    from megatron.core.tensor_parallel import mappings

    group = parallel.tp_group()
    if output_layer.sequence_parallel:
        return cast("Tensor", mappings.gather_from_sequence_parallel_region(states, group=group))
    return cast("Tensor", mappings.copy_to_tensor_model_parallel_region(states, group=group))
