"""`mcore-swift inspect`: what a folder or file of weights is, from headers alone.

Works for models that this project can't train too: a model_type that is not a known family is said to be one. Neither
Megatron nor transformers is imported, and no tensor is read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ckpt_tools.peft_folder import CONFIG as ADAPTER_CONFIG
from ckpt_tools.peft_folder import WEIGHTS as ADAPTER_WEIGHTS
from mcore_swift.errors import EXIT_FAILED, DamagedCheckpoint, InputError
from mcore_swift.peft.peft_config import OWN_CONFIG, OWN_WEIGHTS, read_json
from mcore_swift.weights import safetensors_io as io

AHEAD = "multi-token prediction"  # layers after the model's own, which one token's prediction doesn't need
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
# A tensor's part, by its name in Hugging Face's, Megatron's or GGUF's naming; the first pattern that is found counts.
PARTS: tuple[tuple[str, str], ...] = (
    ("adapter", r"lora_|\.adapter_(down|up)\.|\.reft_"),
    (AHEAD, r"^mtp\."),
    ("norms", r"norm"),
    ("shared experts", r"shared_expert|_shexp\b"),
    ("experts", r"experts?\b|_exps\b"),
    ("embedding", r"embed|token_embd"),
    ("head", r"lm_head|output_layer|^output\."),
    ("attention", r"attn|attention"),
    ("mlp", r"mlp|ffn|feed_forward"),
    ("other", r""),
)
# config.json keys of a model's shape: (what they are, the names that families give them).
SHAPE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("layers", ("num_hidden_layers", "n_layer")),
    ("hidden", ("hidden_size", "n_embd")),
    ("ffn", ("intermediate_size",)),
    ("heads", ("num_attention_heads", "n_head")),
    ("key-value heads", ("num_key_value_heads",)),
    ("head dim", ("head_dim",)),
    ("vocabulary", ("vocab_size",)),
    ("context", ("max_position_embeddings",)),
    ("experts", ("num_experts", "num_local_experts", "n_routed_experts")),
    ("experts a token", ("num_experts_per_tok",)),
)


@dataclass(frozen=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Size:
    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Found:
    """What a path holds. `parts` and `dtypes`: sizes by part of the model, and by dtype."""

    path: str
    kind: str
    family: str  # what config.json calls itself, and whether it is known here
    parameters: int  # a tied embedding counts once
    active: int  # parameters that one token uses: those of the experts it is not sent to left out
    bytes: int
    tied: bool | None  # None: not known
    shape: dict[str, Any]
    details: dict[str, Any]  # what only this kind has: step and layout, rank and targets, quantization
    dtypes: dict[str, Size]
    parts: dict[str, Size]
    files: dict[str, int] = field(default_factory=dict)  # bytes by file name


def inspect(*, path: Path, as_json: bool = False, check: bool = False) -> int:
    """Prints what `path` holds; returns the exit code. Raises InputError for what is not known or damaged.

    check: also reads every file of a run's checkpoint and compares it with what was written; exit code 1: damaged.
    """
    checked = check_checkpoint(path) if check else None
    if checked is not None and checked.damaged:
        print(json.dumps({"path": str(path), "checked": asdict(checked)}, indent=1) if as_json else checked)
        return EXIT_FAILED
    found = look(path)
    if as_json:
        print(json.dumps(asdict(found) | ({} if checked is None else {"checked": asdict(checked)}), indent=1))
        return 0
    print_found(found)
    if checked is not None:
        print(checked)
    return 0


@dataclass(frozen=True)
class Checked:
    """What comparing a checkpoint with its checksums found."""

    files: int  # that were compared; 0: an earlier version wrote it, only the sizes are known
    bytes: int
    damaged: list[str]

    def __str__(self) -> str:
        if self.damaged:
            return "\n".join(f"damaged: {problem}" for problem in self.damaged)
        if not self.files:
            return "checked: files' sizes; it is older than checksums"
        return f"checked: {self.files} files, {self.bytes / 1e9:.2f} GB, are what was written"


def check_checkpoint(path: Path) -> Checked:
    """Reads every file of a run's checkpoint. Raises InputError for what isn't one."""
    from concurrent.futures import ThreadPoolExecutor

    from mcore_swift.training import checkpoint_folder

    if not (path / checkpoint_folder.MANIFEST).is_file():
        raise InputError(
            f"{path}: --check compares a run's checkpoint with its record, {checkpoint_folder.MANIFEST}; there is none"
        )
    try:
        manifest = checkpoint_folder.read_manifest(path)
    except DamagedCheckpoint as error:
        return Checked(0, 0, [str(error)])
    names = checkpoint_folder.checked_files(manifest)
    with ThreadPoolExecutor() as threads:
        problems = threads.map(lambda name: list(checkpoint_folder.damage(path, [name], manifest)), names)
    damaged = [f"{path}: {problem}" for found in problems for problem in found]
    return Checked(len(names), sum(manifest["files"].get(name, 0) for name in names), damaged)


def look(path: Path) -> Found:
    """What `path` holds: the first kind whose mark is there. Raises InputError when there is none."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    for holds, read in _KINDS:
        if holds(path):
            return read(path)
    allowed = "allowed: a Hugging Face folder, a Megatron checkpoint, an adapter folder, a .safetensors or a GGUF file"
    raise InputError(f"{path}: not known what this is; {allowed}")


