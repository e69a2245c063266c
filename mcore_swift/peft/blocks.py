"""What adapters that hang on a layer's halves, or on whole layers, have in common: places, names, marks, checkpoints.

Their inputs are hidden states [s / tp or s, b, h], of which each tensor parallel rank has its part of the sequence
(sequence parallelism) or all of it. Their tensors are small and on every tensor parallel rank: with sequence
parallelism Megatron adds up the ranks' parts of the gradients at the end of a step, without it they are equal.
"""

from __future__ import annotations

import fnmatch
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mcore_swift.errors import InputError, nearest
from mcore_swift.peft.adapters import Adapters, AdapterTensor, make_first_activation_differentiable
from mcore_swift.peft.peft_config import DEFAULT
from mcore_swift.weights.rules import TensorRule

HALVES = {"attention": "self_attention", "mlp": "mlp"}  # words of recipes → GPTModel's names


class BlockAdapter(nn.Module):
    """An adapter of the module that Hugging Face calls `name`. `enabled`: whether it changes the module's output."""

    def __init__(self, name: str, config: Any) -> None:
        super().__init__()
        self.name, self.config, self.enabled = name, config, True

    def enable(self, enabled: bool) -> None:
        self.enabled = enabled

    def parameter(self, values: Tensor, device: torch.device) -> nn.Parameter:
        """A parameter that starts with `values`, in the model's dtype, with the mark that its gradient's sum needs."""
        found = nn.Parameter(values.to(device=device, dtype=self.config.params_dtype).contiguous())
        if self.config.sequence_parallel:
            found.sequence_parallel = True  # type: ignore[attr-defined]
        return found

    def generator(self, seed: int) -> torch.Generator:
        """Random numbers that depend on the seed and the module's name alone, not on the layout."""
        return torch.Generator().manual_seed(zlib.crc32(f"{seed} {self.name}".encode()))

    def exported(self) -> dict[str, Tensor]:
        """What a folder holds of it: kind → tensor. A checkpoint holds the parameters themselves."""
        return {kind: parameter.detach() for kind, parameter in self.named_parameters()}

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `exported`."""
        for kind, parameter in self.named_parameters():
            parameter.copy_(tensors[kind])


class BlockAdapters(Adapters):
    """Those of one model chunk."""

    def __init__(self, branches: Sequence[BlockAdapter]) -> None:
        super().__init__()
        self.names.append(DEFAULT)
        self.branches.extend(branches)

    def tensors(self) -> Iterator[AdapterTensor]:
        for branch in self.branches:
            for kind, parameter in branch.named_parameters():
                yield AdapterTensor(DEFAULT, f"{branch.name}.{kind}", parameter, None, 1, 0, expert=False)

    def merged(self) -> dict[int, Callable[[], Tensor]]:
        return {}  # no weight of the model could do what they do


def half_names(rules: Mapping[str, TensorRule]) -> dict[str, tuple[int, str]]:
    """Hugging Face's name of each decoder layer's halves → the layer's number and the word of `HALVES`, in model order.

    `model.layers.0.self_attn` is what the tensors of its output projection begin with.
    """
    found: dict[str, tuple[int, str]] = {}
    for key, rule in rules.items():
        parts = key.split(".")
        if parts[:2] != ["decoder", "layers"] or parts[-1] != "weight":
            continue
        number, inside = int(parts[2]), ".".join(parts[3:-1])
        if inside == "self_attention.linear_proj":
            found[rule.hf[0].rsplit(".", 2)[0]] = (number, "attention")
        elif inside in ("mlp.linear_fc2", "mlp.router"):
            found[rule.hf[0].rsplit(".", 2)[0]] = (number, "mlp")
    return dict(sorted(found.items(), key=lambda item: item[1]))


def select_halves(targets: Sequence[str], rules: Mapping[str, TensorRule]) -> dict[str, tuple[int, str]]:
    """Those of `half_names` that `targets` name: attention, mlp, a name's last word, or a glob on it.

    Raises InputError for a target that matches nothing.
    """
    names = half_names(rules)
    chosen: set[str] = set()
    for target in targets:
        found = {
            name
            for name, (_, half) in names.items()
            if target in (half, name.rsplit(".", 1)[-1]) or fnmatch.fnmatchcase(name, target)
        }
        if not found:
            words = [*HALVES, *dict.fromkeys(name.rsplit(".", 1)[-1] for name in names), *names]
            raise InputError(
                f"adapter.targets: {target!r} matches no layer's attention or feed-forward module;"
                f"{nearest(target, words)} allowed: attention, mlp, or a glob such as {words[-1]}"
            )
        chosen |= found
    return {name: place for name, place in names.items() if name in chosen}


def hang[Branch: BlockAdapter](
    chunks: Sequence[Any],
    make: Callable[[Any], Iterator[Branch]],
    together: Callable[[list[Branch]], BlockAdapters] = BlockAdapters,
) -> None:
    """Freezes the model and gives each chunk the adapters that `make` makes for one of its layers."""
    for chunk in chunks:
        chunk.requires_grad_(False)
        chunk.adapters = together([branch for layer in chunk.decoder.layers for branch in make(layer)])
        make_first_activation_differentiable(chunk)
