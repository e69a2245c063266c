"""All adapters of a model chunk: hung on its linear layers, and known to its checkpoints under Hugging Face names."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mcore_swift import parallel
from mcore_swift.errors import InputError
from mcore_swift.models.grouped_product import ends_of
from mcore_swift.peft import frozen, saved
from mcore_swift.peft.grouped import GroupedBranch, joined
from mcore_swift.peft.heads import join_heads
from mcore_swift.peft.lora import LoraBranch, LoraSettings
from mcore_swift.peft.peft_config import DEFAULT
from mcore_swift.peft.sites import Part, Site, find_sites
from mcore_swift.peft.targets import select
from mcore_swift.weights.live import ADAPTERS
from mcore_swift.weights.rules import TensorRule


@dataclass(frozen=True)
class AdapterTensor:
    """This rank's shard of one of an adapter's tensors. `name`: MODULE.lora_A.weight, as PEFT has it."""

    adapter: str  # its name
    name: str
    parameter: nn.Parameter
    split: int | None  # the axis that `size` ranks share out; this one is number `rank`
    size: int
    rank: int
    expert: bool
    start: torch.Tensor | None = None  # PiSSA: what the parameter started with
    index: int | None = None  # its place in a parameter that stacks the rank's experts'

    @property
    def place(self) -> tuple[int, int | None]:
        """The same for tensors that are one: modules that share an A."""
        return id(self.parameter), self.index

    def part_of(self, value: torch.Tensor) -> torch.Tensor:
        """This tensor's part of what stands for the parameter."""
        return value if self.index is None else value[self.index]

    @property
    def whole_size(self) -> int:
        """Elements of the whole tensor."""
        return self.part_of(self.parameter).numel() * (self.size if self.split is not None else 1)


