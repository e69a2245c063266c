"""Hugging Face tensors that pack all experts of a layer: MXFP4 is decoded, memory stays at an expert, cut files fit."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tools.convert import convert
from ckpt_tools.plan import misfits, plan_transfer
from ckpt_tools.source import HFSource, open_source
from mcore_swift.errors import InputError
from mcore_swift.models.build import read_source
from mcore_swift.models.keys import global_shapes, weight_rules
from mcore_swift.weights.mxfp4 import decode_mxfp4
from mcore_swift.weights.safetensors_io import TensorSpec
from tests.ckpt_tools.mxfp4_folder import mxfp4_folder
from tests.ckpt_tools.test_convert import bits, same, tensors
from tests.distributed.tiny_models import tiny_folder

Tensors = dict[str, torch.Tensor]
BLOCKS = "model.layers.1.mlp.experts.down_proj_blocks"


@pytest.mark.slow  # transformers' quantizers take long to import
def test_decoding_is_transformers_own() -> None:
    """Every byte with every scale but the last, which stands for NaN, and is an infinity there."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(256, -1, -1).contiguous()
    scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, 16).contiguous()
    found = decode_mxfp4(blocks, scales)
    expected = convert_moe_packed_tensors(blocks[None], scales[None])[0].T
    assert torch.equal(bits(found[:255]), bits(expected[:255]))
    assert found[255].isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, pytest.param(4, marks=pytest.mark.nightly)])
def test_mxfp4_goes_to_megatron_and_back_as_bf16(tmp_path: Path, workers: int) -> None:
    folder, decoded = mxfp4_folder(tmp_path / "hub")
    opened = open_source(folder)
    assert same({name: opened.read(name) for name in opened.specs}, decoded)
    convert(folder, tmp_path / "megatron", workers=workers)
    convert(tmp_path / "megatron", tmp_path / "back", workers=workers, max_shard_size=20_000)  # less than an expert
    assert same(tensors(tmp_path / "back"), decoded)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"


def test_files_smaller_than_an_expert(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "hf", "gpt-oss")
    convert(folder, tmp_path / "megatron", workers=1, max_shard_size=5_000, dtype="bf16")
    convert(tmp_path / "megatron", tmp_path / "back", workers=1)
    expected = {name: tensor.bfloat16() for name, tensor in tensors(folder).items()}
    assert same(tensors(tmp_path / "back"), expected)


@pytest.mark.slow
def test_an_expert_at_a_time_is_in_memory(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "num_hidden_layers": 1,
        "num_local_experts": 32,
        "intermediate_size": 640,
        "hidden_size": 256,
    }
    folder = tiny_folder(tmp_path / "hf", "gpt-oss", **changes)
    expert = 4 * 2 * 640 * 256  # bytes of its larger tensor
    for source, target in (("hf", "megatron"), ("megatron", "back")):
        tracemalloc.start()  # counts numpy's buffers, that files are read into
        convert(tmp_path / source, tmp_path / target, workers=1)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * expert, (source, peak)
    assert same(tensors(tmp_path / "back"), tensors(folder))


# --- the real shapes --------------------------------------------------------------------------------------------------

CONFIG = {  # gpt-oss-120b's
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "num_local_experts": 128,
    "quantization_config": {"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
PARAMETERS = 116_829_156_672  # that OpenAI's model card gives: 116.83 billion


def header_folder(folder: Path, shapes: dict[str, tuple[str, tuple[int, ...]]]) -> Path:
    """A folder whose safetensors file has a header and, sparse, as many zeros as that speaks of."""
    position, header = 0, {}
    for name, (dtype, shape) in shapes.items():
        size = TensorSpec(dtype, shape).nbytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    return folder


def transformers_shapes(config: object) -> dict[str, tuple[int, ...]]:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return {n: tuple(t.shape) for n, t in AutoModelForCausalLM.from_config(config).state_dict().items()}


@pytest.mark.parametrize(
    "stored", [pytest.param("mxfp4", marks=pytest.mark.slow), pytest.param("bf16", marks=pytest.mark.nightly)]
)
def test_the_real_120b_is_covered(tmp_path: Path, stored: str) -> None:
    raw = CONFIG if stored == "mxfp4" else {k: v for k, v in CONFIG.items() if k != "quantization_config"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    model = read_source(tmp_path)
    logical = transformers_shapes(model.config)
    assert sum(torch.Size(shape).numel() for shape in logical.values()) == PARAMETERS
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in logical.items():
        if stored == "mxfp4" and name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = shape
            shapes[f"{name}_blocks"] = "U8", (experts, rows, columns // 32, 16)
            shapes[f"{name}_scales"] = "U8", (experts, rows, columns // 32)
        else:
            shapes[name] = "BF16", shape
    source = open_source(header_folder(tmp_path, shapes))
    assert isinstance(source, HFSource)
    transfer, _ = plan_transfer(source, tmp_path / "out", dtype=None, max_shard_bytes=5 * 10**9)
    assert transfer.nbytes == 2 * PARAMETERS
    assert not misfits(model, source.specs, megatron=False)
    assert set(global_shapes(model)) == set(weight_rules(model)), "every tensor's shape is known"
    kinds = {key: TensorSpec("BF16", shape) for key, shape in global_shapes(model).items()}
    assert not misfits(model, kinds, megatron=True)


# --- bad folders ------------------------------------------------------------------------------------------------------


def without_scales(stored: Tensors) -> None:
    del stored[BLOCKS.replace("_blocks", "_scales")]


def wrong_blocks(stored: Tensors) -> None:
    stored[BLOCKS] = stored[BLOCKS][..., :8].contiguous()


def one_expert_less(stored: Tensors) -> None:
    for name in (BLOCKS, BLOCKS.replace("_blocks", "_scales")):
        stored[name] = stored[name][1:].contiguous()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without_scales, f"{BLOCKS} has no {BLOCKS.removesuffix('_blocks')}_scales with its scales"),
        (wrong_blocks, f"{BLOCKS} is U8 [8, 64, 3, 8] and its scales U8 [8, 64, 3]; needed are U8"),
        (one_expert_less, f"{BLOCKS.removesuffix('_blocks')} has shape [7, 96, 64], the config says [8, 96, 64]"),
    ],
)
def test_bad_mxfp4(tmp_path: Path, edit: Callable[[Tensors], None], message: str) -> None:
    folder, _ = mxfp4_folder(tmp_path / "hub")
    stored = load_file(folder / "model.safetensors")
    edit(stored)
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(InputError) as error:
        convert(folder, tmp_path / "megatron")
    assert message in str(error.value)
    assert str(folder) in str(error.value)
