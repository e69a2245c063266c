"""`mcore-swift merge`: a PEFT LoRA folder folded into its base model, tensor by tensor, without building a model.

A target's new weight is W + s·B·A (https://arxiv.org/abs/2106.09685), s = alpha / r or alpha / √r (rsLoRA,
https://arxiv.org/abs/2312.03732); DoRA rescales its rows to the trained magnitudes (https://arxiv.org/abs/2402.09353).
It is computed in float32 and rounded once. Memory is that of the largest tensor, whatever the model's size.

Everything is checked from headers before anything is written (`peft_folder.py`).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt_tools.peft_folder import FLOATS, Adapter, read_adapter
from mcore_swift.errors import InputError
from mcore_swift.peft.peft_config import OWN_CONFIG, read_json
from mcore_swift.weights import safetensors_io as io

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}


def merge(base: Path, adapter: Path, destination: Path, *, dtype: str | None = None) -> None:
    """Writes the Hugging Face folder `destination`: `base` with `adapter` merged, in the base's dtypes or in `dtype`.

    dtype: bf16, fp16 or fp32. Raises InputError when a folder is not what it should be, the adapter needs a feature
    that is not supported or does not fit the base, or `destination` exists or can't be written; nothing is left then.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype: {dtype!r} is unknown; allowed: {', '.join(DTYPES)}")
    _check_destination(destination, base, adapter)
    _check_method(adapter)
    source = _read_base(base)
    folder = io.SafetensorsFolder(base)
    loaded = read_adapter(adapter, folder, tied=bool(source.raw.get("tie_word_embeddings")))
    specs = {name: io.TensorSpec(_dtype(entry, dtype), entry.shape) for name, entry in folder.entries.items()}
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    except OSError as error:
        raise InputError(f"{destination}: can't be written: {error.strerror}") from error
    try:
        partial.chmod(0o755)  # mkdtemp's folder is private
        _write(partial, source, folder, loaded, specs, noted=DTYPES.get(dtype or ""))
        if destination.exists():  # os.rename would replace an empty folder
            raise InputError(f"{destination}: was made by another program in the meantime; nothing was written")
        os.rename(partial, destination)
    except OSError as error:
        raise InputError(f"{destination}: could not be written: {error.strerror}; nothing was left there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_destination(destination: Path, *sources: Path) -> None:
    if destination.exists() or destination.is_symlink():
        raise InputError(f"{destination}: exists already; name a folder that doesn't")
    for source in sources:
        if destination.resolve().is_relative_to(source.resolve()):
            raise InputError(f"{destination}: lies inside {source}, which is read from; name another folder")


def _check_method(adapter: Path) -> None:
    """Only what changes weights can be folded into them."""
    if (adapter / OWN_CONFIG).is_file():
        method = read_json(adapter / OWN_CONFIG, "an adapter folder is needed").get("method")
        raise InputError(
            f"{adapter}: {method} changes what layers give, and no weights that it could be merged into would do that;"
            " use it as it is: mcore-swift generate BASE --adapter …, or adapter.path in a recipe; allowed: PEFT's LoRA"
        )


def _read_base(folder: Path) -> Any:
    """The base's ModelSource. Its config stays unread: no mathematics is needed here, and transformers loads slowly."""
    from mcore_swift.models.build import ModelSource
    from mcore_swift.models.registry import family_of

    path = folder / "config.json"
    raw = read_json(path, "a Hugging Face model folder is needed")
    # PEFT's module names are tensor names for the families that are known; others may fuse or rename.
    family = family_of(str(raw.get("model_type")), source=str(path))
    return ModelSource(folder=folder, raw=raw, config=None, family=family, tokenizer=folder)


def _dtype(entry: io.Entry, dtype: str | None) -> str:
    return DTYPES[dtype] if dtype and entry.dtype in FLOATS else entry.dtype


def _write(
    partial: Path,
    source: Any,
    folder: io.SafetensorsFolder,
    adapter: Adapter,
    specs: Mapping[str, io.TensorSpec],
    *,
    noted: str | None,
) -> None:
    from mcore_swift.weights.hf_folder import copy_metadata
    from mcore_swift.weights.live import DTYPES as TORCH

    copy_metadata(source, partial, dtype=noted)
    plan = io.plan_output(specs)
    io.create_files(partial, plan)
    for name, spec in specs.items():
        base = folder.read(name)
        tensor = adapter.apply(name, base)
        if tensor is not base or spec.dtype != folder.entries[name].dtype:
            tensor = tensor.to(TORCH[spec.dtype])
            if not bool(tensor.isfinite().all()):
                raise InputError(f"{adapter.weights.path}: merged into {name} it gives NaN or infinite values")
        io.write_tensor(partial, plan, name, tensor)
