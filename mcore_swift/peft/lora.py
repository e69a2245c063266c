"""LoRA and DoRA on one of Megatron's linear layers, as a forward hook beside it.

LoRA (Hu et al. 2021, arXiv:2106.09685): W + scaling · B A with A [rank, in], B [out, rank]; one pair for each Hugging
Face module that the layer is made of (q, k and v; gate and up). All A of a layer are one matrix product, all B another,
whose sum with the layer's output is taken inside it; nothing of the layer's size is kept for the backward pass but its
input. DoRA (Liu et al. 2024, arXiv:2402.09353): the rows of W + scaling · B A, normalized, times a trained magnitude;
the norm takes no gradient (its section 4.3).

Sharding. Where tensor parallel ranks share out the layer's rows (Megatron's column parallel), B is shared out with them
and A is on every rank; where they share out its columns, A is, and B is on every rank. What is on every rank is told
apart by what its gradient is there: the same (sequence parallelism off), or this rank's part of a sum that Megatron
takes at the end of the step (sequence parallelism), or that the backward pass itself must take (experts, whose outputs
are only summed when they are sent back).
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from torch import Tensor, nn

from mcore_swift.peft.frozen import bias_of
from mcore_swift.peft.peft_config import DEFAULT
from mcore_swift.peft.sites import Part, Site


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """`alpha`: scaling is alpha / rank, or alpha / √rank with `rslora` (Kalajdzievski 2023, arXiv:2312.03732).

    `share_a`: the modules that one layer is made of (q, k and v; gate and up) have one A together, and each its own B.
    `share_experts_a`: so have those of experts, whatever the others do, which is how PEFT adapts them.
    `modules_to_save`: modules that are trained in full beside the adapters, by last names or globs.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    pissa: bool = False
    share_a: bool = False
    share_experts_a: bool = False
    modules_to_save: tuple[str, ...] = ()
    seed: int = 0

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class _SummedGradient(torch.autograd.Function):
    """A parameter that every rank holds, of which each rank has a part of the gradient."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class LoraBranch(nn.Module):
    """The adapters of one linear layer. Parameters are called by the last names of the modules that they adapt.

    lora_A: [rank, in], lora_B: [rows, rank], magnitude: [rows] (DoRA), each this rank's shard.
    """

    def __init__(
        self,
        site: Site,
        parts: list[Part],
        settings: LoraSettings,
        *,
        group: Any,
        sequence_parallel: bool,
        adapter: str = DEFAULT,
    ) -> None:
        """`parts`: those of the site that are adapted. `group`: the ranks that share out the layer.

        `adapter`: the name of the adapter that this is a part of.
        """
        super().__init__()
        self.adapter = adapter
        self.site, self.parts, self.settings, self.group = site, parts, settings, group
        self.sequence_parallel = sequence_parallel and not site.expert
        self.enabled = True
        self.share_a = settings.share_a or (site.expert and settings.share_experts_a)
        weight = site.weight
        self.lora_A, self.lora_B, self.magnitude = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        self.start: dict[str, tuple[Tensor, Tensor]] = {}  # PiSSA: the A and B that were taken out of W
        for part in parts:
            if not (self.share_a and self.lora_A):
                a = self._parameter(self._first_a(part), split=1 if site.split == "columns" else None)
                self.lora_A[part.leaf] = a
            zeros = weight.new_zeros(part.local_rows, settings.rank)
            self.lora_B[part.leaf] = self._parameter(zeros, split=0 if site.split == "rows" else None)
        if settings.pissa:
            self._take_principal_part()
        if settings.dora:
            norms = self._row_norms()
            for part in parts:
                rows = site.rows_of(part, norms).reshape(-1)
                self.magnitude[part.leaf] = self._parameter(rows, split=0 if site.split == "rows" else None)
        self.enable(True)

    # --- forward ------------------------------------------------------------------------------------------------------

    @property
    def acts(self) -> bool:
        """Whether the layer's output is changed: where PiSSA has changed the weights, even without the adapter."""
        return self.enabled or bool(self.start)

    def enable(self, enabled: bool) -> None:
        self.enabled = enabled
        if hasattr(self.site.module, "layer_norm_weight"):  # Transformer Engine's fused norm: A wants what comes out
            self.site.module.return_layernorm_output = self.acts  # type: ignore[assignment]

    def adapted(self, inputs: Tensor, out: Tensor, positions: Tensor | None = None) -> Tensor:
        """inputs [..., in / tp], out [..., rows / tp] of the layer → out with the adapters' part.

        `positions`: bool [s, b, 1], the positions of the whole sequence that pass this adapter; None: all do. The
        others are computed and multiplied by 0: ranks exchange the same whatever a batch holds, and every gradient is
        there.
        """
        if positions is not None and positions.size(0) != out.size(0):  # this rank's part (sequence parallelism)
            positions = positions.chunk(dist.get_world_size(self.group))[dist.get_rank(self.group)]
        low = nn.functional.linear(self._dropped(inputs), self.all_a())
        if self.site.split != "none" and not self.site.expert:
            low = self._exchanged(low)
        if not self.settings.dora:
            if positions is not None:
                low = low * positions
            flat = torch.addmm(out.flatten(0, -2), low.flatten(0, -2), self.all_b().t(), alpha=self.settings.scaling)
            return flat.view(out.shape)
        scale, own_bias = self._dora_scale(), self._own_bias()
        bare = out if own_bias is None else out - own_bias
        added = nn.functional.linear(low, self.all_b()) * self.settings.scaling
        result = scale * (bare + added)
        result = result if own_bias is None else result + own_bias
        return result if positions is None else torch.where(positions, result, out)

    def _dropped(self, inputs: Tensor) -> Tensor:
        if not (self.training and self.enabled and self.settings.dropout):
            return inputs
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        if self.site.split == "columns" or self.sequence_parallel or self.site.expert:  # each rank has its own part
            with cast(Any, get_cuda_rng_tracker()).fork():
                return nn.functional.dropout(inputs, self.settings.dropout)
        return nn.functional.dropout(inputs, self.settings.dropout)

    def _exchanged(self, low: Tensor) -> Tensor:
        if self.site.split == "rows":
            if self.sequence_parallel:
                return mappings.gather_from_sequence_parallel_region(low, group=self.group)  # type: ignore[return-value]
            return mappings.copy_to_tensor_model_parallel_region(low, group=self.group)  # type: ignore[return-value]
        if self.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel_region(low, group=self.group)  # type: ignore[return-value]
        return mappings.reduce_from_tensor_model_parallel_region(low, group=self.group)  # type: ignore[return-value]

    def _shared(self, parameter: Tensor) -> Tensor:
        """An expert's parameter that all of its ranks hold."""
        if self.site.expert and self.site.split != "none":
            return _SummedGradient.apply(parameter, self.group)  # type: ignore[return-value]
        return parameter

    def all_a(self) -> Tensor:
        """[parts · rank, in / tp]; [rank, in / tp] if it is shared."""
        every = torch.cat(list(self.lora_A.values())) if len(self.lora_A) > 1 else self.lora_A[self.parts[0].leaf]
        return every if self.site.split == "columns" else self._shared(every)

    def a_of(self, part: Part) -> nn.Parameter:
        return self.lora_A[self.parts[0].leaf if self.share_a else part.leaf]

    def all_b(self) -> Tensor:
        """[rows / tp, parts · rank]: each row has the B of its own module, in its module's columns, and 0 elsewhere.

        Where A is shared, [rows / tp, rank]: all have the same columns.
        """
        if len(self.site.parts) == 1:
            b = self.lora_B[self.parts[0].leaf]
        else:
            b = self.site.weight.new_zeros(self.site.weight.size(0), self.settings.rank * len(self.lora_A))
            for part in self.parts:
                place = self.columns_of(part, b)
                place.copy_(self.lora_B[part.leaf].view(place.shape))
        return b if self.site.split == "rows" else self._shared(b)

    def shares(self, a: Tensor, b: Tensor) -> list[Tensor]:
        """The gradients of every A and every B, in the order that they are held, from those of `all_a` and `all_b`."""
        return [*a.split(self.settings.rank), *(self.columns_of(part, b) for part in self.parts)]

    def columns_of(self, part: Part, b: Tensor) -> Tensor:
        """A view of where the B of `part` is in one like `all_b`: [groups, rows / groups, rank]."""
        number = 0 if self.share_a else self.parts.index(part)
        return self.site.rows_of(part, b)[..., number * self.settings.rank : (number + 1) * self.settings.rank]

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The layer's weight with its adapters in it, float32: [rows / tp, in / tp]."""
        weight = self.site.values().float() + self.settings.scaling * (self.all_b().float() @ self.all_a().float())
        return weight * self._dora_scale().float()[:, None] if self.settings.dora else weight

    # --- DoRA ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        """Euclidean norms of the rows of W + scaling · B A: [rows / tp]."""
        delta = self.all_b() @ self.all_a() * self.settings.scaling
        squares = (self.site.values().float() + delta.float()).square().sum(1)
        if self.site.split == "columns":
            dist.all_reduce(squares, group=self.group)
        return squares.sqrt()

    def _dora_scale(self) -> Tensor:
        """magnitude / norm of each row; 1 for rows that are not adapted: [rows / tp]."""
        norms = self._row_norms()
        scale = torch.ones_like(norms)
        for part in self.parts:
            magnitude = self.magnitude[part.leaf]
            if self.site.split == "columns":
                magnitude = self._shared(magnitude)
            place = self.site.rows_of(part, scale)
            place.copy_(magnitude.view(place.shape) / self.site.rows_of(part, norms))
        return scale.to(self.site.weight.dtype)

    def _own_bias(self) -> Tensor | None:
        """The bias that the layer has added itself: DoRA scales W x alone."""
        return bias_of(self.site.module)[0]

    # --- the start ----------------------------------------------------------------------------------------------------

    def _parameter(self, value: Tensor, *, split: int | None) -> nn.Parameter:
        """`split`: the axis that tensor parallel ranks share out; None: every rank has it all."""
        parameter = nn.Parameter(value.to(self.site.weight.dtype).contiguous())
        marks: dict[str, Any] = {"allreduce": getattr(self.site.weight, "allreduce", True)}
        if split is not None:  # or its norm would be counted on the first rank only
            marks |= {"tensor_model_parallel": True, "partition_dim": split, "partition_stride": 1}
        elif self.sequence_parallel or getattr(self.site.weight, "sequence_parallel", False):
            marks |= {"sequence_parallel": True}  # Megatron adds its gradients up over tensor parallel ranks
        for name, mark in marks.items():
            setattr(parameter, name, mark)
        return parameter

    def _first_a(self, part: Part) -> Tensor:
        """A uniform A as torch's Linear starts with, the same at every layout: [rank, in / tp]."""
        named = "" if self.adapter == DEFAULT else f" {self.adapter}"
        seed = zlib.crc32(f"{self.settings.seed} {part.name}{named}".encode())
        bound = 1 / math.sqrt(self.site.in_features)
        a = torch.empty(self.settings.rank, self.site.in_features)
        a.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
        own = a.chunk(self.site.size, dim=1)[self.site.rank] if self.site.split == "columns" else a
        return own.to(self.site.weight.device)

    @torch.no_grad()
    def _take_principal_part(self) -> None:
        """PiSSA (Meng et al. 2024, arXiv:2404.02948): the first `rank` singular values move from W into B A."""
        site, rank = self.site, self.settings.rank
        for part in self.parts:
            rows = site.rows_of(part, site.weight.data)
            whole = self._whole(rows.reshape(-1, rows.size(-1)).float())
            u, s, v = torch.linalg.svd(whole, full_matrices=False)
            root = (s[:rank] / self.settings.scaling).sqrt()
            a, b = root[:, None] * v[:rank], u[:, :rank] * root
            if site.split == "columns":
                a = a.chunk(site.size, dim=1)[site.rank]
            if site.split == "rows":
                b = b.chunk(site.size)[site.rank]
            self.lora_A[part.leaf].data.copy_(a)
            self.lora_B[part.leaf].data.copy_(b)
            self.start[part.leaf] = (self.lora_A[part.leaf].detach().clone(), self.lora_B[part.leaf].detach().clone())
            a, b = self.start[part.leaf]  # in the parameters' dtype: what is taken out is what is put in
            rows -= (self.settings.scaling * b.float() @ a.float()).view(rows.shape).to(rows.dtype)

    def _whole(self, shard: Tensor) -> Tensor:
        """One module's weight from all ranks' shards."""
        if self.site.split == "none":
            return shard
        shards = [torch.empty_like(shard) for _ in range(self.site.size)]
        dist.all_gather(shards, shard.contiguous(), group=self.group)
        return torch.cat(shards, dim=0 if self.site.split == "rows" else 1)
