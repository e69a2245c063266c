"""The batch that data hands to training: one micro-batch, the same on every rank of a model-parallel group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Sequences:
    """The answers of a micro-batch that an objective scores one by one: n of them, n may be 0.

    index: int64 [b, s], the number of the answer that a position's label belongs to, −1 where no label counts (a
    prompt's, padding's). A context parallel rank's part has s / cp positions and the numbers of the whole. Where whole
    texts are scored, the one position of each answer whose score counts.
    Pairs: answer 2i is the preferred one of pair i, answer 2i + 1 the other.
    desirable: bool [n], for answers that are judged one by one; None for pairs.
    probe: bool [n], answers to other rows' prompts, which only serve to estimate a divergence; None: there are none.
    margin: float32 [n / 2], by how much the preferred answer is better; None: unknown.
    weight: float32 [n], an answer's weight in the loss; None: 1.
    row: int64 [n], the answer's row in its data set, to name it in messages (the loader's `row_name`).
    ref_logps: float32 [n], Σ log p of the answer's labels under the reference, computed beforehand; None: it wasn't.
    partners: float32 [n], what sorted losses compare a pair with (`training.matching`); None: nothing is sorted.
    """

    index: torch.Tensor
    row: torch.Tensor
    desirable: torch.Tensor | None = None
    probe: torch.Tensor | None = None
    margin: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    ref_logps: torch.Tensor | None = None
    partners: torch.Tensor | None = None

    @property
    def n(self) -> int:
        return len(self.row)

    def to(self, device: torch.device) -> Sequences:
        moved = {k: None if v is None else v.to(device, non_blocking=True) for k, v in vars(self).items()}
        return Sequences(**moved)  # type: ignore[arg-type]


@dataclass(frozen=True)
class SharedPrompts:
    """Which positions of packed documents are computed (`data.shared_prompts`), all int64.

    rows: [whole], the computed position that each one of the whole documents is. positions: [s], where in the whole the
    computed ones are. second: [m], positions of the whole whose computed one stands at another place, and second_rows:
    [m], which that is; no number comes twice in either.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    second: torch.Tensor
    second_rows: torch.Tensor

    def to(self, device: torch.device) -> SharedPrompts:
        return SharedPrompts(**{name: values.to(device, non_blocking=True) for name, values in vars(self).items()})


@dataclass(frozen=True)
class MicroBatch:
    """Tokens already shifted: `labels[b, s]` is the token that follows `tokens[b, s]`.

    tokens, labels, position_ids: int64 [b, s]; loss_mask: float32 [b, s], 1 where the label counts, or its weight.
    Packed: b == 1, `cu_seqlens` int32 [n + 1] starts at 0 and ends at s (tail padding is a segment of its own, with
    loss_mask 0), `max_seqlen` is the longest segment. Unpacked: both None, rows are padded on the right.
    Where the loss mask is 0 the label is 0 (a valid index).

    `real`: bool [b, s], false for padding, which experts' loads don't count; None: there is no padding.
    `adapter`: int64 [b, s], the number of the adapter that each position passes; None: all pass the active one.
    `sequences`: for objectives that compare answers; None for those that only count labels.
    `chosen`: bool [b, s], positions that an adapter asked for; None: none has. Set on the part that a rank computes.
    `compare`: what takes the place of the labels' log-probabilities on the last pipeline stage, an output processor of
    Megatron's GPTModel; None: nothing does. Set on that part, too.
    `output_rows`: int64 [n], the positions, of all s · b as in [s, b], that pass the output layer; None: all. Set on
    that part, too.
    `shared`: prompts are computed once; the micro-batch has the computed positions, and the `cu_seqlens` of the whole.
    Set on that part, too.
    `weighted`: labels may have other weights than 1. All micro-batches of a data set say the same.

    A context parallel rank's part (`context_split.part_of`) has s / cp positions, and the `cu_seqlens` of the whole.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor | None = None
    max_seqlen: int | None = None
    real: torch.Tensor | None = None
    sequences: Sequences | None = None
    chosen: torch.Tensor | None = None
    adapter: torch.Tensor | None = None
    compare: Callable[..., torch.Tensor] | None = None
    output_rows: torch.Tensor | None = None
    shared: SharedPrompts | None = None
    weighted: bool = False

    def at(self, positions: torch.Tensor) -> MicroBatch:
        """These positions of s, int64 [n], of what is known of each position. All else stays that of the whole."""

        def chosen(values: torch.Tensor) -> torch.Tensor:
            return values.index_select(1, positions)

        sequences = self.sequences
        return replace(
            self,
            tokens=chosen(self.tokens),
            labels=chosen(self.labels),
            loss_mask=chosen(self.loss_mask),
            position_ids=chosen(self.position_ids),
            real=None if self.real is None else chosen(self.real),
            adapter=None if self.adapter is None else chosen(self.adapter),
            sequences=None if sequences is None else replace(sequences, index=chosen(sequences.index)),
        )

    def to(self, device: torch.device) -> MicroBatch:
        def move(t: torch.Tensor | None) -> torch.Tensor | None:
            return None if t is None else t.to(device, non_blocking=True)

        return MicroBatch(
            tokens=self.tokens.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            loss_mask=self.loss_mask.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            cu_seqlens=move(self.cu_seqlens),
            max_seqlen=self.max_seqlen,
            real=move(self.real),
            sequences=None if self.sequences is None else self.sequences.to(device),
            chosen=move(self.chosen),
            adapter=move(self.adapter),
            compare=self.compare,
            output_rows=move(self.output_rows),
            shared=None if self.shared is None else self.shared.to(device),
            weighted=self.weighted,
        )
