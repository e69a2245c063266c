"""LoReFT (Wu et al. 2024, arXiv:2404.03592): a layer's output is changed inside a small linear subspace.

    h ← h + Rᵀ (W h + b − R h)        R, W [rank, hidden], the rows of R orthonormal

at the first and the last tokens of each document, in a batch however it is packed. One R, W and b serve all positions
of a layer (the paper's tied weights).

R is kept orthonormal as the authors keep it, by optimizing what it is made from: Rᵀ is the first `rank` columns of a
product of Householder reflections I − τ v vᵀ, and column i of the parameter `reft_rotation` [hidden, rank] holds vector
i below its diagonal, where the vector is 1 (torch.linalg.householder_product). What is on and above the diagonal counts
for nothing. Flipping the signs of a row of R, W and b changes nothing, so every R is one of these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mcore_swift import parallel
from mcore_swift.data.batch import MicroBatch
from mcore_swift.errors import InputError
from mcore_swift.peft.blocks import BlockAdapter, BlockAdapters, half_names, hang
from mcore_swift.recipe import AdapterSection
from mcore_swift.weights.rules import TensorRule


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`layers`: numbers of the layers whose outputs are changed, from 0; None: all.

    `first_tokens`, `last_tokens`: of each document; where it is shorter than both, all of it.
    """

    layers: tuple[int, ...] | None
    rank: int
    first_tokens: int
    last_tokens: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or min(self.first_tokens, self.last_tokens) < 0 or self.first_tokens + self.last_tokens < 1:
            raise InputError(
                f"adapter: found rank {self.rank}, first_tokens {self.first_tokens}, last_tokens {self.last_tokens};"
                " allowed: rank at least 1, and at least 1 token at one of the ends"
            )


def orthonormal(rotation: Tensor) -> Tensor:
    """rotation [hidden, rank] → Rᵀ [hidden, rank], float32 at least."""
    vectors = rotation.to(torch.promote_types(rotation.dtype, torch.float32)).tril(-1)
    return torch.linalg.householder_product(vectors, 2 / (1 + vectors.square().sum(0)))


