"""FLOPs against the benchmark's formula and torch's own counter, and device names against the table of peaks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from mcore_swift.flops import (
    DecoderShape,
    attention_flops,
    matmul_flops_per_token,
    matmul_parameters,
    peak_flops,
    training_flops,
)
from tests.distributed.harness import in_fork

QWEN3_8B_OF_8_LAYERS = DecoderShape(
    num_layers=8,
    hidden_size=4096,
    ffn_hidden_size=12288,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=151936,
    gated=True,
)


def test_the_benchmark_formula():
    tokens = 8 * 2 * 4096
    flops = training_flops(QWEN3_8B_OF_8_LAYERS, tokens=tokens, sum_squared_lengths=16 * 4096**2)
    # 6 · (8 · (4096·48·128 + 32·128·4096 + 3·4096·12288) + 151936·4096) + 6 · 8 · 32·128 · 4096, a token
    assert flops == (6 * 2_165_833_728 + 805_306_368) * tokens == 904_417_033_322_496


def test_documents_attend_to_themselves_only():
    whole = attention_flops(QWEN3_8B_OF_8_LAYERS, sum_squared_lengths=4096**2)
    packed = attention_flops(QWEN3_8B_OF_8_LAYERS, sum_squared_lengths=4 * 1024**2)
    assert whole == 4 * packed


def test_forward_is_a_third():
    assert 3 * matmul_flops_per_token(QWEN3_8B_OF_8_LAYERS, backward=False) == matmul_flops_per_token(
        QWEN3_8B_OF_8_LAYERS
    )
    assert 3 * attention_flops(QWEN3_8B_OF_8_LAYERS, sum_squared_lengths=64, backward=False) == attention_flops(
        QWEN3_8B_OF_8_LAYERS, sum_squared_lengths=64
    )


def test_frozen_weights_take_two_products_of_three():
    trained, frozen = (
        training_flops(QWEN3_8B_OF_8_LAYERS, tokens=4096, sum_squared_lengths=0, frozen=frozen)
        for frozen in (False, True)
    )
    assert 3 * frozen == 2 * trained > 0


@pytest.mark.parametrize(("frozen", "products"), [(False, 3), (True, 2)])
def test_positions_without_a_label_skip_the_output_layer(frozen: bool, products: int):
    whole, some = (
        training_flops(QWEN3_8B_OF_8_LAYERS, tokens=4096, sum_squared_lengths=0, labels=labels, frozen=frozen)
        for labels in (None, 1000)
    )
    assert whole - some == products * 2 * 151936 * 4096 * (4096 - 1000)


@pytest.mark.parametrize(("family", "gated"), [("llama", True), ("gpt_neox", False)])
@in_fork
def test_the_counter_of_torch_agrees(family: str, gated: bool):
    """Linear layers exactly; attention exactly twice ours, since eager attention computes both halves of the scores."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    groups = {"num_key_value_heads": 2} if gated else {}
    config = AutoConfig.for_model(
        family,
        num_hidden_layers=3,
        hidden_size=64,
        intermediate_size=112,
        num_attention_heads=4,
        vocab_size=80,
        **groups,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    shape = DecoderShape(
        num_layers=3,
        hidden_size=64,
        ffn_hidden_size=112,
        num_attention_heads=4,
        num_query_groups=2 if gated else 4,
        kv_channels=16,
        vocab_size=80,
        gated=gated,
    )
    rows, length = 2, 24
    tokens = torch.randint(0, 80, (rows, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    counts = counter.get_flop_counts()
    rotary = sum(sum(ops.values()) for module, ops in counts.items() if module.endswith("rotary_emb"))
    total = counts["Global"]
    linear = total.pop(torch.ops.aten.mm, 0) + total.pop(torch.ops.aten.addmm, 0)
    assert linear == matmul_flops_per_token(shape) * rows * length
    assert sum(total.values()) - rotary == 2 * attention_flops(shape, sum_squared_lengths=rows * length**2)


# Of the models' own papers and cards: active parameters of a token.
ACTIVE = {
    "mixtral": (12.9e9, {"num_local_experts": 8, "num_experts_per_tok": 2}),  # Mixtral 8x7B: transformers' defaults
    "qwen3_moe": (  # Qwen3-30B-A3B
        3.3e9,
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
        },
    ),
    "qwen2_moe": (2.7e9, {}),  # Qwen1.5-MoE-A2.7B: transformers' defaults
    "deepseek_v3": (37e9, {}),  # transformers' defaults
    "glm4_moe": (12e9, {"head_dim": 128}),  # GLM-4.5-Air
}


@pytest.mark.parametrize("family", ACTIVE)
def test_active_parameters_as_published(family: str):
    from transformers import AutoConfig

    from mcore_swift.models.keys import rule_config
    from mcore_swift.models.registry import FAMILIES
    from mcore_swift.models.sizes import decoder_shape

    published, sizes = ACTIVE[family]
    config = AutoConfig.for_model(family, **sizes)
    source = SimpleNamespace(family=FAMILIES[family], config=config)
    shape = decoder_shape(rule_config(source), vocab_size=config.vocab_size)  # type: ignore[arg-type]
    vocabulary = config.vocab_size * config.hidden_size  # cards count it twice, once, or not at all
    assert matmul_parameters(shape) - vocabulary <= 1.03 * published
    assert matmul_parameters(shape) + vocabulary >= 0.97 * published


@pytest.mark.parametrize("variant", ["qwen3-moe", "mixtral", "qwen2-moe", "glm4-moe", "deepseek-v2", "deepseek-v3"])
@in_fork
def test_the_counter_of_torch_agrees_on_experts(tmp_path: Path, variant: str):
    """Each token alone: attention's core is nearly nothing."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from mcore_swift.models.build import read_source
    from mcore_swift.models.keys import rule_config
    from mcore_swift.models.sizes import decoder_shape
    from tests.distributed.tiny_models import tiny_folder, tiny_model

    model = tiny_model(variant)
    model.set_experts_implementation("eager")
    source = read_source(tiny_folder(tmp_path / variant, variant))
    shape = decoder_shape(rule_config(source), vocab_size=source.vocab_size)
    tokens = torch.arange(4)[:, None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=None, use_cache=False).logits.sum().backward()
    total = counter.get_flop_counts()["Global"]
    linear = total.get(torch.ops.aten.mm, 0) + total.get(torch.ops.aten.addmm, 0)
    assert linear == matmul_flops_per_token(shape) * 4


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 80GB HBM3", "fp8", 1979.0),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "bf16", 989.5),
        ("NVIDIA H20-3e", "fp8", 296.0),
        ("NVIDIA H800", "bf16", 989.5),
        ("NVIDIA GH200 480GB", "bf16", 989.5),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("A100-SXM4-40GB", "bf16", 312.0),
        ("NVIDIA A100 80GB PCIe", "bf16", 312.0),
        ("NVIDIA A100-PCIE-40GB", "bf16", 312.0),
        ("NVIDIA A800-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA B200", "fp8", 4500.0),
        ("NVIDIA GB200", "bf16", 2500.0),
        ("NVIDIA B300 SXM6 AC", "bf16", 2250.0),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA GeForce RTX 4090", "fp8", 330.3),
        ("NVIDIA RTX 6000 Ada Generation", "bf16", 364.2),
    ],
)
def test_known_devices(name: str, dtype: str, tflops: float):
    assert peak_flops(name, dtype) == tflops * 1e12


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("NVIDIA A100-SXM4-80GB", "fp8"),  # has no FP8
        ("NVIDIA H100 80GB HBM3", "fp32"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16"),
        ("NVIDIA GeForce RTX 4090 D", "bf16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
        ("Tesla V100-SXM2-32GB", "bf16"),
        ("cpu", "bf16"),
        ("", "bf16"),
    ],
)
def test_unknown_devices(name: str, dtype: str):
    assert peak_flops(name, dtype) is None
