"""LoRA on grouped experts: one module that holds all of a rank's experts and multiplies their tokens in one call.

The branch beside it is two grouped products over the same tokens, sorted by expert: A of all experts, then B of all
experts. Where a layer is made of several modules (gate and up), their A lie in one product, and B is block-diagonal.
Each module has one parameter for all of the rank's experts: [experts, rank, in] and [experts, rows, rank]. Towards
checkpoints and folders each expert's slice is a tensor by itself, as if the experts were modules of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from mcore_swift.errors import InputError
from mcore_swift.models.grouped_product import ROW_BYTES, grouped_product, rows_fit
from mcore_swift.peft.lora import LoraBranch, _SummedGradient
from mcore_swift.peft.sites import Site

ALIGNMENT = 8  # numbers of two bytes are ROW_BYTES


def is_grouped(module: nn.Module) -> bool:
    """Whether it is a linear layer of several experts: Transformer Engine's, or the CPU's."""
    return hasattr(module, "num_gemms")


class GroupedBranch(nn.Module):
    """The adapters of a grouped linear layer. Parameters are called by the last names of the modules that they adapt.

    lora_A: [experts, rank, in], lora_B: [experts, rows, rank], each this rank's shard of its own experts'.
    """

    def __init__(self, experts: Sequence[LoraBranch]) -> None:
        """`experts`: what each expert's branch would be by itself, in the layer's order; it is not used any more.

        Raises InputError where not all experts are adapted alike, for DoRA, and for rows that grouped products refuse.
        """
        super().__init__()
        first = experts[0]
        _check(experts)
        self.adapter, self.settings, self.group = first.adapter, first.settings, first.group
        self.site, self.parts = first.site, first.parts
        self.experts = [(expert.site, list(expert.parts)) for expert in experts]
        self.enabled = True
        self.lora_A = nn.ParameterDict({leaf: _stacked([e.lora_A[leaf] for e in experts]) for leaf in first.lora_A})
        self.lora_B = nn.ParameterDict({leaf: _stacked([e.lora_B[leaf] for e in experts]) for leaf in first.lora_B})
        self.start = {
            leaf: (torch.stack([e.start[leaf][0] for e in experts]), torch.stack([e.start[leaf][1] for e in experts]))
            for leaf in first.start
        }

    @property
    def acts(self) -> bool:
        """Whether the layer's output is changed: where PiSSA has changed the weights, even without the adapter."""
        return self.enabled or bool(self.start)

    def enable(self, enabled: bool) -> None:
        self.enabled = enabled

    def adapted(self, inputs: Tensor, out: Tensor, ends: Tensor) -> Tensor:
        """inputs [tokens, in / etp], out [tokens, rows / etp] of the layer → out with the adapters' part.

        `ends`: as `ends_of` gives them.
        """
        low = grouped_product(self._dropped(inputs), self.all_a(), ends) * self.settings.scaling
        return out + grouped_product(low, self.all_b(), ends)

    def _dropped(self, inputs: Tensor) -> Tensor:
        if not (self.training and self.enabled and self.settings.dropout):
            return inputs
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        with cast(Any, get_cuda_rng_tracker()).fork():  # each rank has its own tokens
            return nn.functional.dropout(inputs, self.settings.dropout)

    # --- matrices -----------------------------------------------------------------------------------------------------

    @property
    def _width(self) -> int:
        """What all A of an expert give a token, padded."""
        return -(-len(self.lora_A) * self.settings.rank // ALIGNMENT) * ALIGNMENT

    def all_a(self) -> Tensor:
        """[experts, width, in / etp]"""
        every = list(self.lora_A.values())
        padding = self._width - len(every) * self.settings.rank
        if padding:
            every.append(every[0].new_zeros(every[0].size(0), padding, every[0].size(2)))
        a = torch.cat(every, dim=1) if len(every) > 1 else every[0]
        return a if self.site.split == "columns" else self._shared(a)

    def all_b(self) -> Tensor:
        """[experts, rows / etp, width]: each row has its own module's B, in that module's columns, and 0 elsewhere."""
        rank, rows = self.settings.rank, self.site.weight.size(0)
        if len(self.site.parts) == 1 and self._width == rank:
            b: Tensor = self.lora_B[self.parts[0].leaf]
        else:
            b = self.site.weight.new_zeros(len(self.experts), rows, self._width)
            for number, part in enumerate(self.parts):
                first = 0 if len(self.lora_A) == 1 else number * rank  # one A for all, or one module
                place = self.site.rows_of(part, b.transpose(0, 1))[..., first : first + rank]
                place.copy_(self.lora_B[part.leaf].transpose(0, 1).view(place.shape))
        return b if self.site.split == "rows" else self._shared(b)

    def _shared(self, parameter: Tensor) -> Tensor:
        """What all ranks of an expert hold, and each has a part of the gradient of."""
        if self.site.split == "none":
            return parameter
        return cast(Tensor, _SummedGradient.apply(parameter, self.group))

    # --- each expert by itself ----------------------------------------------------------------------------------------

    def modules_adapted(self) -> Iterator[tuple[int, Site, str, str]]:
        """(expert's number here, its site, module's name, its last word) of each adapted Hugging Face module."""
        for number, (site, parts) in enumerate(self.experts):
            yield from ((number, site, part.name, part.leaf) for part in parts)

    def a_of(self, leaf: str) -> nn.Parameter:
        return self.lora_A[leaf if leaf in self.lora_A else self.parts[0].leaf]

    def merged_weights(self) -> dict[int, Callable[[], Tensor]]:
        """id of an expert's weight → what gives that weight with its adapters in it."""
        return {id(site.weight): partial(self._merged, number) for number, (site, _) in enumerate(self.experts)}

    @torch.no_grad()
    def _merged(self, number: int) -> Tensor:
        """float32 [rows / etp, in / etp]"""
        change = self.all_b()[number].float() @ self.all_a()[number].float()
        return self.experts[number][0].values().float() + self.settings.scaling * change


def joined(branches: Sequence[LoraBranch]) -> list[LoraBranch | GroupedBranch]:
    """The branches, where those of one grouped layer's experts have become one. Raises as `GroupedBranch` does."""
    by_module: dict[int, list[LoraBranch]] = {}
    for branch in branches:
        by_module.setdefault(id(branch.site.module), []).append(branch)
    return [GroupedBranch(own) if is_grouped(own[0].site.module) else own[0] for own in by_module.values()]


def _check(experts: Sequence[LoraBranch]) -> None:
    first = experts[0]
    if first.settings.dora:
        raise InputError(
            f"adapter.dora: {first.parts[0].name} is one of grouped experts, which have no DoRA here; set moe.grouped:"
            " false, or leave the experts out"
        )
    weight = first.site.weight
    if not rows_fit(weight):
        raise InputError(
            f"adapter.targets: {first.parts[0].name}: a rank's part of this layer is {list(weight.shape)}, and grouped"
            f" products need rows of a multiple of {ROW_BYTES} bytes; set moe.grouped: false"
        )
    wanted = [part.leaf for part in first.parts]
    module: Any = first.site.module
    if len(experts) < module.num_gemms or any([p.leaf for p in e.parts] != wanted for e in experts):
        raise InputError(
            f"adapter.targets: {first.parts[0].name} is adapted, and not all of the layer's experts are alike, but they"
            " share one grouped matrix product; name all of a layer's, or set moe.grouped: false"
        )


def _stacked(parameters: Sequence[nn.Parameter]) -> nn.Parameter:
    """One parameter in place of the experts' own, with their marks for Megatron."""
    stacked = nn.Parameter(torch.stack([parameter.data for parameter in parameters]))
    for name, mark in vars(parameters[0]).items():
        setattr(stacked, name, mark + 1 if name == "partition_dim" else mark)
    return stacked
