"""QLoRA's frozen base: the weights of linear layers in four bits, whole only while their layer computes.

QLoRA (Dettmers et al. 2023, arXiv:2305.14314): 64 neighbours in a row share a scale, their largest magnitude, and each
is the nearest of 16 numbers times it. Double quantization holds the scales in 8 bits: what they differ by from their
mean, in blocks of 256. bitsandbytes has the numbers and the kernels.

Each rank quantizes its own shard, and still holds what bitsandbytes makes of the whole Hugging Face tensor, at every
layout. A block never crosses the end of a row, so the fusing of q, k and v and a cut between rows leave it alone. Where
a cut within the rows goes through a block, its scale is the larger of both sides'. For double quantization the ranks
put a tensor's scales together (a 64th of its numbers), quantize them in its own order, and keep their part.

A layer's forward call finds its whole weight in place. What autograd would keep of it for the backward pass is replaced
by this object (torch's hooks for saved tensors), which makes the weight whole again when it is asked for. That works
for any layer that hands its weight to autograd as a saved tensor: Megatron's own, and Transformer Engine's.
"""

from __future__ import annotations

import importlib
import logging
import math
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from mcore_swift import parallel
from mcore_swift.errors import InputError
from mcore_swift.models.lean import is_released, released
from mcore_swift.peft.quantized_rules import BLOCK
from mcore_swift.peft.sites import Part, Site, find_sites
from mcore_swift.weights.live import Write
from mcore_swift.weights.rules import TensorRule

SCALE_BLOCK = 256  # scales that share a scale of their own
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """`kind`: NF4, the quantiles of a normal distribution, or FP4, numbers of 1 sign, 2 exponent and 1 mantissa bit; or
    FP8 (`eight_bit`), whose layers take `gradients` in that type."""

    kind: Literal["nf4", "fp4", "fp8"]
    double: bool = True
    gradients: torch.dtype = torch.float8_e5m2

    def __str__(self) -> str:
        if self.kind == "fp8":
            return "fp8, twice (as it is and transposed)"
        return f"{self.kind}{', double quantization' if self.double else ''}"


@cache
def functional() -> Any:
    """bitsandbytes.functional. Raises InputError where it is not installed."""
    # On some CPUs its import looks for kernels that it then does without, and warns of it.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ModuleNotFoundError:
        raise InputError("quantization needs the package bitsandbytes; install mcore-swift[qlora]") from None


@dataclass(frozen=True)
class _EightBitScales:
    """A Hugging Face tensor's scales, quantized again: `codes` are this rank's part, the rest is the whole tensor's."""

    codes: Tensor  # uint8 [rows of this rank, blocks of this rank in a row]
    table: Tensor  # float32 [256]: what the codes stand for
    scales: Tensor  # float32 [⌈blocks / 256⌉]
    offset: Tensor  # float32, the mean

    def values(self, shape: tuple[int, int], own: tuple[slice, slice]) -> Tensor:
        """float32, shaped like `codes`; `shape` is that of all the tensor's blocks, `own` this rank's part of it."""
        scales = self.scales[:, None].expand(-1, SCALE_BLOCK).flatten()[: shape[0] * shape[1]].view(shape)[own]
        return self.table[self.codes.int()] * scales + self.offset

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + self.offset.nbytes  # all share one table


