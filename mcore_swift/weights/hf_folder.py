"""A Hugging Face folder around the weights: what is copied from the source, and the atomic export."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mcore_swift import parallel
from mcore_swift.errors import InputError
from mcore_swift.weights import live
from mcore_swift.weights.coverage import Spec
from mcore_swift.weights.rules import TensorRule

if TYPE_CHECKING:
    import torch
    from torch.nn import Module

    from mcore_swift.models.build import ModelSource

# Never copied: weights, which are written anew, and code, which is never passed on.
NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json", ".py", ".so")
# How the names of a tokenizer's files begin.
TOKENIZER = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "spiece", "tekken")
CONFIG_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Tensors that hub folders hold in float32 whatever the model's dtype: steps of 0.001 would be lost in bfloat16.
FLOAT32 = ("e_score_correction_bias",)
SAFETENSORS_DTYPES = {name: code for code, name in CONFIG_DTYPES.items()}


def copy_metadata(source: ModelSource, destination: Path, *, dtype: str | None = None) -> None:
    """Copies configuration, tokenizer and chat template; `dtype` (safetensors' name) is noted in config.json."""
    for folder, is_tokenizer in ((source.folder, False), (source.tokenizer, True)):
        for path in folder.iterdir():
            wanted = path.name.startswith(TOKENIZER) == is_tokenizer and path.name != "config.json"
            if path.is_file() and wanted and not path.name.endswith(NOT_COPIED):
                shutil.copyfile(path, destination / path.name)
    if source.chat_template is not None:  # transformers prefers this file to the template in tokenizer_config.json
        shutil.copyfile(source.chat_template, destination / "chat_template.jinja")
    config = {key: value for key, value in source.raw.items() if key != "quantization_config"}  # it is decoded
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = CONFIG_DTYPES[dtype]
    (destination / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def dtype_of(source: ModelSource, entries: Mapping[str, Spec] | None, default: str) -> Callable[[str], str]:
    """The dtype each tensor is written in: the source tensor's, else the one config.json names, else `default`."""
    named = source.raw.get("dtype", source.raw.get("torch_dtype"))
    fallback = SAFETENSORS_DTYPES.get(str(named), default) if entries is not None else default

    def choose(name: str) -> str:
        if entries and name in entries:
            return entries[name].dtype
        return "F32" if name.endswith(FLOAT32) else fallback

    return choose


def export(
    chunks: Sequence[Module],
    rules: Mapping[str, TensorRule],
    source: ModelSource,
    destination: Path,
    *,
    dtype: Callable[[str], str],
    max_shard_bytes: int = 5 * 10**9,
    value: Callable[[torch.Tensor], torch.Tensor] = lambda parameter: parameter.data,
) -> None:
    """Writes a complete Hugging Face folder, all ranks together, as `published` does; the rest as `live.save`."""
    with published(destination) as partial:
        parallel.on_first_rank(lambda: copy_metadata(source, partial, dtype=dtype("model.embed_tokens.weight")))
        live.save(
            chunks,
            rules,
            partial,
            vocab_size=source.vocab_size,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            value=value,
        )


@contextlib.contextmanager
def published(destination: Path) -> Iterator[Path]:
    """A folder to write into, shared by all ranks: `destination` appears, or is replaced, when the block is done.

    Raises InputError when the disk is full or the place not writable; nothing is left then but what was there before.
    """
    partial = destination.with_name(f".{destination.name}.partial")

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def commit() -> None:
        old = destination.with_name(f".{destination.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if destination.exists():
            os.rename(destination, old)
        os.rename(partial, destination)
        shutil.rmtree(old, ignore_errors=True)

    try:
        parallel.on_first_rank(begin)
        yield partial
        parallel.on_first_rank(commit)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(
            f"{destination}: could not be written: {error.strerror or error}; nothing was left there"
        ) from error