class Adapters(nn.Module):
    """The adapters of one model chunk, each a set of branches beside its linear layers.

    One is active, or each position of a forward pass goes its own way (`route`). `names`: in the order that they were
    added, which is their numbers.
    `saved_rules`: the tensors of the whole model that are trained in full beside them, by global key; `saved`: those
    that this chunk has a part of.
    """

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList()
        self.names: list[str] = []
        self.active = DEFAULT
        self.saved_rules: Mapping[str, TensorRule] = {}
        self.saved: list[saved.SavedTensor] = []
        self.frozen: list[frozen.FrozenLinear] = []
        self._of_module: dict[int, list[LoraBranch | GroupedBranch]] = {}
        self._ends: tuple[Any, Any] = (None, None)  # a forward pass' tokens of each expert, and where they end
        self._positions: dict[str, torch.Tensor] = {}  # by adapter: bool [s, b, 1], where a forward pass is routed

    def add(self, name: str, branches: Sequence[LoraBranch | GroupedBranch]) -> None:
        """Hangs one more adapter on the layers; the first one is active."""
        self.active = self.active if self.names else name
        self.names.append(name)
        for branch in branches:
            self.branches.append(branch)
            beside = self._of_module.setdefault(id(branch.site.module), [])
            beside.append(branch)
            if len(beside) == 1:
                hook: Any = self._grouped_hook
                if isinstance(branch, LoraBranch):
                    hook = self._hook
                    if frozen.fits(branch):
                        layer = frozen.FrozenLinear(branch, single=partial(self._single, beside))
                        branch.site.module.forward = layer
                        self.frozen.append(layer)
                branch.site.module.register_forward_hook(partial(hook, beside))

    def _single(self, branches: Sequence[LoraBranch | GroupedBranch]) -> bool:
        return len(branches) == 1 and not self._positions and branches[0].adapter == self.active

    def _hook(
        self, branches: Sequence[LoraBranch], module: nn.Module, args: tuple[Any, ...], output: tuple[Any, Any]
    ) -> tuple[Any, Any]:
        if isinstance(module.forward, frozen.FrozenLinear) and module.forward.took:
            return output
        out, bias = output
        inputs = args[0]
        if isinstance(out, tuple):
            out, inputs = out
        for branch in branches:
            if branch.acts and (self._positions or branch.adapter == self.active):
                out = branch.adapted(inputs, out, self._positions.get(branch.adapter))
        return out, bias

    def _grouped_hook(
        self, branches: Sequence[GroupedBranch], module: nn.Module, args: tuple[Any, Any], output: tuple[Any, Any]
    ) -> tuple[Any, Any]:
        (inputs, splits), (out, bias) = args, output
        if self._ends[0] is not splits:  # the same list for fc1 and fc2
            self._ends = splits, ends_of(splits, inputs.device)
        for branch in branches:
            if branch.acts and branch.adapter == self.active:
                out = branch.adapted(inputs, out, self._ends[1])
        return out, bias

    def route(self, numbers: torch.Tensor | None) -> None:
        """What the next forward pass does: position by position the adapter of that number, or None: the active one.

        numbers: int64 [b, s] (the context parallel rank's part, whole over tensor parallel ranks). Raises InputError
        for adapters on experts, whose inputs are other ranks' tokens, sorted.
        """
        self._positions = {}
        if numbers is not None:
            branches: list[Any] = list(self.branches)
            if experts := [branch.parts[0].name for branch in branches if branch.site.expert]:
                raise InputError(f"adapters on experts ({experts[0]}) can't be mixed in one batch: switch between them")
            columns = numbers.t().unsqueeze(-1)
            self._positions = {name: columns == number for number, name in enumerate(self.names)}

    def grow(self, positions: torch.Tensor) -> None:
        """Says which positions the next forward pass is over: int64 [b, s], of documents that are being generated."""

    def tensors(self) -> Iterator[AdapterTensor]:
        branches: list[Any] = list(self.branches)
        for branch in branches:
            yield from _of_grouped(branch) if isinstance(branch, GroupedBranch) else _of_layer(branch)

    def merged(self) -> dict[int, Callable[[], torch.Tensor]]:
        """id of a layer's weight → what gives that weight with the active adapter in it."""
        found: dict[int, Callable[[], torch.Tensor]] = {}
        branches: list[Any] = [branch for branch in self.branches if branch.adapter == self.active]
        for branch in branches:
            grouped = isinstance(branch, GroupedBranch)
            found |= branch.merged_weights() if grouped else {id(branch.site.weight): branch.merged}
        return found

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Megatron's description of the shards, under global keys that don't depend on the layout."""
        parameters: dict[int, dict[int | None, AdapterTensor]] = {}
        for tensor in self.tensors():  # an A that several modules share is saved once
            parameters.setdefault(id(tensor.parameter), {}).setdefault(tensor.index, tensor)
        tensors = [list(by_index.values()) for by_index in parameters.values()]
        return {prefix + _key(own[0]): _sharded(own) for own in tensors}


def _key(tensor: AdapterTensor) -> str:
    return tensor.name if tensor.adapter == DEFAULT else f"{tensor.adapter}.{tensor.name}"


def _sharded(tensors: Sequence[AdapterTensor]) -> Any:
    """Megatron's description of one parameter: this tensor, or these slices of it."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    first = tensors[0]
    if first.index is None:
        return _shard(first, first.parameter)

    def build(key: str, data: torch.Tensor, *_: Any) -> list[Any]:
        return [_shard(tensor, tensor.part_of(data)) for tensor in tensors]

    return ShardedTensorFactory(ADAPTERS + _key(first), first.parameter, build, torch.stack)  # type: ignore[arg-type]


def _shard(tensor: AdapterTensor, data: torch.Tensor) -> Any:
    from megatron.core.dist_checkpointing import ShardedTensor

    group, replicas = parallel.expert_weight_groups() if tensor.expert else parallel.weight_groups()
    place = [(tensor.split, tensor.rank, tensor.size)] if tensor.split is not None and tensor.size > 1 else []
    replica = (0, 0 if place else dist.get_rank(group), dist.get_rank(replicas))
    return ShardedTensor.from_rank_offsets(ADAPTERS + _key(tensor), data, *place, replica_id=replica)


def _of_layer(branch: LoraBranch) -> Iterator[AdapterTensor]:
    site = branch.site
    for part in branch.parts:
        start = branch.start.get(part.leaf, (None, None, None))
        for (kind, split, parameter), first in zip(_of_part(branch, part, site), start, strict=False):
            name = f"{part.name}.{kind}"
            yield AdapterTensor(branch.adapter, name, parameter, split, site.size, site.rank, site.expert, first)


