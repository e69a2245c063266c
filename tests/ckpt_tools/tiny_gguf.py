"""Writes GGUF files from tiny transformers models, with llama.cpp's tensor names (the gguf library's own table)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

# Sizes chosen so that no two that could be confused are equal; head_dim is not hidden_size / heads.
TINY = {
    "vocab_size": 272,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
CHAT_TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}<e>{% endfor %}"


def _byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


BYTES = _byte_alphabet()
# The last two join a digit to something: a tokenizer that splits digits never uses them.
MERGES = [("a", "t"), ("Ġ", "a"), ("1", "2"), ("Ġ", "1")]


def tiny_model(model_type: str, **config: Any) -> Any:
    """A float32 transformers model with random weights, norms and biases too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tied = config.pop("tie_word_embeddings", True)
    hf = AutoConfig.for_model(
        model_type, **TINY, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, tie_word_embeddings=tied
    )
    model = AutoModelForCausalLM.from_config(hf, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def write_gguf(
    path: Path, model: Any, edit: Callable[[dict[str, Any], dict[str, np.ndarray]], None] | None = None
) -> None:
    """Writes `model` in float32. `edit(fields, tensors)` may change metadata and tensors before they are written."""
    fields, tensors = _fields(model.config), _tensors(model)
    if edit is not None:
        edit(fields, tensors)
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture"))
    for key, value in fields.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _fields(config: Any) -> dict[str, Any]:
    arch = config.model_type
    kind = gguf.TokenType
    merged = [left + right for left, right in MERGES]
    tokens = ["<s>", "<e>", *BYTES, *merged, "<u>"]
    types = [kind.CONTROL, kind.CONTROL, *[kind.NORMAL] * len(BYTES + merged), kind.USER_DEFINED]
    padding = config.vocab_size - len(tokens)
    return {
        "general.architecture": arch,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.rope.freq_base": config.rope_parameters["rope_theta"],
        f"{arch}.rope.dimension_count": config.head_dim,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*tokens, *(f"[PAD{i}]" for i in range(padding))],
        "tokenizer.ggml.token_type": [int(t) for t in [*types, *[kind.UNUSED] * padding]],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in MERGES],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _tensors(model: Any) -> dict[str, np.ndarray]:
    config = model.config
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[config.model_type]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensors = {}
    for hf_name, tensor in model.state_dict().items():
        if hf_name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        part = hf_name.split(".")[-2]
        if config.model_type == "llama" and part in heads:
            values = _llama_cpp_permute(values, heads[part])
        tensors[names.get_name(hf_name, try_suffixes=(".weight", ".bias"))] = values
    return tensors


def _llama_cpp_permute(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Row by row, as llama.cpp's RoPE wants them: a head's pair (j, j + head_dim/2) side by side."""
    head_dim = values.shape[0] // num_heads
    order = []
    for head in range(num_heads):
        for j in range(head_dim // 2):
            order += [head * head_dim + j, head * head_dim + j + head_dim // 2]
    return np.ascontiguousarray(values[order])
