"""A tiny gpt-oss folder as the hub has them: experts in MXFP4, everything else in bf16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.distributed.tiny_models import tiny_model

SIZES: dict[str, Any] = {"intermediate_size": 96, "num_hidden_layers": 2}  # MXFP4 needs multiples of 32


def mxfp4_folder(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Writes the folder; returns it with what transformers decodes its tensors to, bf16."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model = tiny_model("gpt-oss", dtype=torch.bfloat16, **SIZES)
    generator = torch.Generator().manual_seed(3)
    stored, decoded = {}, {}
    for name, tensor in model.state_dict().items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = decoded[name] = tensor
            continue
        experts, columns, rows = tensor.shape
        shape = (experts, rows, columns // 32, 16)
        blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        scales = torch.randint(119, 125, shape[:-1], dtype=torch.uint8, generator=generator)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        decoded[name] = convert_moe_packed_tensors(blocks, scales)
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    config = model.config.to_dict() | {"quantization_config": {"quant_method": "mxfp4"}, "swiglu_limit": 7.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, decoded
