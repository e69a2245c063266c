"""Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751): two small layers behind each half of a layer.

    h ← h + U f(D h + d) + u        D [rank, hidden], U [hidden, rank]

h is what attention, or the feed-forward half, gives, before it is added to the residual. U and u start at 0, so that
the model starts as it is. In GPTModel's terms h is the half's output with the bias that it leaves to its caller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mcore_swift.errors import InputError
from mcore_swift.peft.blocks import HALVES, BlockAdapter, hang, select_halves
from mcore_swift.recipe import AdapterSection
from mcore_swift.weights.rules import TensorRule

ACTIVATIONS = {"gelu": nn.functional.gelu, "relu": nn.functional.relu, "silu": nn.functional.silu}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`rank`: the inner size. `activation`: f, a key of ACTIVATIONS; gelu is the exact one."""

    targets: tuple[str, ...]
    rank: int
    activation: str = "gelu"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.activation not in ACTIVATIONS:
            raise InputError(
                f"adapter: found rank {self.rank}, activation {self.activation}; allowed: rank at least 1,"
                f" activation {', '.join(ACTIVATIONS)}"
            )


class Bottleneck(BlockAdapter):
    def __init__(self, name: str, module: nn.Module, config: Any, settings: Settings) -> None:
        """`module`: the half of a layer that Hugging Face calls `name`; it gives (output, bias or None)."""
        super().__init__(name, config)
        size, rank = config.hidden_size, settings.rank
        device = next(module.parameters()).device
        down = torch.empty(rank, size).uniform_(-1, 1, generator=self.generator(settings.seed)) / math.sqrt(size)
        self.adapter_down = nn.Module()
        self.adapter_down.weight = self.parameter(down, device)
        self.adapter_down.bias = self.parameter(torch.zeros(rank), device)
        self.adapter_up = nn.Module()
        self.adapter_up.weight = self.parameter(torch.zeros(size, rank), device)
        self.adapter_up.bias = self.parameter(torch.zeros(size), device)
        self.activation = ACTIVATIONS[settings.activation]
        module.register_forward_hook(self._hook)

    def _hook(self, module: nn.Module, args: Any, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        if not self.enabled:
            return output
        hidden, bias = output
        return self.forward(hidden if bias is None else hidden + bias), None

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [s, b, h] → [s, b, h]."""
        down, up = self.adapter_down, self.adapter_up
        low = self.activation(nn.functional.linear(hidden, down.weight, down.bias))  # type: ignore[arg-type]
        return hidden + nn.functional.linear(low, up.weight, up.bias)  # type: ignore[arg-type]


def settings_of(section: AdapterSection, seed: int) -> Settings:
    return Settings(targets=tuple(section.targets), rank=section.rank, activation=section.activation, seed=seed)


def attach(chunks: Sequence[Any], rules: Mapping[str, TensorRule], settings: Settings) -> None:
    """Freezes the model and hangs adapters on the halves of layers that the settings' targets name.

    Called on all ranks, with the weights loaded and before Megatron's DDP wraps the chunks. Raises InputError for a
    target that matches nothing.
    """
    chosen = select_halves(settings.targets, rules)
    names = {place: name for name, place in chosen.items()}

    def make(layer: Any) -> Iterator[Bottleneck]:
        for half, attribute in HALVES.items():
            name = names.get((layer.layer_number - 1, half))
            if name is not None:
                yield Bottleneck(name, getattr(layer, attribute), layer.config, settings)

    hang(chunks, make)