def rotation_of(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse, for R [rank, hidden]: the rotation, and the signs [rank] of R's rows that it gives the opposite of.

    Calculated in float64.
    """
    factors, _ = torch.geqrf(rows.double().T)
    return factors.tril(-1), factors.diagonal().sign()


class LoReFT(BlockAdapter):
    def __init__(self, name: str, layer: nn.Module, config: Any, settings: Settings) -> None:
        super().__init__(name, config)
        size, rank = config.hidden_size, settings.rank
        device = next(layer.parameters()).device
        generator = self.generator(settings.seed)
        rows = torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64)).Q.T
        bound = 1 / math.sqrt(size)  # as torch's Linear
        self.reft_rotation = self.parameter(rotation_of(rows)[0], device)
        self.reft_weight = self.parameter(torch.empty(rank, size).uniform_(-bound, bound, generator=generator), device)
        self.reft_bias = self.parameter(torch.empty(rank).uniform_(-bound, bound, generator=generator), device)
        self.chosen: Tensor | None = None  # places in [s · b] of this rank's hidden states, set for each micro-batch
        layer.register_forward_hook(self._hook)

    def _hook(self, layer: nn.Module, args: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        if not self.enabled:
            return output
        chosen, self.chosen = self.chosen, None  # of this micro-batch only: the next one's must be set anew
        assert chosen is not None, "the batch doesn't say which positions are changed"
        return self.forward(output[0], chosen), output[1]

    def forward(self, hidden: Tensor, chosen: Tensor) -> Tensor:
        """hidden [s, b, h], chosen int64 [n], places in [s · b] → [s, b, h]."""
        rows = orthonormal(self.reft_rotation)  # Rᵀ
        flat = hidden.flatten(0, 1)
        inputs = flat[chosen].to(rows.dtype)
        weight, bias = self.reft_weight.to(rows.dtype), self.reft_bias.to(rows.dtype)
        change = (nn.functional.linear(inputs, weight, bias) - inputs @ rows) @ rows.T
        return flat.index_add(0, chosen, change.to(flat.dtype)).view_as(hidden)

    def exported(self) -> dict[str, Tensor]:
        """R itself, W and b."""
        rows = orthonormal(self.reft_rotation.detach()).T.to(self.reft_rotation.dtype).contiguous()
        return {"reft_r": rows, "reft_weight": self.reft_weight.detach(), "reft_bias": self.reft_bias.detach()}

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> None:
        rows = tensors["reft_r"].double()
        # Rounded to bf16, rows of a few thousand numbers are still as near to orthonormal as this.
        if not torch.allclose(rows @ rows.T, torch.eye(len(rows), dtype=rows.dtype, device=rows.device), atol=1e-2):
            raise InputError(f"adapter.path: {self.name}.reft_r: its rows are not orthonormal")
        rotation, signs = rotation_of(rows)
        self.reft_rotation.copy_(rotation)
        self.reft_weight.copy_(tensors["reft_weight"] * signs[:, None])
        self.reft_bias.copy_(tensors["reft_bias"] * signs)


# --- positions --------------------------------------------------------------------------------------------------------


def choose(batch: MicroBatch, *, first: int, last: int) -> Tensor:
    """The first `first` and the last `last` tokens of each document of a whole micro-batch: bool [b, s]."""
    real = torch.ones_like(batch.tokens, dtype=torch.bool) if batch.real is None else batch.real
    segments = batch.cu_seqlens
    if segments is None:
        return torch.stack([_of_document(row, first, last) for row in real])
    parts = real[0].split(segments.diff().tolist())
    return torch.cat([_of_document(part, first, last) for part in parts])[None]


def _of_document(real: Tensor, first: int, last: int) -> Tensor:
    """real: bool [s], a document's tokens and then padding."""
    position, length = torch.arange(len(real), device=real.device), real.sum()
    return ((position < first) | (position >= length - last)) & real


class ReftAdapters(BlockAdapters):
    """Those of one model chunk, which are told of every micro-batch before its forward pass."""

    def __init__(self, branches: Sequence[LoReFT], settings: Settings) -> None:
        super().__init__(branches)
        self.settings = settings

    def wanted(self, batch: MicroBatch) -> Tensor:
        """The positions of a whole micro-batch that are changed: bool [b, s]."""
        return choose(batch, first=self.settings.first_tokens, last=self.settings.last_tokens)

    def grow(self, positions: Tensor) -> None:
        assert self.settings.last_tokens == 0, "a document that still grows has no last tokens"
        self.begin(positions < self.settings.first_tokens)

    def begin(self, chosen: Tensor) -> None:
        """`chosen`: bool [b, s], of the micro-batch that comes next (a context parallel rank's part of it)."""
        branches: list[Any] = list(self.branches)
        if not branches:
            return
        chosen = chosen.t()
        if branches[0].config.sequence_parallel:
            place = parallel.ranks()
            chosen = chosen.chunk(place.tp_size)[place.tp]
        places = chosen.flatten().nonzero()[:, 0]
        for branch in branches:
            branch.chosen = places


# --- from a recipe ----------------------------------------------------------------------------------------------------


def settings_of(section: AdapterSection, seed: int) -> Settings:
    return Settings(
        layers=None if section.layers is None else tuple(section.layers),
        rank=section.rank,
        first_tokens=section.first_tokens,
        last_tokens=section.last_tokens,
        seed=seed,
    )


def attach(chunks: Sequence[Any], rules: Mapping[str, TensorRule], settings: Settings) -> None:
    """Freezes the model and hangs LoReFT on the layers that the settings name.

    Called on all ranks, with the weights loaded and before Megatron's DDP wraps the chunks. Raises InputError for a
    layer that the model hasn't got, and a rank that is larger than the hidden size.
    """
    names = {number: name.rsplit(".", 1)[0] for name, (number, _) in half_names(rules).items()}
    size = chunks[0].config.hidden_size
    for number in settings.layers or ():
        if number not in names:
            raise InputError(f"adapter.layers: there is no layer {number}; allowed: 0 to {len(names) - 1}")
    if settings.rank > size:
        raise InputError(f"adapter.rank: {settings.rank} is larger than the hidden size; allowed: 1 to {size}")

    def make(layer: Any) -> Iterator[LoReFT]:
        number = layer.layer_number - 1
        if settings.layers is None or number in settings.layers:
            yield LoReFT(names[number], layer, layer.config, settings)

    hang(chunks, make, lambda branches: ReftAdapters(branches, settings))
