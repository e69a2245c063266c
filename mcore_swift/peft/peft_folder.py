"""Adapters from and to PEFT's folders: adapter_config.json and adapter_model.safetensors, at any layout."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mcore_swift import parallel
from mcore_swift.errors import InputError, nearest
from mcore_swift.peft import fused
from mcore_swift.peft.adapters import AdapterTensor
from mcore_swift.peft.lora import LoraSettings
from mcore_swift.peft.peft_config import (
    CONFIG,
    DEFAULT,
    PREFIX,
    WEIGHTS,
    is_scored,
    listed,
    read_config,
    scaling_of,
    stack_names,
)
from mcore_swift.peft.saved import modules_of
from mcore_swift.peft.targets import linear_modules
from mcore_swift.weights import live
from mcore_swift.weights import safetensors_io as io
from mcore_swift.weights.hf_folder import published
from mcore_swift.weights.rules import TensorRule


def tensors_of(chunks: Sequence[Any], adapter: str = DEFAULT) -> list[AdapterTensor]:
    """This rank's part of the adapter of that name, in model order."""
    return [tensor for chunk in chunks for tensor in chunk.adapters.tensors() if tensor.adapter == adapter]


def whole_tensors(
    chunks: Sequence[Any],
    adapter: str = DEFAULT,
    *,
    value: Callable[[torch.Tensor], torch.Tensor] = lambda parameter: parameter.data,
    without: Collection[str] = (),
) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole tensors of an adapter, by PEFT's names without their prefix; each from one rank of the job, on the CPU.

    Those of modules that are trained in full come first. A collective call. `value` gives what stands for a parameter:
    its data, or its gradient. `without`: names that are left out.
    """
    if saved_rules(chunks, adapter):
        trained = {id(tensor.parameter) for chunk in chunks for tensor in chunk.adapters.saved}

        def saved(parameter: torch.Tensor) -> torch.Tensor | None:
            return value(parameter) if id(parameter) in trained else None

        rules, vocab_size = chunks[0].tensor_rules, chunks[0].true_vocab_size
        for name, tensor, _ in live.hf_tensors(chunks, rules, vocab_size=vocab_size, value=saved):
            yield name, tensor
    for number, tensor in enumerate(tensor for tensor in tensors_of(chunks, adapter) if tensor.name not in without):
        group, replicas = parallel.expert_weight_groups() if tensor.expert else parallel.weight_groups()
        copies = dist.get_world_size(replicas)
        if number % copies == dist.get_rank(replicas):
            owner = (number // copies) % dist.get_world_size(group)
            whole = live.gather([_shard(tensor, tensor.part_of(value(tensor.parameter)))], owner, group)
            if whole is not None:
                yield tensor.name, whole


def whole_stacks(
    tensors: Sequence[AdapterTensor],
    pieces: Mapping[str, fused.Piece],
    value: Callable[[torch.Tensor], torch.Tensor],
    *,
    device: torch.device,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole tensors of stacks of experts, put together from those of single experts that `pieces` says the place of.

    Each from one rank of the job, float32, on the CPU. A collective call. What no module has is 0.
    """
    group, replicas = parallel.expert_stack_groups()
    mine: dict[str, list[AdapterTensor]] = {}
    for tensor in tensors:
        if tensor.name in pieces:
            mine.setdefault(pieces[tensor.name].source, []).append(tensor)
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, list(mine), group=group)
    shapes = {piece.source: piece.whole for piece in pieces.values()}
    for number, source in enumerate(sorted({name for part in every for name in part})):
        copies = dist.get_world_size(replicas)
        if number % copies != dist.get_rank(replicas):
            continue
        whole = torch.zeros(shapes[source], device=device)  # a rank may have none of the stack's adapters
        for tensor in mine.get(source, ()):
            if tensor.split is not None or tensor.rank == 0:  # each number from one rank: the others add 0
                shard = _shard(tensor, tensor.part_of(value(tensor.parameter)))
                place = tuple(slice(o, o + n) for o, n in zip(shard.offset, shard.data.shape, strict=True))
                pieces[tensor.name].of(whole)[place] = shard.data
        owner = (number // copies) % dist.get_world_size(group)
        dist.reduce(whole, group_dst=owner, group=group)
        if dist.get_rank(group) == owner:
            yield source, whole.cpu()


def saved_rules(chunks: Sequence[Any], adapter: str) -> Mapping[str, TensorRule]:
    """The tensors that are trained in full, by global key: they belong to the first adapter."""
    adapters = chunks[0].adapters
    return adapters.saved_rules if adapter == adapters.names[0] else {}


def _shard(tensor: AdapterTensor, data: torch.Tensor) -> live.Shard:
    shape, offset = list(data.shape), [0] * data.dim()
    if tensor.split is not None:
        offset[tensor.split] = tensor.rank * shape[tensor.split]
        shape[tensor.split] *= tensor.size
    return live.Shard(tensor.name, None, tuple(shape), tuple(offset), data, main=True)


# --- writing ----------------------------------------------------------------------------------------------------------


def save(
    chunks: Sequence[Any],
    rules: Mapping[str, TensorRule],
    folder: Path,
    settings: LoraSettings,
    *,
    base: str,
    adapter: str = DEFAULT,
) -> None:
    """Writes an adapter as a PEFT folder, all ranks together; it appears, or is replaced, when it is whole.

    Experts are written as PEFT adapts them, in stacks (`fused`); with DoRA, which PEFT hasn't for them, one by one.
    `base`: the base model's name or folder, for adapter_config.json. Raises InputError as `published` does.
    """
    dtypes = {torch.float32: "F32", torch.bfloat16: "BF16"}
    change = _change(chunks, adapter)
    tensors = tensors_of(chunks, adapter)
    mine = {
        t.name: (dtypes[t.parameter.dtype], _shard(t, t.part_of(change(t.parameter))).global_shape) for t in tensors
    }
    if settings.pissa:
        settings = replace(settings, rank=2 * settings.rank, alpha=settings.scaling * 2 * settings.rank, rslora=False)
    shapes = parallel.union_over_model(mine)
    modules = list(linear_modules(rules))
    stacks = (
        []
        if settings.dora
        else fused.adapters_to_write(
            shapes, modules, settings.rank, share_a=settings.share_a or settings.share_experts_a
        )
    )
    pieces = dict(piece for stack in stacks for piece in stack.pieces())
    written = {name: spec for name, spec in shapes.items() if name not in pieces}
    written |= {name: (stack.dtype, shape) for stack in stacks for name, shape in stack.shapes().items()}
    specs = {PREFIX + name: io.TensorSpec(dtype, shape) for name, (dtype, shape) in sorted(written.items())}
    in_full = saved_specs(chunks, dtypes[chunks[0].config.params_dtype], adapter)
    specs |= {PREFIX + name: spec for name, spec in in_full.items()}
    plan = io.plan_output(specs, max_shard_bytes=float("inf"), single=WEIGHTS)
    settings = replace(settings, modules_to_save=tuple(modules_of(saved_rules(chunks, adapter))))
    single = [name.rsplit(".lora_", 1)[0] for name in shapes if name not in pieces]
    config = config_of(single, rules, settings, base=base, stacks=stacks)
    with published(folder) as partial:
        parallel.on_first_rank(lambda: _begin(partial, plan, config))
        error: OSError | None = None
        own = whole_tensors(chunks, adapter, value=change, without=pieces)
        device = tensors[0].parameter.device if tensors else next(chunks[0].parameters()).device
        for name, tensor in chain(own, whole_stacks(tensors, pieces, change, device=device) if stacks else ()):
            try:
                if error is None:
                    io.write_tensor(partial, plan, PREFIX + name, tensor.to(live.DTYPES[specs[PREFIX + name].dtype]))
            except OSError as problem:  # the others are waiting in the next gather: go on, and raise together
                error = problem
        parallel.raise_together(error)


def _change(chunks: Sequence[Any], adapter: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """What stands for a parameter in a folder. After PiSSA, whose base model has changed too, it is the difference to
    the start, B A − B₀ A₀ = [B, −B₀] [A; A₀], which fits the base model as it was, at twice the rank."""
    starts = {id(t.parameter): (t.start, t.name.endswith("lora_A.weight")) for t in tensors_of(chunks, adapter)}

    def value(parameter: torch.Tensor) -> torch.Tensor:
        start, is_a = starts.get(id(parameter), (None, False))
        if start is None:
            return parameter.data
        return torch.cat([parameter.data, start if is_a else -start], dim=-2 if is_a else -1)

    return value


def saved_specs(chunks: Sequence[Any], dtype: str, adapter: str) -> dict[str, io.TensorSpec]:
    """The tensors of the modules that are trained in full, by Hugging Face's names."""
    rules = saved_rules(chunks, adapter)
    shapes = live.global_shapes(chunks)
    return live.hf_specs(rules, shapes, vocab_size=chunks[0].true_vocab_size, dtype=lambda name: dtype)


def _begin(folder: Path, plan: io.OutputPlan, config: dict[str, object]) -> None:
    io.create_files(folder, plan)
    (folder / CONFIG).write_text(json.dumps(config, indent=2))


def config_of(
    adapted: Collection[str],
    rules: Mapping[str, TensorRule],
    settings: LoraSettings,
    *,
    base: str,
    stacks: Sequence[fused.StackAdapter] = (),
) -> dict[str, object]:
    """adapter_config.json. `adapted`: modules that have a pair of their own.

    A kind of module that is adapted in every layer is named once. Beside experts, modules that PEFT would mistake for
    theirs are named as parameters, which it adapts in the same way.
    """
    modules, own = list(linear_modules(rules)), set(adapted)
    every = fused.stacks_of(modules)
    inside = {module for stack in every.values() for expert in stack.modules for module in expert}
    mistaken = (
        {name for name in own if name.rsplit(".", 1)[-1] in fused.MISTAKEN} if inside and not settings.dora else set()
    )
    parameters = sorted(f"{name}.weight" for name in mistaken)
    parameters += _named_once([stack.stack.name for stack in stacks], list(every), keep=3)
    rank = next((stack.rank for stack in stacks if stack.rank != settings.rank), None)
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if is_scored(rules) else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0 if parameters else settings.dropout,  # PEFT opens no other, and it is training's alone
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
        "target_modules": _named_once(own - mistaken, [name for name in modules if name not in inside or name in own]),
        "target_parameters": parameters or None,
        "rank_pattern": {_STACKS: rank} if rank else {},
        "alpha_pattern": {_STACKS: _alpha_at(rank, settings)} if rank else {},
        "modules_to_save": list(settings.modules_to_save) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


_STACKS = r"experts\.gate_up_proj"


def _alpha_at(rank: int, settings: LoraSettings) -> float:
    """What gives an adapter of another rank the same scaling."""
    return settings.scaling * (math.sqrt(rank) if settings.rslora else rank)


def _named_once(adapted: Collection[str], every: Sequence[str], *, keep: int = 1) -> list[str]:
    """Names, of which those that are adapted wherever there are any of that name are one: its last `keep` words."""

    def end(name: str) -> str:
        return ".".join(name.split(".")[-keep:])

    chosen = set(adapted)
    partly = {end(name) for name in every if name not in chosen}
    return sorted({name if end(name) in partly else end(name) for name in chosen})


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]


# --- reading ----------------------------------------------------------------------------------------------------------


def read_settings(folder: Path) -> tuple[LoraSettings, list[str]]:
    """The settings of a PEFT folder, and the modules, or stacks of experts, that it has adapters for.

    Raises InputError for a folder that is none, and for what it asks for that is not done here.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise InputError(f"adapter.path: {folder} is no PEFT folder; {CONFIG} and {WEIGHTS} are needed")
    config = read_config(folder)
    names = list(_names(folder))
    settings = LoraSettings(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        rslora=config.get("use_rslora", False),
        dora=config.get("use_dora", False),
        modules_to_save=_saved_modules(folder, config, names),
    )
    adapted = dict.fromkeys(name.rsplit(".lora_", 1)[0] for name in names if ".lora_" in name)
    stacks = stack_names(folder, config, adapted)
    gated = [stack for stack in stacks.values() if stack.endswith("gate_up_proj")]
    shared = bool(gated) and all(scaling_of(config, stack)[0] == settings.rank for stack in gated)
    for module in adapted:
        _check_pattern(folder, config, settings, stacks.get(module, module), stack=module in stacks)
    return replace(settings, share_experts_a=shared), [stacks.get(module, module) for module in adapted]


def _check_pattern(folder: Path, config: Mapping[str, Any], settings: LoraSettings, name: str, *, stack: bool) -> None:
    """One rank and one scaling is for all; a stack's rank may be twice that (`fused`)."""
    rank, scaling = scaling_of(config, name)
    allowed = {settings.rank, 2 * settings.rank} if stack and name.endswith("gate_up_proj") else {settings.rank}
    if rank not in allowed or not math.isclose(scaling, settings.scaling, rel_tol=1e-6):
        key = "rank_pattern" if rank not in allowed else "alpha_pattern"
        raise InputError(
            f"{folder / CONFIG}: {key}: {config.get(key)!r} is not supported: it gives {name} rank {rank} and scaling"
            f" {scaling:g}; allowed: rank {' or '.join(map(str, sorted(allowed)))} and scaling {settings.scaling:g}"
        )


def _saved_modules(folder: Path, config: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    """The modules that are trained in full: those that the configuration names (PEFT: by the ends of their names)."""
    ends = listed(config.get("modules_to_save"))
    found = tuple(dict.fromkeys(name.rsplit(".", 1)[0] for name in names if ".lora_" not in name))
    for module in found:
        if not module.endswith(tuple(ends)):
            raise InputError(f"{folder / WEIGHTS}: {module} is no LoRA A or B, and modules_to_save does not name it")
    for end in ends:
        if not any(module.endswith(end) for module in found):
            raise InputError(f"{folder / CONFIG}: modules_to_save: {end!r} has no tensor in {WEIGHTS}")
    return found


def _names(folder: Path) -> dict[str, str]:
    """The file's tensors by our names: without PEFT's prefix, and without the ending that old versions gave DoRA's."""
    entries = io.SafetensorsFolder(folder, single=WEIGHTS).entries
    return {name.removeprefix(PREFIX).replace("_vector.weight", "_vector"): name for name in entries}


@dataclass(frozen=True)
class _AdapterFile:
    """The tensors of a PEFT folder by PEFT's names of single modules' ones, those of experts in stacks, too.

    `stored`: the file's own tensors → what the file calls them. `pieces`: where in which of these the others are.
    """

    file: io.SafetensorsFolder
    stored: Mapping[str, str]
    pieces: Mapping[str, fused.Piece]
    read_rows: Callable[[str, int, int], torch.Tensor]  # of a stack's tensor; the last few are kept

    @property
    def path(self) -> Path:
        return self.file.folder / WEIGHTS

    def names(self) -> list[str]:
        sources = {piece.source for piece in self.pieces.values()}
        return [*(name for name in self.stored if name not in sources), *self.pieces]

    def called(self, name: str) -> str:
        """What the file calls the tensor that it is, or is in."""
        return self.stored[self.pieces[name].source if name in self.pieces else name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.pieces[name].shape if name in self.pieces else self.file.entries[self.stored[name]].shape

    def read(self, name: str, *place: slice) -> torch.Tensor:
        """Raises InputError for a stack whose B isn't what single modules give."""
        if name not in self.pieces:
            return self.file.read(self.stored[name], *place)
        try:
            return self.pieces[name].read(lambda source, rows: self.read_rows(source, rows.start, rows.stop), *place)
        except InputError as problem:
            raise InputError(f"{self.path}: {problem}") from None


def _open(folder: Path, rules: Mapping[str, TensorRule]) -> _AdapterFile:
    """Raises InputError for stacks that aren't this model's."""
    file, names, config = io.SafetensorsFolder(folder, single=WEIGHTS), _names(folder), read_config(folder)
    entries = {name: file.entries[stored] for name, stored in names.items()}
    every = fused.stacks_of(linear_modules(rules))
    pieces: dict[str, fused.Piece] = {}
    modules = dict.fromkeys(name.rsplit(".lora_", 1)[0] for name in names if ".lora_" in name)
    for module, stack in stack_names(folder, config, modules).items():
        if stack not in every:
            raise InputError(
                f"{folder / WEIGHTS}: {stack} belongs to no adapted layer of this model.{nearest(stack, list(every))}"
            )
        rank = scaling_of(config, stack)[0]
        try:
            own = fused.adapter_in_file(every[stack], module, rank, apart=rank != config["r"], entries=entries)
        except InputError as problem:
            raise InputError(f"{folder / WEIGHTS}: {problem}: is it another base model's?") from None
        pieces |= dict(own.pieces())

    @lru_cache(maxsize=8)  # of a layer: gate's, up's and down's B have all experts' columns in each row
    def read_rows(source: str, start: int, stop: int) -> torch.Tensor:
        return file.read(names[source], slice(start, stop))

    return _AdapterFile(file, names, pieces, read_rows)


def load(chunks: Sequence[Any], folder: Path, adapter: str = DEFAULT) -> None:
    """Fills an adapter from a PEFT folder; each rank reads its own shards.

    Raises InputError, on all ranks, for tensors that are missing, left over, mis-shaped or not finite.
    """
    error: InputError | None = None
    try:
        file = _open(folder, chunks[0].tensor_rules)
    except InputError as problem:
        error = problem
    parallel.raise_together(error)
    wanted = parallel.union_over_model({tensor.name: 0 for tensor in tensors_of(chunks, adapter)})
    wanted |= {rule.hf[0]: 0 for rule in saved_rules(chunks, adapter).values()}
    try:
        extra = [name for name in file.names() if name not in wanted]
        if extra:
            raise InputError(
                f"{file.path}: {file.called(extra[0])} belongs to no adapted layer of this model."
                f"{nearest(extra[0], list(wanted))}"
            )
        filled: dict[tuple[int, int | None], str] = {}
        for tensor in tensors_of(chunks, adapter):
            _fill(tensor, file, filled)
        _fill_saved(chunks, file.file, saved_rules(chunks, adapter))
    except InputError as problem:
        error = problem
    parallel.raise_together(error)


@torch.no_grad()
def _fill(tensor: AdapterTensor, file: _AdapterFile, filled: dict[tuple[int, int | None], str]) -> None:
    """`filled`: the names that parameters have been filled from; a shared A has several, which must be the same."""
    own = tensor.part_of(tensor.parameter)
    shard = _shard(tensor, own)
    if tensor.name not in file.stored and tensor.name not in file.pieces:
        raise InputError(f"{file.path}: {PREFIX}{tensor.name} is missing")
    name = file.called(tensor.name)
    if file.shape(tensor.name) != shard.global_shape:
        raise InputError(
            f"{file.path}: {name} has shape {list(file.shape(tensor.name))}, this model and rank need"
            f" {list(shard.global_shape)}: is it another base model's?"
        )
    place = [slice(first, first + n) for first, n in zip(shard.offset, own.shape, strict=True)]
    values = file.read(tensor.name, *place)
    if not bool(torch.isfinite(values).all()):
        raise InputError(f"{file.path}: tensor {name} has NaN or infinite values")
    first = filled.setdefault(tensor.place, tensor.name)
    if first != tensor.name and not torch.equal(own, values.to(own)):
        raise InputError(f"{file.path}: {tensor.name} differs from {first}; adapter.share_a needs one A for both")
    own.copy_(values)


@torch.no_grad()
def _fill_saved(chunks: Sequence[Any], file: io.SafetensorsFolder, rules: Mapping[str, TensorRule]) -> None:
    """The modules that are trained in full."""
    trained = {id(tensor.parameter) for chunk in chunks for tensor in chunk.adapters.saved}

    def chosen(parameter: torch.Tensor) -> torch.Tensor | None:
        return parameter.data if id(parameter) in trained else None

    for shard in live.local_shards(chunks, value=chosen) if rules else ():
        missing = [name for name in rules[shard.key].hf if PREFIX + name not in file.entries]
        if missing:
            raise InputError(f"{file.folder / WEIGHTS}: {PREFIX}{missing[0]} is missing")
        rule = replace(rules[shard.key], hf=tuple(PREFIX + name for name in rules[shard.key].hf))
        live.load_shard(shard, rule, file, vocab_size=chunks[0].true_vocab_size)
