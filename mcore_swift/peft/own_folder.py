"""Folders of adapters that PEFT has no format for: adapter.json (the method and its settings) and adapter.safetensors.

Written by all ranks together at any layout, and read at any other one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch

from mcore_swift import parallel
from mcore_swift.errors import InputError, nearest
from mcore_swift.peft.blocks import BlockAdapter
from mcore_swift.peft.peft_config import OWN_CONFIG as CONFIG
from mcore_swift.peft.peft_config import OWN_WEIGHTS as WEIGHTS
from mcore_swift.peft.peft_config import read_json
from mcore_swift.weights import safetensors_io as io
from mcore_swift.weights.hf_folder import published

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def _branches(chunks: Sequence[Any]) -> list[BlockAdapter]:
    return [branch for chunk in chunks for branch in chunk.adapters.branches]


def save(chunks: Sequence[Any], folder: Path, method: str, settings: Any, *, base: str) -> None:
    """Writes the chunks' adapters; the folder appears, or is replaced, when it is whole. Called by all ranks.

    `settings`: a dataclass, whose fields but the seed are written. `base`: the base model's name or folder.
    """
    mine = {f"{branch.name}.{kind}": value for branch in _branches(chunks) for kind, value in branch.exported().items()}
    shapes = parallel.union_over_model({name: (DTYPES[t.dtype], tuple(t.shape)) for name, t in mine.items()})
    specs = {name: io.TensorSpec(dtype, shape) for name, (dtype, shape) in sorted(shapes.items())}
    plan = io.plan_output(specs, max_shard_bytes=float("inf"), single=WEIGHTS)
    config = {"method": method, "base_model": base}
    config |= {key: value for key, value in asdict(settings).items() if key != "seed"}
    place = parallel.ranks()
    with published(folder) as partial:

        def begin() -> None:
            io.create_files(partial, plan)
            (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")

        parallel.on_first_rank(begin)
        error: OSError | None = None
        if (place.tp, place.dp, place.cp) == (0, 0, 0):  # each of a stage's ranks has all of the stage's adapters
            try:
                for name, tensor in mine.items():
                    io.write_tensor(partial, plan, name, tensor.cpu())
            except OSError as problem:
                error = problem
        parallel.raise_together(error)


def read_settings[Settings](folder: Path, method: str, kind: type[Settings]) -> Settings:
    """The settings of a folder of this method. Raises InputError for a folder that is none, or another method's."""
    path = folder / CONFIG
    config = read_json(path, f"adapter.path is a folder of {method}'s {CONFIG} and {WEIGHTS}")
    if config.get("method") != method:
        raise InputError(f"{path}: method: found {config.get('method')!r}, but adapter.name is {method}")
    names = {field.name for field in fields(kind)} - {"seed"}  # type: ignore[arg-type]
    for key in [*(names - config.keys()), *(config.keys() - names - {"method", "base_model"})]:
        raise InputError(f"{path}: {key} is {'missing' if key in names else 'unknown'}; needed are {sorted(names)}")
    values = {name: tuple(config[name]) if isinstance(config[name], list) else config[name] for name in names}
    for name, value in values.items():
        _check_type(path, name, value, kind)
    return kind(**values)


def _check_type(path: Path, name: str, value: Any, kind: type) -> None:
    wanted = get_type_hints(kind)[name]
    allowed = tuple(
        get_origin(each) or each for each in (get_args(wanted) if get_origin(wanted) is UnionType else [wanted])
    )
    if not isinstance(value, allowed) or isinstance(value, bool):
        raise InputError(f"{path}: {name}: found {value!r}; it must be {wanted}")


def load(chunks: Sequence[Any], folder: Path) -> None:
    """Fills the adapters from a folder; each rank reads its own.

    Raises InputError, on all ranks, for tensors that are missing, left over, mis-shaped or not finite.
    """
    every = parallel.union_over_model(
        {f"{branch.name}.{kind}": 0 for branch in _branches(chunks) for kind in branch.exported()}
    )
    error: InputError | None = None
    try:
        file = io.SafetensorsFolder(folder, single=WEIGHTS)
        extra = [name for name in file.entries if name not in every]
        if extra:
            raise InputError(
                f"{folder / WEIGHTS}: {extra[0]} belongs to no adapter of this model.{nearest(extra[0], list(every))}"
            )
        for branch in _branches(chunks):
            shapes = {kind: tuple(value.shape) for kind, value in branch.exported().items()}
            branch.take({kind: _read(file, folder, f"{branch.name}.{kind}", shape) for kind, shape in shapes.items()})
    except InputError as problem:
        error = problem
    parallel.raise_together(error)


def _read(file: io.SafetensorsFolder, folder: Path, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if name not in file.entries:
        raise InputError(f"{folder / WEIGHTS}: {name} is missing")
    if tuple(file.entries[name].shape) != shape:
        raise InputError(
            f"{folder / WEIGHTS}: {name} has shape {list(file.entries[name].shape)}, this model needs {list(shape)}:"
            " is it another base model's?"
        )
    values = file.read(name)
    if not bool(torch.isfinite(values).all()):
        raise InputError(f"{folder / WEIGHTS}: tensor {name} has NaN or infinite values")
    return values
