"""Reads a GGUF file into a Hugging Face folder: the way to real trained weights where there is only a llama.cpp file.

Everything comes from the file's own metadata. Quantized tensors are dequantized exactly (float32) and rounded once to
the dtype asked for. What this reader doesn't know it refuses; a folder appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_tools.gguf_tokenizer import write_tokenizer
from mcore_swift.errors import InputError, nearest

if TYPE_CHECKING:
    import numpy as np
    import torch

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Architecture:
    """How one `general.architecture` differs from the others (the file's keys start with its name)."""

    hf_class: str
    rope_permuted: bool = False  # llama.cpp reorders the rows of q and k from rotate-half to interleaved pairs
    qkv_bias: bool = False
    qk_norm: bool = False


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", rope_permuted=True),
    "qwen2": Architecture("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Architecture("Qwen3ForCausalLM", qk_norm=True),
}


class GGUFFile:
    """An open GGUF file: metadata by key, tensors by name. Raises InputError when it isn't a whole GGUF file."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        if not path.is_file():
            raise InputError(f"{path}: no such file (expected a GGUF file)")
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise InputError(f"{path}: not a GGUF file (it starts with {magic!r}, a GGUF file with b'GGUF')")
        self.path = path
        try:
            self._reader = GGUFReader(path)
        except (ValueError, IndexError, OverflowError, KeyError) as error:
            # The reader indexes into a memory map: past its end it fails with whatever numpy says there.
            raise InputError(f"{path}: truncated or damaged GGUF file ({error})") from error
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.architecture = self.get("general.architecture")

    def get(self, key: str) -> Any:
        """The value of a metadata key; `{arch}` in it stands for the architecture's name."""
        value = self.find(key)
        if value is None:
            raise InputError(f"{self.path}: metadata key {key.format(arch=self._arch_name())!r} is missing")
        return value

    def find(self, key: str, default: Any = None) -> Any:
        """The same, or `default` where the file has no such key."""
        field = self._reader.fields.get(key.format(arch=self._arch_name()))
        return default if field is None else field.contents()

    def _arch_name(self) -> str:
        return getattr(self, "architecture", "?")

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """One tensor, dequantized: float32 [shape], in Hugging Face's (row-major, output first) order."""
        import numpy as np
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        found = tuple(int(size) for size in reversed(tensor.shape))
        if found != shape:
            raise InputError(f"{self.path}: tensor {name!r} has shape {list(found)}; the metadata imply {list(shape)}")
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise InputError(f"{self.path}: tensor {name!r} has type {kind}, which can't be read") from error
        values = np.ascontiguousarray(values, dtype=np.float32).reshape(shape)
        if not np.isfinite(values).all():
            raise InputError(f"{self.path}: tensor {name!r} has NaN or infinite values")
        return values


def convert_gguf(src: Path, dst: Path, *, dtype: str = "bf16") -> None:
    """Writes the Hugging Face folder `dst` (config, weights, generation config, tokenizer, chat template) from `src`.

    The folder is written beside `dst` and renamed, so it is never there half-written. Raises InputError when `src`
    isn't a whole GGUF file of a known architecture and tokenizer, or when `dst` exists.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is unknown; allowed: {', '.join(DTYPES)}.{nearest(dtype, list(DTYPES))}")
    if dst.exists():
        raise InputError(f"{dst}: exists already; name a folder that doesn't")
    file = GGUFFile(src)
    config = hf_config(file, dtype=dtype)
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{dst.name}.", dir=dst.parent))
    except OSError as error:
        raise InputError(f"{dst}: can't be written ({error})") from error
    try:
        partial.chmod(0o755)  # mkdtemp's folder is private
        write_tokenizer(file, partial)
        _write_json(partial / "config.json", config)
        _write_json(partial / "generation_config.json", _generation_config(config))
        _write_weights(file, config, partial / "model.safetensors", dtype=dtype)
        os.rename(partial, dst)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def hf_config(file: GGUFFile, *, dtype: str) -> dict[str, Any]:
    """The `config.json` that the metadata describe."""
    if file.architecture not in ARCHITECTURES:
        raise InputError(
            f"{file.path}: architecture {file.architecture!r} is not supported; allowed: {', '.join(ARCHITECTURES)}"
        )
    if file.find("{arch}.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in file.tensors:
        raise InputError(f"{file.path}: RoPE scaling in a GGUF file is not supported")
    if file.find("{arch}.expert_count", 0):
        raise InputError(f"{file.path}: experts in a GGUF file are not supported")
    hidden_size, num_heads = file.get("{arch}.embedding_length"), file.get("{arch}.attention.head_count")
    head_dim = file.find("{arch}.attention.key_length", hidden_size // num_heads)
    if file.find("{arch}.rope.dimension_count", head_dim) != head_dim:
        raise InputError(f"{file.path}: partial rotary embeddings in a GGUF file are not supported")
    config = {
        "architectures": [ARCHITECTURES[file.architecture].hf_class],
        "model_type": file.architecture,
        "vocab_size": len(file.get("tokenizer.ggml.tokens")),
        "hidden_size": hidden_size,
        "intermediate_size": file.get("{arch}.feed_forward_length"),
        "num_hidden_layers": file.get("{arch}.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": file.find("{arch}.attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": file.get("{arch}.context_length"),
        "rms_norm_eps": _shortest(file.get("{arch}.attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(file.find("{arch}.rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": DTYPES[dtype],
    }
    if file.architecture == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{name}_token_id"] = file.find(f"tokenizer.ggml.{key}_token_id")
    return config


def tensor_table(config: dict[str, Any], arch: Architecture) -> Iterator[tuple[str, str, tuple[int, ...], int | None]]:
    """Rows (GGUF name, Hugging Face name, shape, heads whose rows are permuted or None) for every tensor."""
    hidden, ffn, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    yield "token_embd.weight", "model.embed_tokens.weight", (config["vocab_size"], hidden), None
    for i in range(config["num_hidden_layers"]):
        gg, hf = f"blk.{i}.", f"model.layers.{i}."
        yield gg + "attn_norm.weight", hf + "input_layernorm.weight", (hidden,), None
        for part, num_heads, permuted in (
            ("q", heads, arch.rope_permuted),
            ("k", kv_heads, arch.rope_permuted),
            ("v", kv_heads, False),
        ):
            rows, permuted_heads = num_heads * head_dim, num_heads if permuted else None
            yield gg + f"attn_{part}.weight", hf + f"self_attn.{part}_proj.weight", (rows, hidden), permuted_heads
            if arch.qkv_bias:
                yield gg + f"attn_{part}.bias", hf + f"self_attn.{part}_proj.bias", (rows,), permuted_heads
            if arch.qk_norm and part != "v":
                yield gg + f"attn_{part}_norm.weight", hf + f"self_attn.{part}_norm.weight", (head_dim,), None
        yield gg + "attn_output.weight", hf + "self_attn.o_proj.weight", (hidden, heads * head_dim), None
        yield gg + "ffn_norm.weight", hf + "post_attention_layernorm.weight", (hidden,), None
        yield gg + "ffn_gate.weight", hf + "mlp.gate_proj.weight", (ffn, hidden), None
        yield gg + "ffn_up.weight", hf + "mlp.up_proj.weight", (ffn, hidden), None
        yield gg + "ffn_down.weight", hf + "mlp.down_proj.weight", (hidden, ffn), None
    yield "output_norm.weight", "model.norm.weight", (hidden,), None
    if not config["tie_word_embeddings"]:
        yield "output.weight", "lm_head.weight", (config["vocab_size"], hidden), None


def undo_rope_permutation(values: np.ndarray, num_heads: int) -> np.ndarray:
    """From llama.cpp's interleaved pairs to rotate-half: within each head, row 2i+j goes to row j*head_dim/2 + i.

    values: [num_heads * head_dim, …]. The inverse of `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    half = values.shape[0] // num_heads // 2
    return values.reshape(num_heads, half, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _write_weights(file: GGUFFile, config: dict[str, Any], path: Path, *, dtype: str) -> None:
    import torch
    from safetensors.torch import save_file

    rows = list(tensor_table(config, ARCHITECTURES[file.architecture]))
    _check_names(file, {row[0] for row in rows})
    tensors: dict[str, torch.Tensor] = {}
    for name, hf_name, shape, permuted_heads in rows:
        values = file.read(name, shape)
        if permuted_heads is not None:
            values = undo_rope_permutation(values, permuted_heads)
        # torch.tensor copies: a float32 tensor must not stay a view of the (read-only) file.
        tensors[hf_name] = torch.tensor(values).to(getattr(torch, DTYPES[dtype]))
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes it private


def _check_names(file: GGUFFile, expected: set[str]) -> None:
    found = file.tensors.keys()
    for problem, names in (("lacks", expected - found), ("has unexpected", found - expected)):
        if names:
            shown = ", ".join(sorted(names)[:5])
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise InputError(f"{file.path}: a {file.architecture} file, but it {problem} tensors: {shown}{more}")


def _generation_config(config: dict[str, Any]) -> dict[str, Any]:
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"_from_model_config": True} | {key: config[key] for key in keys}


def _shortest(value: float) -> float:
    """The decimal that a float32 was written from: 9.999999747378752e-06 is 1e-05 in float32."""
    import numpy as np

    return float(str(np.float32(value)))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
