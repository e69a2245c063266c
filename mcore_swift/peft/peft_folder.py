"""Adapters from and to PEFT's folders: adapter_config.json and adapter_model.safetensors, at any layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mcore_swift import parallel
from mcore_swift.errors import InputError, nearest
from mcore_swift.peft.adapters import AdapterTensor
from mcore_swift.peft.lora import LoraSettings
from mcore_swift.peft.peft_config import CONFIG, DEFAULT, PREFIX, WEIGHTS, is_scored, listed, read_config
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
) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole tensors of an adapter, by PEFT's names without their prefix; each from one rank of the job, on the CPU.

    Those of modules that are trained in full come first. A collective call. `value` gives what stands for a parameter:
    its data, or its gradient.
    """
    if saved_rules(chunks, adapter):
        trained = {id(tensor.parameter) for chunk in chunks for tensor in chunk.adapters.saved}

        def saved(parameter: torch.Tensor) -> torch.Tensor | None:
            return value(parameter) if id(parameter) in trained else None

        rules, vocab_size = chunks[0].tensor_rules, chunks[0].true_vocab_size
        for name, tensor, _ in live.hf_tensors(chunks, rules, vocab_size=vocab_size, value=saved):
            yield name, tensor
    for number, tensor in enumerate(tensors_of(chunks, adapter)):
        group, replicas = parallel.expert_weight_groups() if tensor.expert else parallel.weight_groups()
        copies = dist.get_world_size(replicas)
        if number % copies == dist.get_rank(replicas):
            owner = (number // copies) % dist.get_world_size(group)
            whole = live.gather([_shard(tensor, value(tensor.parameter))], owner, group)
            if whole is not None:
                yield tensor.name, whole


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

    `base`: the base model's name or folder, for adapter_config.json. Raises InputError as `published` does.
    """
    dtypes = {torch.float32: "F32", torch.bfloat16: "BF16"}
    change = _change(chunks, adapter)
    tensors = tensors_of(chunks, adapter)
    mine = {t.name: (dtypes[t.parameter.dtype], _shard(t, change(t.parameter)).global_shape) for t in tensors}
    if settings.pissa:
        settings = replace(settings, rank=2 * settings.rank, alpha=settings.scaling * 2 * settings.rank, rslora=False)
    shapes = parallel.union_over_model(mine)
    specs = {PREFIX + name: io.TensorSpec(dtype, shape) for name, (dtype, shape) in sorted(shapes.items())}
    in_full = saved_specs(chunks, dtypes[chunks[0].config.params_dtype], adapter)
    specs |= {PREFIX + name: spec for name, spec in in_full.items()}
    plan = io.plan_output(specs, max_shard_bytes=float("inf"), single=WEIGHTS)
    settings = replace(settings, modules_to_save=tuple(modules_of(saved_rules(chunks, adapter))))
    config = config_of([name.rsplit(".lora_", 1)[0] for name in shapes], rules, settings, base=base)
    with published(folder) as partial:
        parallel.on_first_rank(lambda: _begin(partial, plan, config))
        error: OSError | None = None
        for name, tensor in whole_tensors(chunks, adapter, value=change):
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
        return torch.cat([parameter.data, start]) if is_a else torch.cat([parameter.data, -start], dim=1)

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
    modules: Sequence[str], rules: Mapping[str, TensorRule], settings: LoraSettings, *, base: str
) -> dict[str, object]:
    """adapter_config.json. A kind of module that is adapted in every layer is named once."""
    adapted, every = set(modules), list(linear_modules(rules))
    leaves = {name.rsplit(".", 1)[-1] for name in adapted}
    whole = {leaf for leaf in leaves if all(name in adapted for name in every if name.rsplit(".", 1)[-1] == leaf)}
    single = {name for name in adapted if name.rsplit(".", 1)[-1] not in whole}
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if is_scored(rules) else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
        "target_modules": sorted(whole | single),
        "modules_to_save": list(settings.modules_to_save) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


# --- reading ----------------------------------------------------------------------------------------------------------


def read_settings(folder: Path) -> tuple[LoraSettings, list[str]]:
    """The settings of a PEFT folder, and the modules that it has adapters for.

    Raises InputError for a folder that is none, and for what it asks for that is not done here.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise InputError(f"adapter.path: {folder} is no PEFT folder; {CONFIG} and {WEIGHTS} are needed")
    config = read_config(folder, honoured=("modules_to_save",))
    names = list(_names(folder))
    settings = LoraSettings(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        rslora=config.get("use_rslora", False),
        dora=config.get("use_dora", False),
        modules_to_save=_saved_modules(folder, config, names),
    )
    return settings, list(dict.fromkeys(name.rsplit(".lora_", 1)[0] for name in names if ".lora_" in name))


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


def load(chunks: Sequence[Any], folder: Path, adapter: str = DEFAULT) -> None:
    """Fills an adapter from a PEFT folder; each rank reads its own shards.

    Raises InputError, on all ranks, for tensors that are missing, left over, mis-shaped or not finite.
    """
    error: InputError | None = None
    try:
        file, names = io.SafetensorsFolder(folder, single=WEIGHTS), _names(folder)
    except InputError as problem:
        error = problem
    parallel.raise_together(error)
    wanted = parallel.union_over_model({tensor.name: 0 for tensor in tensors_of(chunks, adapter)})
    wanted |= {rule.hf[0]: 0 for rule in saved_rules(chunks, adapter).values()}
    try:
        extra = [name for name in names if name not in wanted]
        if extra:
            raise InputError(
                f"{folder / WEIGHTS}: {names[extra[0]]} belongs to no adapted layer of this model."
                f"{nearest(extra[0], list(wanted))}"
            )
        filled: dict[int, str] = {}
        for tensor in tensors_of(chunks, adapter):
            _fill(tensor, file, names, folder / WEIGHTS, filled)
        _fill_saved(chunks, file, saved_rules(chunks, adapter))
    except InputError as problem:
        error = problem
    parallel.raise_together(error)


@torch.no_grad()
def _fill(
    tensor: AdapterTensor, file: io.SafetensorsFolder, names: Mapping[str, str], path: Path, filled: dict[int, str]
) -> None:
    """`filled`: the names that parameters have been filled from; a shared A has several, which must be the same."""
    shard = _shard(tensor, tensor.parameter)
    if tensor.name not in names:
        raise InputError(f"{path}: {PREFIX}{tensor.name} is missing")
    name = names[tensor.name]
    if tuple(file.entries[name].shape) != shard.global_shape:
        raise InputError(
            f"{path}: {name} has shape {list(file.entries[name].shape)}, this model and rank need"
            f" {list(shard.global_shape)}: is it another base model's?"
        )
    place = [slice(first, first + n) for first, n in zip(shard.offset, tensor.parameter.shape, strict=True)]
    values = file.read(name, *place)
    if not bool(torch.isfinite(values).all()):
        raise InputError(f"{path}: tensor {name} has NaN or infinite values")
    first = filled.setdefault(id(tensor.parameter), name)
    if first != name and not torch.equal(tensor.parameter, values.to(tensor.parameter)):
        raise InputError(f"{path}: {name} differs from {first}; adapter.share_a needs one A for both")
    tensor.parameter.copy_(values)


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