def _found(
    path: Path,
    kind: str,
    tensors: Mapping[str, Tensor],
    *,
    config: Mapping[str, Any] | None,
    details: Mapping[str, Any],
    files: Iterable[Path],
) -> Found:
    config = config or {}
    shape = {what: next((config[key] for key in keys if config.get(key) is not None), None) for what, keys in SHAPE}
    if shape["head dim"] is None and shape["hidden"] and shape["heads"]:
        shape["head dim"] = shape["hidden"] // shape["heads"]
    layers = shape["layers"]
    parts = {
        part: _sizes(tensor for name, tensor in tensors.items() if _part(name, layers) == part) for part, _ in PARTS
    }
    kinds = sorted({tensor.dtype for tensor in tensors.values()})
    total = _sizes(tensors.values())
    share = (shape["experts a token"] or 1) / (shape["experts"] or 1)
    return Found(
        path=str(path),
        kind=kind,
        family=_family(config),
        parameters=total.parameters,
        active=total.parameters - parts[AHEAD].parameters - round((1 - share) * parts["experts"].parameters),
        bytes=total.bytes,
        tied=_tied(config, tensors),
        shape={what: value for what, value in shape.items() if value is not None},
        details={what: value for what, value in details.items() if value is not None},
        dtypes={dtype: _sizes(tensor for tensor in tensors.values() if tensor.dtype == dtype) for dtype in kinds},
        parts={part: size for part, size in parts.items() if size.tensors},
        files={file.relative_to(path if path.is_dir() else path.parent).as_posix(): _bytes_of(file) for file in files},
    )


def _sizes(tensors: Iterable[Tensor]) -> Size:
    chosen = list(tensors)
    return Size(len(chosen), sum(tensor.numel for tensor in chosen), sum(tensor.nbytes for tensor in chosen))


def _part(name: str, layers: int | None = None) -> str:
    """layers: the model's own; those after them predict further tokens."""
    layer = _LAYER.match(name)
    if layer and layers and int(layer[1]) >= layers:
        return AHEAD
    return next(part for part, pattern in PARTS if re.search(pattern, name))


def _bytes_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise InputError(f"{file}: can't be read: {error.strerror}") from None


def _family(config: Mapping[str, Any]) -> str:
    from mcore_swift.models.registry import FAMILIES

    model_type = config.get("model_type")
    if model_type is None:
        return "unknown"
    return str(model_type) if model_type in FAMILIES else f"{model_type} (not a family that mcore-swift trains)"


