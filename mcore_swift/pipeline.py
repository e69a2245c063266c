"""Which layers lie on which pipeline stage, and what share of a step the pipeline stands idle.

A layout is a tuple of model chunks in the order a token meets them; chunk i is number i // pp of pipeline rank i % pp.
A chunk is a text in the letters of Megatron-Core's `pipeline_model_parallel_layout`: E the embedding, t a transformer
layer, m a multi-token prediction layer, L the output layer with the loss. "Ettt", "ttt", "ttmL" are three chunks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

GRAMMAR = (
    "E for the embedding, t for a layer, m for a multi-token prediction layer, L for the loss, | between chunks; "
    "t*3 and (tt|)*2 repeat"
)


@dataclass(frozen=True, kw_only=True)
class PipelineWish:
    """What a recipe says about stages; nothing: as even as can be."""

    layout: str | None = None
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    account_embedding: bool = False
    account_loss: bool = False

    @property
    def counts(self) -> bool:
        """Whether the first and the last stage are given by number."""
        return self.first_stage_layers is not None or self.last_stage_layers is not None

    @property
    def accounts(self) -> bool:
        return self.account_embedding or self.account_loss

    @property
    def empty(self) -> bool:
        return self.layout is None and not self.counts and not self.accounts


# --- reading ----------------------------------------------------------------------------------------------------------


def parse(layout: str) -> tuple[str, ...] | None:
    """The chunks of a layout written as GRAMMAR says; None for another text."""
    text, before = re.sub(r"[\s,]", "", layout), ""  # blanks and commas are for the eye
    while text != before:  # the innermost brackets first
        before = text
        text = re.sub(r"(?:\(([^()*]*)\)|([EtmL|]))\*(\d{1,3})", lambda m: (m[1] or m[2] or "") * int(m[3]), text)
    return tuple(text.split("|")) if re.fullmatch(r"[EtmL|]+", text) else None


def written(chunks: Sequence[str]) -> str:
    """A layout for a reader, runs shortened: "Et*20|t*20|t*20L"."""
    return "|".join(re.sub(r"(.)\1{2,}", lambda m: f"{m[1]}*{len(m[0])}", chunk) for chunk in chunks)


# --- choosing ---------------------------------------------------------------------------------------------------------


def layout_of(wish: PipelineWish, *, pp: int, vpp: int, layers: int, mtp: int, loss_cost: float) -> tuple[str, ...]:
    """The chunks of a model of `layers` layers and `mtp` multi-token prediction layers at pp × vpp.

    `loss_cost`: the time of the output layer and the loss in layers. A wish that fits the model is taken for granted
    (`models.layout_rules`). Multi-token prediction layers lie with the loss, which each of them has of its own.
    """
    if wish.layout is not None:
        return parse(wish.layout) or ()
    even, rest = divmod(layers, pp * vpp)
    if wish.empty and rest == 0:
        counts = [even] * (pp * vpp)
    else:
        loss = float(wish.account_loss) if wish.accounts or wish.counts else loss_cost
        counts = balanced(
            layers,
            pp=pp,
            vpp=vpp,
            embedding=float(wish.account_embedding),
            loss=loss + mtp * (1 + loss),
            least=0 if wish.accounts else 1,
            first=wish.first_stage_layers,
            last=wish.last_stage_layers,
        )
    chunks = ["t" * count for count in counts]
    chunks[0] = "E" + chunks[0]
    chunks[-1] += "m" * mtp + "L"
    return tuple(chunks)


def balanced(
    layers: int,
    *,
    pp: int,
    vpp: int,
    embedding: float,
    loss: float,
    least: int = 1,
    first: int | None = None,
    last: int | None = None,
) -> list[int]:
    """Layers of each chunk, so that the slowest chunk takes as little time as can be.

    `embedding` and `loss` are times in layers. `first` and `last` fix the layers of a whole pipeline rank; the other
    chunks have `least` layers or more. One layer after the other goes to the chunk with the least to do, which is
    optimal for layers of one size. Among equals: on the rank with the least to do, then on the latest stage, since the
    earliest keep the activations of most micro-batches and one of them the embedding.
    """
    fixed = {chunk: first // vpp for chunk in range(0, pp * vpp, pp) if first is not None}
    fixed |= {chunk: last // vpp for chunk in range(pp - 1, pp * vpp, pp) if last is not None}
    counts = [fixed.get(chunk, least) for chunk in range(pp * vpp)]
    extra = [0.0] * (pp * vpp)
    extra[0] += embedding
    extra[-1] += loss

    def load(chunk: int) -> tuple[float, float, int]:
        rank = range(chunk % pp, pp * vpp, pp)
        return counts[chunk] + extra[chunk], sum(counts[c] + extra[c] for c in rank), -chunk

    free = [chunk for chunk in range(pp * vpp) if chunk not in fixed]
    for _ in range(layers - sum(counts)):
        counts[min(free, key=load)] += 1
    return counts


# --- judging ----------------------------------------------------------------------------------------------------------


def bubble_fraction(*, pp: int, vpp: int, micro_batches: int) -> float:
    """The share of a step in which a stage waits because the pipeline fills and empties; all stages take the same time.

    Bubble over useful time is (p - 1) / (v · m) for m micro-batches and v chunks a stage (Narayanan et al. 2021,
    "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", section 2.2; v = 1 is 1F1B). This
    is bubble over both: (p - 1) / (v · m + p - 1).
    """
    return (pp - 1) / (vpp * micro_batches + pp - 1)


def imbalance(chunks: Sequence[str], *, pp: int, loss_cost: float) -> float:
    """The share of a step in which the mean stage waits for the slowest one. Costs as in `layout_of`."""
    cost = {"E": 0.0, "t": 1.0, "m": 1.0 + loss_cost, "L": loss_cost}
    stages = [sum(cost[letter] for chunk in chunks[rank::pp] for letter in chunk) for rank in range(pp)]
    return 1 - sum(stages) / len(stages) / max(stages)
