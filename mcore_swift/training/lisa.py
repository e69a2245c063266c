"""LISA (Pan et al. 2024, arXiv:2403.17919): a few decoder layers at a time are trained, drawn anew every k steps.

Embedding, final norm and output layer are trained always. As in the authors' code, the parameters of a layer that isn't
drawn have no gradient, so that AdamW passes them over: no weight decay, and its moments and its count of updates (which
the bias correction is made from) stay until the layer is drawn again.

What is drawn is a function of (seed, period), and how often a layer has been updated one of (seed, step): every rank
knows both at any layout, and a resumed run goes on as if it had never stopped.

Megatron holds gradients and optimizer states of all layers throughout. What is saved is the weight gradients' compute,
and the activations that are kept for them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch

from mcore_swift.training.optimizer_state import is_torch, main_parameters, members


@lru_cache(maxsize=2)
def draw(*, seed: int, period: int, num_layers: int, count: int) -> frozenset[int]:
    """The numbers of `count` of the layers, all choices being equally likely; always the same for (seed, period)."""

    def lot(layer: int) -> bytes:
        return hashlib.blake2b(f"lisa {seed} {period} {layer}".encode()).digest()

    return frozenset(sorted(range(num_layers), key=lot)[:count])


class LayerSampling:
    """Switches this rank's layers on and off; `begin` is called before each step."""

    def __init__(
        self, chunks: Sequence[Any], optimizer: Any, *, num_layers: int, count: int, interval: int, seed: int
    ) -> None:
        """`chunks` are wrapped in Megatron's DDP already, with all layers trainable. Layers count from 0."""
        self.num_layers, self.count, self.interval, self.seed = num_layers, count, interval, seed
        self.layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
        self.active: frozenset[int] = frozenset()
        self.updates = [0] * num_layers  # of each layer, in the steps before `step`
        self.step = -1
        layer_of = {id(p): layer.layer_number - 1 for layer in self.layers for p in layer.parameters()}
        for member in members(optimizer):
            mains = {id(main): layer_of[id(p)] for p, main, *_ in main_parameters(member) if id(p) in layer_of}
            member.optimizer.register_step_pre_hook(partial(self._prepare, mains))

    def begin(self, step: int) -> None:
        """Makes the layers that are drawn for `step`, counted from 0, the ones that are trained."""
        first = self.step if step == self.step + 1 else 0
        if first == 0:  # the run's first step, or the first one after it was resumed
            self.updates = [0] * self.num_layers
        for earlier in range(max(first, 0), step):
            for layer in self._drawn(earlier):
                self.updates[layer] += 1
        self.step, self.active = step, self._drawn(step)
        for layer in self.layers:
            layer.requires_grad_(layer.layer_number - 1 in self.active)

    def _drawn(self, step: int) -> frozenset[int]:
        return draw(seed=self.seed, period=step // self.interval, num_layers=self.num_layers, count=self.count)

    def _prepare(self, mains: dict[int, int], inner: torch.optim.Optimizer, *_: Any) -> None:
        """Just before the update. `mains`: id of a tensor that `inner` updates → its layer, for those of layers."""
        for group in inner.param_groups:
            for main in group["params"]:
                layer = mains.get(id(main))
                if layer is None:
                    continue
                if layer not in self.active:
                    main.grad = None
                if not is_torch(inner):  # Transformer Engine counts for each group, and a layer has groups of its own
                    group["step"] = self.updates[layer]
                elif "step" in inner.state.get(main, ()):
                    inner.state[main]["step"].fill_(self.updates[layer])


def layer_groups(chunks: Sequence[Any]) -> dict[Any, dict[str, int]]:
    """Megatron's overrides that give each decoder layer's parameters groups of their own in the optimizer."""
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

    numbers = {
        id(p): layer.layer_number for chunk in chunks for layer in chunk.decoder.layers for p in layer.parameters()
    }
    every = range(1, chunks[0].config.num_layers + 1)

    def inside(number: int) -> Any:
        return ParamPredicate(f"layer {number}", lambda parameter: numbers.get(id(parameter)) == number)

    return {ParamKey(predicate=inside(number)): {"decoder_layer": number} for number in every}