def _tied(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool | None:
    if "tie_word_embeddings" in config:
        return bool(config["tie_word_embeddings"])
    parts = {_part(name) for name in tensors}
    return "head" not in parts if "embedding" in parts else None


# --- the kinds --------------------------------------------------------------------------------------------------------


def _from_entries(entries: Mapping[str, io.Entry]) -> dict[str, Tensor]:
    return {name: Tensor(entry.dtype, entry.shape, entry.end - entry.start) for name, entry in entries.items()}


def _hugging_face(path: Path) -> Found:
    config = read_json(path / "config.json", "a Hugging Face folder is needed")
    entries = io.SafetensorsFolder(path).entries
    quantization = config.get("quantization_config")
    details = {
        "architecture": ", ".join(config.get("architectures") or []) or None,
        "RoPE": config.get("rope_parameters") or config.get("rope_scaling") or config.get("rope_theta"),
        "quantization": quantization.get("quant_method") if isinstance(quantization, dict) else None,
        "tokenizer": (path / "tokenizer.json").is_file() or (path / "tokenizer.model").is_file(),
    }
    files = dict.fromkeys(entry.file for entry in entries.values())
    return _found(
        path, "Hugging Face folder", _from_entries(entries), config=config, details=details, files=list(files)
    )


def _safetensors_file(path: Path) -> Found:
    return _found(path, "safetensors file", _from_entries(io.read_header(path)), config=None, details={}, files=[path])


def _adapter(path: Path) -> Found:
    config = read_json(path / ADAPTER_CONFIG, "a PEFT adapter folder is needed")
    details = {
        "method": config.get("peft_type"),
        "base": config.get("base_model_name_or_path"),
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "targets": config.get("target_modules"),
        "target parameters": config.get("target_parameters"),
        "DoRA": config.get("use_dora"),
        "rsLoRA": config.get("use_rslora"),
        "saved modules": config.get("modules_to_save"),
    }
    file = path / ADAPTER_WEIGHTS
    tensors = _from_entries(io.read_header(file))
    return _found(path, "PEFT adapter", tensors, config=None, details=details, files=[file])


def _own_adapter(path: Path) -> Found:
    """Of a method that PEFT has no format for: bottleneck, reft."""
    config = read_json(path / OWN_CONFIG, "an adapter folder is needed")
    details = {"method": config.get("method"), "base": config.get("base_model")}
    details |= {key.replace("_", " "): value for key, value in config.items() if key not in ("method", "base_model")}
    file = path / OWN_WEIGHTS
    return _found(path, "adapter", _from_entries(io.read_header(file)), config=None, details=details, files=[file])


def _megatron(path: Path) -> Found:
    from ckpt_tools.torch_dist import checkpoint_folder, dtype_names, optimizer_bytes
    from mcore_swift.weights.dist_index import read_index

    folder = checkpoint_folder(path)
    index, names = read_index(folder), dtype_names()
    tensors, optimizer = {}, optimizer_bytes(index)
    for key, item in index.state_dict_metadata.items():
        if not hasattr(item, "chunks"):
            continue  # objects, such as Transformer Engine's extra state
        shape, torch_dtype = tuple(item.size), item.properties.dtype  # type: ignore[union-attr]
        if "optimizer" not in key.split(".")[:2]:
            nbytes = math.prod(shape) * torch_dtype.itemsize
            tensors[key] = Tensor(names.get(torch_dtype, str(torch_dtype)), shape, nbytes)
    manifest = read_json(folder / "mcore_swift.json", "") if (folder / "mcore_swift.json").is_file() else None
    has_config = (folder / "hf" / "config.json").is_file()
    config = read_json(folder / "hf" / "config.json", "") if has_config else None
    known = manifest or {}
    details = {
        "written by": "mcore-swift" if manifest is not None else "another program",
        "step": known.get("step"),
        "layout": known.get("plan"),
        "versions": known.get("versions"),
        "optimizer": _bytes(optimizer) if optimizer else "not saved",
        "config": None if config else "none (hf/config.json is missing), so the family is not known",
    }
    files = sorted(folder.glob("*.distcp"))
    return _found(folder, "Megatron checkpoint", tensors, config=config, details=details, files=files)


def _gguf(path: Path) -> Found:
    from ckpt_tools.gguf import GGUFFile

    file = GGUFFile(path)
    tensors = {
        name: Tensor(tensor.tensor_type.name, tuple(int(n) for n in reversed(tensor.shape)), int(tensor.n_bytes))
        for name, tensor in file.tensors.items()
    }
    keys = {
        "num_hidden_layers": "{arch}.block_count",
        "hidden_size": "{arch}.embedding_length",
        "intermediate_size": "{arch}.feed_forward_length",
        "num_attention_heads": "{arch}.attention.head_count",
        "num_key_value_heads": "{arch}.attention.head_count_kv",
        "head_dim": "{arch}.attention.key_length",
        "max_position_embeddings": "{arch}.context_length",
        "num_experts": "{arch}.expert_count",
        "num_experts_per_tok": "{arch}.expert_used_count",
    }
    config = {name: file.find(key) for name, key in keys.items()} | {"model_type": file.architecture}
    embedding = tensors.get("token_embd.weight")
    config["vocab_size"] = embedding.shape[0] if embedding else None
    details = {"name": file.find("general.name")}
    return _found(path, "GGUF file", tensors, config=config, details=details, files=[path])


def _starts_with(path: Path, magic: bytes) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


# The mark of each kind and its reader; a checkpoint comes before a Hugging Face folder, an adapter before both.
_KINDS: tuple[tuple[Callable[[Path], bool], Callable[[Path], Found]], ...] = (
    (lambda path: _starts_with(path, b"GGUF"), _gguf),
    (lambda path: path.is_file() and path.suffix == ".safetensors", _safetensors_file),
    (lambda path: (path / ADAPTER_CONFIG).is_file(), _adapter),
    (lambda path: (path / OWN_CONFIG).is_file(), _own_adapter),
    (lambda path: (path / ".metadata").is_file() or (path / "metadata.json").is_file(), _megatron),
    (lambda path: (path / "latest_checkpointed_iteration.txt").is_file(), _megatron),
    (lambda path: (path / "config.json").is_file(), _hugging_face),
)


# --- what a person sees -----------------------------------------------------------------------------------------------


def print_found(found: Found) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"[bold]{escape(found.path)}[/bold]: {found.kind}", soft_wrap=True)
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    active = "" if found.active == found.parameters else f", {_count(found.active)} active a token"
    tied = {True: "tied", False: "not tied", None: "not known"}[found.tied]
    rows = {
        "family": found.family,
        "parameters": f"{_count(found.parameters)} ({found.parameters:,}){active}",
        "size": f"{_bytes(found.bytes)} in {len(found.files)} file{'' if len(found.files) == 1 else 's'}",
        "embeddings": tied,
        **found.shape,
        **found.details,
    }
    for what, value in rows.items():
        facts.add_row(what, escape(f"{value:,}" if type(value) is int else str(value)))
    console.print(facts)
    for title, sizes in (("part", found.parts), ("dtype", found.dtypes)):
        table = Table(title, box=box.SIMPLE_HEAD)
        for column in ("tensors", "parameters", "bytes", "share"):
            table.add_column(column, justify="right")
        for name, size in sizes.items():
            share = f"{size.bytes / max(found.bytes, 1):.1%}"
            table.add_row(name, f"{size.tensors:,}", _count(size.parameters), _bytes(size.bytes), share)
        console.print(table)


def _count(number: int) -> str:
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return str(number)


def _bytes(number: int) -> str:
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number} B"
