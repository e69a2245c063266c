"""Log-probabilities only where a label counts: the other positions don't pass the output layer.

Of chat data most positions are prompts and padding, and whatever their log-probabilities are, a loss mask of 0 drops
them: so they need no logits, and no gradient. Which they are is known on the host before a batch goes to its device, so
nothing waits for a GPU. Layers of multi-token prediction and scores keep every position.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from mcore_swift import parallel
from mcore_swift.data.batch import MicroBatch

if TYPE_CHECKING:
    from torch import Tensor

NEARLY_ALL = 0.9  # of the positions: from here on, gathering some of them isn't worth it
MULTIPLE = 16  # of a rank's rows: kernels are compiled for it, and FP8 matrix products want it


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
    rows: Tensor,
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor,
    compute_language_model_loss: Callable[[Tensor, Tensor], Tensor],
    scale_logits: Callable[[Tensor], Tensor],
    **_: Any,
) -> Tensor:
    """GPTModel's output processor: −log p of the labels at `rows`, elsewhere 0; float32 [b, s].

    hidden_states: [s, b, hidden], this rank's part of s under sequence parallelism; labels: int64 [b, s].
    """
    states = _selected(hidden_states, rows, output_layer)
    logits, _ = output_layer(states, weight=output_weight)
    own = labels.t().flatten().index_select(0, rows)
    nll = compute_language_model_loss(own[None], scale_logits(logits))[0]
    whole = nll.new_zeros(labels.numel()).index_copy(0, rows, nll)
    return whole.view(labels.t().shape).t().contiguous()


def _selected(states: Tensor, rows: Tensor, output_layer: Any) -> Tensor:
    """[n, 1, hidden]; under sequence parallelism this rank's part of n, for the layer gathers its input by itself."""
    from megatron.core.tensor_parallel import mappings

    if not output_layer.sequence_parallel:
        return states.flatten(0, 1).index_select(0, rows).unsqueeze(1)
    group = parallel.tp_group()
    # Backward, every rank has the whole gradient of the selected rows already.
    whole: Any = mappings.gather_from_sequence_parallel_region(states, tensor_parallel_output_grad=False, group=group)
    selected = whole.flatten(0, 1).index_select(0, rows).unsqueeze(1)
    return cast("Tensor", mappings.scatter_to_sequence_parallel_region(selected, group=group))