class QuantizedWeight:
    """One layer's weight, quantized. `off`, `size`: ‖W − quantized W‖² and ‖W‖² of this rank's shard."""

    def __init__(self, site: Site, settings: Quantization, groups: tuple[Any, Any]) -> None:
        """`groups`: the ranks that share out the weight, and those that hold the same part of it."""
        self.site, self.settings, self.group = site, settings, groups[0]
        self.copies = dist.get_world_size(groups[1]) * (dist.get_world_size(groups[0]) if site.split == "none" else 1)
        self.shape, self.dtype = tuple(site.weight.shape), site.weight.dtype
        columns = self.shape[1]
        first = site.rank * columns if site.split == "columns" else 0  # this shard's first column in the whole weight
        self._left, self._first_block = first % BLOCK, first // BLOCK
        self._blocks = -(-(self._left + columns) // BLOCK)  # that a row of the shard touches
        self._cut = self._blocks * BLOCK != columns
        self._codes: Tensor | None = None
        self._scales: Tensor | list[_EightBitScales] = []
        self._last: weakref.ref[Tensor] | None = None
        self.off = self.size = 0.0

    @property
    def nbytes(self) -> int:
        assert self._codes is not None
        scales = [self._scales] if isinstance(self._scales, Tensor) else self._scales
        return self._codes.nbytes + sum(part.nbytes for part in scales)

    # --- in and out ---------------------------------------------------------------------------------------------------

    def fill(self, write: Write) -> None:
        """Takes what `write` puts into a tensor made for it. Collective over the ranks that share out the weight."""
        whole = torch.empty(self.shape, dtype=self.dtype, device=self.site.weight.device)
        try:
            write(whole)
        finally:  # even if it raised: the others are waiting
            self.store(whole)

    @torch.no_grad()
    def store(self, whole: Tensor) -> None:
        """Quantizes this rank's shard [rows / tp, columns / tp]. Collective as `fill`."""
        edges = self._on_block_edges(whole)
        scales = torch.linalg.vector_norm(edges.view(len(whole), -1, BLOCK), torch.inf, dim=-1).float()
        double = []
        for part in self.site.parts if self._cut or self.settings.double else ():
            every = self._of_all_ranks(part, scales)
            if self._cut:  # a block's scale is that of both sides
                place = self.site.rows_of(part, scales)
                place.copy_(every[self._own(part)].view(place.shape))
            if self.settings.double:
                double.append(self._quantized_again(part, every))
        if self._cut:  # the kernel takes a block's scale from its largest number
            edges[:, : self._left] = scales[:, :1].to(self.dtype)
            edges[:, self._left + whole.size(1) :] = scales[:, -1:].to(self.dtype)
        self._codes, _ = functional().quantize_4bit(edges, blocksize=BLOCK, quant_type=self.settings.kind)
        self._scales = double if self.settings.double else scales
        self._last = None
        self.off = torch.linalg.vector_norm(self._dequantized().sub_(whole), dtype=torch.float32).item() ** 2
        self.size = torch.linalg.vector_norm(whole, dtype=torch.float32).item() ** 2

    def whole(self) -> Tensor:
        """The weight as it now is, [rows / tp, columns / tp]; not to be changed: one that is still alive is shared."""
        found = self._last() if self._last is not None else None
        if found is None:
            found = self._dequantized()
            self._last = weakref.ref(found)
        return found

    def _dequantized(self) -> Tensor:
        bitsandbytes = functional()
        shape = torch.Size((self.shape[0], self._blocks * BLOCK))
        state = bitsandbytes.QuantState(
            self._all_scales().flatten(),
            shape=shape,
            blocksize=BLOCK,
            quant_type=self.settings.kind,
            dtype=self.dtype,
        )
        edges = bitsandbytes.dequantize_4bit(self._codes, state)
        return edges[:, self._left : self._left + self.shape[1]].contiguous() if self._cut else edges

    # --- blocks and scales --------------------------------------------------------------------------------------------

    def _on_block_edges(self, whole: Tensor) -> Tensor:
        """The shard widened to whole blocks."""
        if not self._cut:
            return whole.contiguous()
        edges = whole.new_zeros(len(whole), self._blocks * BLOCK)
        edges[:, self._left : self._left + whole.size(1)] = whole
        return edges

    def _shape_of(self, part: Part) -> tuple[int, int]:
        """Rows of a Hugging Face tensor, and blocks in each."""
        return part.rows, self.site.in_features // BLOCK

    def _own(self, part: Part) -> tuple[slice, slice]:
        """This rank's part of them."""
        first = self.site.rank * part.local_rows if self.site.split == "rows" else 0
        return slice(first, first + part.local_rows), slice(self._first_block, self._first_block + self._blocks)

    def _of_all_ranks(self, part: Part, scales: Tensor) -> Tensor:
        """A Hugging Face tensor's scales, [rows, blocks], from the shards' [rows / tp, blocks / tp]."""
        own = self.site.rows_of(part, scales).reshape(part.local_rows, self._blocks)
        if self.site.split == "none":
            return own
        every = own.new_zeros(self._shape_of(part))
        every[self._own(part)] = own
        dist.all_reduce(every, op=dist.ReduceOp.MAX, group=self.group)
        return every

    def _quantized_again(self, part: Part, every: Tensor) -> _EightBitScales:
        flat = every.flatten()
        offset = flat.mean()
        codes, state = functional().quantize_blockwise(flat - offset, blocksize=SCALE_BLOCK)
        own = codes.view(every.shape)[self._own(part)].contiguous()
        return _EightBitScales(own, state.code, state.absmax, offset)

    def _all_scales(self) -> Tensor:
        """float32 [rows / tp, blocks], in the order of the layer's rows."""
        if isinstance(self._scales, Tensor):
            return self._scales
        first = self._scales[0]
        scales = torch.empty(self.shape[0], self._blocks, dtype=torch.float32, device=first.codes.device)
        for part, found in zip(self.site.parts, self._scales, strict=True):
            place = self.site.rows_of(part, scales)
            place.copy_(found.values(self._shape_of(part), self._own(part)).view(place.shape))
        return scales

    # --- in the layer -------------------------------------------------------------------------------------------------

    def hang(self) -> None:
        """Puts itself in the place of the layer's weight."""
        module = self.site.module
        self.site.weight.requires_grad_(False)
        self.site.weight.data = released(self.site.weight)
        module.quantized_weight = self  # type: ignore[assignment]
        module.forward = partial(self._forward, module.forward)

    def _forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        weight, whole = self.site.weight, self.whole()
        nothing, weight.data = weight.data, whole
        try:
            with saved_tensors_hooks(partial(self._pack, whole.untyped_storage().data_ptr()), _unpack):
                return forward(*args, **kwargs)
        finally:
            weight.data = nothing

    def _pack(self, storage: int, tensor: Tensor) -> Tensor | _Saved:
        if tensor.untyped_storage().data_ptr() != storage:
            return tensor
        return _Saved(self, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


@dataclass(frozen=True)
class _Saved:
    """What autograd keeps of the weight, or of a view of it."""

    weight: QuantizedWeight
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def _unpack(saved: Tensor | _Saved) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    whole = saved.weight.whole()
    if (whole.size(), whole.stride()) == (saved.size, saved.stride):
        return whole  # itself, so that it is found again: Transformer Engine saves a weight twice
    return whole.as_strided(saved.size, saved.stride, saved.offset)


# --- all of a model ---------------------------------------------------------------------------------------------------


class QuantizedBase:
    """The quantized weights of this rank's chunks."""

    def __init__(self, chunks: Sequence[Any], rules: Mapping[str, TensorRule], settings: Quantization) -> None:
        """Freezes the decoder layers' linear weights and quantizes them, each freed when it is done. On all ranks.

        Those that were never kept (`models.lean`) are to be given to `fill`, in model order. Raises InputError, on all
        ranks, for a model that can't be held so.
        """
        from mcore_swift.peft.eight_bit import EightBitWeight

        kind = EightBitWeight if settings.kind == "fp8" else QuantizedWeight
        sites = [site for chunk in chunks for site in find_sites(chunk, rules)]
        parallel.raise_together(_problem(sites, rules))
        self.settings, self.device = settings, next(chunks[0].parameters()).device
        self.weights: dict[int, QuantizedWeight] = {}  # by id of the parameter
        for site in sites:
            groups = parallel.expert_weight_groups() if site.expert else parallel.weight_groups()
            weight = self.weights[id(site.weight)] = kind(site, settings, groups)
            if not is_released(site.weight):
                weight.store(site.weight.data)
            weight.hang()
        for name, parameter in (named for chunk in chunks for named in chunk.named_parameters()):
            assert id(parameter) in self.weights or not is_released(parameter), f"{name} is released for nobody"

    def fill(self, parameter: Tensor, write: Write) -> None:
        """A `weights.live.Fill`."""
        if id(parameter) in self.weights:
            self.weights[id(parameter)].fill(write)
        else:
            write(parameter.data)

    def fill_randomly(self, *, std: float, seed: int) -> None:
        """Normal numbers, the same at every layout (of one kind of device): for benchmarks that load no weights."""
        for weight in self.weights.values():
            weight.fill(partial(_write_randomly, weight.site, std, seed))

    def described(self) -> str:
        """For the run's summary: bytes on this rank, and what quantizing changed. A collective call over the job."""
        weights = list(self.weights.values())
        sums = torch.tensor(
            [sum(w.off / w.copies for w in weights), sum(w.size / w.copies for w in weights)],
            dtype=torch.float64,
            device=self.device,
        )
        dist.all_reduce(sums)
        held, whole = sum(w.nbytes for w in weights), sum(w.site.weight.numel() * w.dtype.itemsize for w in weights)
        error = math.sqrt(sums[0] / sums[1])
        memory = f"{held / GIB:.2f} GiB on a rank instead of {whole / GIB:.2f}"
        return f"{self.settings}: {memory}, relative error {error:.2%}"


def _problem(sites: Sequence[Site], rules: Mapping[str, TensorRule]) -> InputError | None:
    """What a recipe's rules refuse earlier (`quantized_rules`), for models that were built without a recipe."""
    packed = [rule.hf[0] for rule in rules.values() if rule.packed]
    if packed:
        return InputError(f"quantization: {packed[0]} holds all experts, and such experts are not quantized here yet")
    for site in sites:
        name = site.parts[0].name
        if hasattr(site.module, "num_gemms"):
            return InputError(f"quantization: {name} is one of grouped experts; set moe.grouped: false")
        if site.in_features % BLOCK:
            return InputError(f"quantization: {name} has {site.in_features} columns, which is no multiple of {BLOCK}")
    return None


def _write_randomly(site: Site, std: float, seed: int, shard: Tensor) -> None:
    for part in site.parts:
        generator = torch.Generator(shard.device).manual_seed(zlib.crc32(f"{seed} {part.name}".encode()))
        whole = torch.empty(part.rows, site.in_features, dtype=shard.dtype, device=shard.device)
        whole.normal_(0, std, generator=generator)
        if site.split != "none":
            whole = whole.chunk(site.size, dim=0 if site.split == "rows" else 1)[site.rank]
        place = site.rows_of(part, shard)
        place.copy_(whole.reshape(place.shape))


def values(chunks: Sequence[nn.Module]) -> dict[int, Callable[[], Tensor]]:
    """id of a quantized parameter → what gives its dequantized weight."""
    modules = (vars(module) for chunk in chunks for module in chunk.modules())
    weights: list[QuantizedWeight] = [found["quantized_weight"] for found in modules if "quantized_weight" in found]
    return {id(weight.site.weight): weight.whole for weight in weights}