def _of_grouped(branch: GroupedBranch) -> Iterator[AdapterTensor]:
    for number, site, name, leaf in branch.modules_adapted():
        starts = branch.start.get(leaf, (None, None))
        columns, rows = (1 if site.split == "columns" else None), (0 if site.split == "rows" else None)
        found = (("lora_A", columns, branch.a_of(leaf)), ("lora_B", rows, branch.lora_B[leaf]))
        for (kind, split, parameter), start in zip(found, starts, strict=True):
            name_here, place = f"{name}.{kind}.weight", (site.size, site.rank)
            yield AdapterTensor(branch.adapter, name_here, parameter, split, *place, True, start, number)


def _of_part(branch: LoraBranch, part: Part, site: Site) -> Iterator[tuple[str, int | None, nn.Parameter]]:
    """PEFT's name, the axis that is shared out, and the parameter, of each tensor of one adapted module."""
    yield "lora_A.weight", 1 if site.split == "columns" else None, branch.a_of(part)
    rows, leaf = 0 if site.split == "rows" else None, part.leaf
    yield "lora_B.weight", rows, branch.lora_B[leaf]
    if leaf in branch.magnitude:
        yield "lora_magnitude_vector", rows, branch.magnitude[leaf]


def attach(
    chunks: Sequence[Any],
    rules: Mapping[str, TensorRule],
    targets: Sequence[str],
    settings: LoraSettings,
    *,
    adapter: str = DEFAULT,
) -> list[str]:
    """Freezes the model and hangs an adapter on what `targets` name; returns those modules' names.

    Called on all ranks, with the weights loaded and before Megatron's DDP wraps the chunks; once for each adapter.
    Raises InputError for a target or a module to save that matches nothing, a rank that is larger than a layer, and
    what can't be done beside another adapter.
    """
    beside: list[str] = chunks[0].adapters.names if hasattr(chunks[0], "adapters") else []
    _check_beside(adapter, settings, beside)
    names = select(targets, rules)
    in_full = saved.select_saved(settings.modules_to_save, rules, adapted=set(names))
    for chunk in chunks:
        if not beside:
            chunk.requires_grad_(False)
        branches: list[LoraBranch] = []
        for site in find_sites(chunk, rules):
            parts = [part for part in site.parts if part.name in set(names)]
            if not parts:
                continue
            _check_site(settings.rank, site)
            group = (parallel.expert_weight_groups() if site.expert else parallel.weight_groups())[0]
            sequence_parallel = chunk.config.sequence_parallel
            branches.append(
                LoraBranch(site, parts, settings, group=group, sequence_parallel=sequence_parallel, adapter=adapter)
            )
        if not beside:
            chunk.adapters = Adapters()
            chunk.adapters.saved_rules, chunk.adapters.saved = in_full, saved.train(chunk, in_full)
            make_first_activation_differentiable(chunk)
            join_heads(chunk)
            if next(chunk.parameters()).is_cuda:
                frozen.lighten_norms(chunk)
        chunk.adapters.add(adapter, _joined(branches))
        if not beside:
            frozen.join_gates(chunk)
    return names


def _joined(branches: Sequence[LoraBranch]) -> list[LoraBranch | GroupedBranch]:
    """`joined`, whose error is raised on all ranks: each sees its own experts only."""
    found: list[LoraBranch | GroupedBranch] = []
    error: InputError | None = None
    try:
        found = joined(branches)
    except InputError as problem:
        error = problem
    parallel.raise_together(error)
    return found


def _check_beside(adapter: str, settings: LoraSettings, others: Sequence[str]) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", adapter):
        raise InputError(f"adapter {adapter!r}: its name may have letters, digits, _ and - only (it names a folder)")
    if adapter in others:
        raise InputError(f"adapter {adapter!r}: there is one of that name already")
    for name, asked in (("init: pissa", settings.pissa), ("modules_to_save", settings.modules_to_save)):
        if asked and others:
            raise InputError(
                f"adapter {adapter!r}: {name} changes the model that {others[0]!r} stands on; only the first adapter of"
                " a model can have it"
            )


def activate(chunks: Sequence[Any], adapter: str) -> None:
    """Switches to the adapter of that name: it acts and is trained, the others rest. Raises InputError for no such."""
    for chunk in chunks:
        known: list[str] = chunk.adapters.names
        if adapter not in known:
            raise InputError(f"adapter {adapter!r}: there is none of that name; there are: {', '.join(known)}")
        chunk.adapters.active = adapter
        for tensor in chunk.adapters.tensors():
            tensor.parameter.requires_grad_(tensor.adapter == adapter)


