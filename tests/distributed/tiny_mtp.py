"""Multi-token prediction layers for the tiny models: transformers' own modules, which it reads but doesn't save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_BESIDE_THE_BLOCK = {"post_norm.weight": "shared_head.norm.weight"}


def tiny_mtp(model: Any) -> Any:
    """The layers that a tiny model's config speaks of; they share its embedding and head. Always the same weights."""
    from transformers.modeling_layers import MtpModel

    mtp = MtpModel(model, model.config.num_nextn_predict_layers)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, tensor in named_tensors(mtp):
            values = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            tensor.copy_(1 + 0.3 * values if "norm" in name else 0.15 * values)
    return mtp.to(model.dtype).eval()


def named_tensors(mtp: Any) -> list[tuple[str, torch.Tensor]]:
    return [*mtp.layers.named_parameters(), *mtp.layers.named_buffers()]


def mtp_tensors(
    model: Any, mtp: Any, value: Callable[[torch.Tensor], torch.Tensor | None] = lambda tensor: tensor.detach()
) -> dict[str, torch.Tensor]:
    """What `value` gives for the layers' tensors (None leaves one out), named as in DeepSeek-V3's folder."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in named_tensors(mtp):
        number, _, rest = name.partition(".")
        layer = f"model.layers.{model.config.num_hidden_layers + int(number)}."
        given, rest = value(tensor), rest.removeprefix("mtp_block.")
        if given is None:
            continue
        if rest.startswith("mlp.experts."):
            parts = ("gate_proj", "up_proj") if "gate_up" in rest else ("down_proj",)
            for expert, own in enumerate(given):
                for part, rows in zip(parts, own.chunk(len(parts)), strict=True):
                    found[f"{layer}mlp.experts.{expert}.{part}.weight"] = rows.contiguous()
        else:
            found[layer + _BESIDE_THE_BLOCK.get(rest, rest)] = given.clone()
    return found


def add_mtp(folder: Path, model: Any) -> None:
    """Adds the layers, and their copies of the embedding and the head, to a saved model's folder."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors |= mtp_tensors(model, tiny_mtp(model))
    first = model.config.num_hidden_layers
    for layer in range(first, first + model.config.num_nextn_predict_layers):
        tensors[f"model.layers.{layer}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"model.layers.{layer}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
