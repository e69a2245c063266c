"""Log-probabilities only where a label counts, of some positions at a time: the others don't pass the output layer.

Of chat data most positions are prompts and padding, and whatever their log-probabilities are, a loss mask of 0 drops
them: so they need no logits, and no gradient. Which they are is known on the host before a batch goes to its device, so
nothing waits for a GPU. Layers of multi-token prediction and scores keep every position.

Logits are the largest tensor of a long sequence: at 65,536 positions of a vocabulary of 151,936 they take 20 GB.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.checkpoint import checkpoint

from mcore_swift import parallel
from mcore_swift.data.batch import MicroBatch
from mcore_swift.recipe_checks.levers import MULTIPLE

if TYPE_CHECKING:
    from torch import Tensor

NEARLY_ALL = 0.9  # of the positions: from here on, gathering some of them isn't worth it


def output_rows(batch: MicroBatch) -> Tensor | None:
    """The positions whose log-probabilities are needed, rising, of all s · b: int64 [n]; None: nearly all are.

    `batch`: this rank's part, on the host. Others fill them up to a multiple of MULTIPLE rows a tensor parallel rank:
    sequence parallelism shares them out evenly, and where no label counts the layer still runs, and its collectives.
    """
    needed = batch.loss_mask != 0
    if batch.sequences is not None:  # an answer's likelihood has all its labels, those of weight 0, too
        needed = needed | (batch.sequences.index >= 0)
    needed = needed.t().flatten()  # hidden states are [s, b]
    multiple = MULTIPLE * parallel.ranks().tp_size
    count = max(math.ceil(int(needed.sum()) / multiple), 1) * multiple
    if count >= NEARLY_ALL * len(needed):
        return None
    return needed.int().argsort(descending=True, stable=True)[:count].sort().values


def logps_at(
    rows: Tensor | None,
    chunk: int,
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor,
    compute_language_model_loss: Callable[[Tensor, Tensor], Tensor],
    scale_logits: Callable[[Tensor], Tensor],
    **_: Any,
) -> Tensor:
    """GPTModel's output processor: −log p of the labels at `rows` (None: everywhere), elsewhere 0; float32 [b, s].

    hidden_states: [s, b, hidden], this rank's part of s under sequence parallelism; labels: int64 [b, s]. With a
    `chunk` so many positions' logits exist at once, in the backward pass again; 0: all.
    """

    def nll_of(states: Tensor, own: Tensor) -> Tensor:
        logits, _ = output_layer(_part(states, output_layer).unsqueeze(1), weight=output_weight)
        return compute_language_model_loss(own[None], scale_logits(logits))[0]

    states, own = _whole(hidden_states, output_layer).flatten(0, 1), labels.t().flatten()
    if rows is not None:
        states, own = states.index_select(0, rows), own.index_select(0, rows)
    if chunk and len(own) > chunk:
        again: Any = partial(checkpoint, nll_of, use_reentrant=False, preserve_rng_state=False)
        nll = torch.cat([again(*part) for part in zip(states.split(chunk), own.split(chunk), strict=True)])
    else:
        nll = nll_of(states, own)
    whole = nll if rows is None else nll.new_zeros(labels.numel()).index_copy(0, rows, nll)
    return whole.view(labels.t().shape).t().contiguous()


def _whole(states: Tensor, output_layer: Any) -> Tensor:
    """[s, b, hidden]; under sequence parallelism on every rank."""
    from megatron.core.tensor_parallel import mappings

    if not output_layer.sequence_parallel:
        return states
    # Backward, every rank has the whole gradient of its positions already.
    whole: Any = mappings.gather_from_sequence_parallel_region(
        states, tensor_parallel_output_grad=False, group=parallel.tp_group()
    )
    return cast("Tensor", whole)


def _part(states: Tensor, output_layer: Any) -> Tensor:
    """[n, hidden]; under sequence parallelism this rank's part of n, for the layer gathers its input by itself."""
    from megatron.core.tensor_parallel import mappings

    if not output_layer.sequence_parallel:
        return states
    return cast("Tensor", mappings.scatter_to_sequence_parallel_region(states, group=parallel.tp_group()))