def route(model: Any, numbers: torch.Tensor | None) -> None:
    """Says which adapter each position of the chunk's next forward pass takes (`Adapters.route`); wrapped or not."""
    for found in _adapters_of([model]):
        found.route(numbers)


def follow_route(model: Any, output: torch.Tensor, numbers: torch.Tensor | None) -> None:
    """Has the backward pass through `output`, which computes layers again, take the routes of its own forward pass,
    whatever passes a pipeline has put between the two."""
    if numbers is not None and output.requires_grad:
        output.register_hook(lambda gradient: route(model, numbers))


@contextlib.contextmanager
def disabled(models: Sequence[nn.Module]) -> Iterator[None]:
    """The base model, bit for bit, for as long as the context lasts; without gradients, and without adapters' dropout.

    Modules that are trained in full are what they were, too.
    `models`: this rank's chunks, wrapped or not. Not collective, but every rank of a pipeline has to do the same. After
    PiSSA, which has changed the weights, the adapters are what they started with: the base model but for rounding.
    """
    found = list(_adapters_of(models))
    assert found, "the model has no adapters"
    branches: list[Any] = [branch for adapters in found for branch in adapters.branches if branch.enabled]
    moved = [adapters for adapters in found if any(branch.start for branch in adapters.branches)]
    starts = [(t.parameter, t.start) for adapters in moved for t in adapters.tensors() if t.start is not None]
    starts += [(tensor.parameter, tensor.base) for adapters in found for tensor in adapters.saved]
    trained = [parameter.data for parameter, _ in starts]
    try:
        for branch in branches:
            branch.enable(False)
        for parameter, start in starts:
            parameter.data = start
        with torch.no_grad():
            yield
    finally:
        for branch in branches:
            branch.enable(True)
        for (parameter, _), data in zip(starts, trained, strict=True):
            parameter.data = data


class CollectAndFinalize:
    """Megatron's finalize_model_grads, for models with adapters: their layers' own sums of gradients come first."""

    def __init__(self, finalize: Callable[..., None]) -> None:
        self.finalize = finalize

    def __call__(self, models: Sequence[Any], *args: Any, **kwargs: Any) -> None:
        for layer in _frozen_layers(models):
            layer.collect()
        self.finalize(models, *args, **kwargs)


@contextlib.contextmanager
def steady(models: Sequence[Any]) -> Iterator[None]:
    """The adapters' parameters don't change as long as the context lasts: one run of a pipeline's schedule.

    Nothing, where the models' config doesn't end such a run with `CollectAndFinalize`, or gradients are reduced before.
    """
    config, ddp = getattr(models[0], "config", None), getattr(models[0], "ddp_config", None)
    ends = isinstance(getattr(config, "finalize_model_grads_func", None), CollectAndFinalize)
    layers = list(_frozen_layers(models)) if ends and not getattr(ddp, "overlap_grad_reduce", False) else []
    for layer in layers:
        layer.set_steady(True)
    frozen.gather([layer for layer in layers if layer.steady and layer.a is not None])
    try:
        yield
    finally:
        for layer in layers:
            layer.set_steady(False)


def _adapters_of(models: Sequence[Any]) -> Iterator[Adapters]:
    """Those of chunks, wrapped or not, that have any."""
    for model in models:
        while hasattr(model, "module"):
            model = model.module
        if isinstance(found := getattr(model, "adapters", None), Adapters):
            yield found


def _frozen_layers(models: Sequence[Any]) -> Iterator[frozen.FrozenLinear]:
    for found in _adapters_of(models):
        yield from found.frozen


def _check_site(rank: int, site: Site) -> None:
    for part in site.parts:
        if rank > min(part.rows, site.in_features):
            raise InputError(
                f"adapter.rank: {rank} is larger than {part.name}, which is [{part.rows}, {site.in_features}];"
                f" allowed: 1 to {min(part.rows, site.in_features)}"
            )


def make_first_activation_differentiable(chunk: Any) -> None:
    """A recomputed layer whose inputs need no gradient gets none, and neither would the adapters in it."""

    def needs_gradient(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.requires_grad_(torch.is_grad_enabled()) if output.is_leaf else output

    if getattr(chunk, "embedding", None) is not None and chunk.pre_process:
        chunk.embedding.register_forward_hook(needs_gradient)
