"""Gemma 2 and 3: the published configurations, their tensors' shapes both ways, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_tools.plan import megatron_specs, misfits
from mcore_swift.errors import InputError
from mcore_swift.models.build import ModelSource, read_source, transformer_config
from mcore_swift.models.keys import global_shapes, weight_rules
from mcore_swift.models.rope import rope_frequencies, rope_layer_types
from mcore_swift.parallel import resolve
from mcore_swift.recipe import ParallelSection
from mcore_swift.weights.safetensors_io import TensorSpec
from tests.distributed.harness import prepared

# From the public config.json files (of Gemma 3: its text_config, with the keys it was published with), and the numbers
# of parameters as published.
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "gemma-2-27b": (
        27_227_128_320,
        {
            "model_type": "gemma2",
            "hidden_size": 4608,
            "intermediate_size": 36864,
            "num_hidden_layers": 46,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "query_pre_attn_scalar": 144,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "vocab_size": 256000,
        },
    ),
    "gemma-3-27b": (
        27_009_346_304,
        {
            "model_type": "gemma3_text",
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_hidden_layers": 62,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "query_pre_attn_scalar": 168,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
            "vocab_size": 262208,
        },
    ),
}


def source_of(folder: Path, config: dict[str, Any]) -> ModelSource:
    (folder / "config.json").write_text(json.dumps(config))
    return read_source(folder)


@pytest.fixture(params=MODELS)
def published(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ModelSource, int]:
    prepared()  # before transformers' first use, as in a run
    parameters, config = MODELS[request.param]
    return source_of(tmp_path, config), parameters


def test_every_tensor_is_consumed_and_produced_both_ways(published: tuple[ModelSource, int]) -> None:
    from transformers import AutoModelForCausalLM

    source, parameters = published
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.config)
    specs = {name: TensorSpec("BF16", tuple(tensor.shape)) for name, tensor in model.named_parameters()}
    assert sum(spec.nbytes // 2 for spec in specs.values()) == parameters
    assert not misfits(source, specs, megatron=False)
    fused = megatron_specs(weight_rules(source), specs, dtype=None)
    assert {key: spec.shape for key, spec in fused.items()} == global_shapes(source)
    assert not misfits(source, fused, megatron=True)
    assert sum(spec.nbytes for spec in fused.values()) == sum(spec.nbytes for spec in specs.values())


def test_values_arrive(published: tuple[ModelSource, int]) -> None:
    source, _ = published
    fields = source.family.read_config(source.config)
    third = source.family.name == "gemma3"
    pattern = ([1, 1, 1, 1, 1, 0] if third else [1, 0]) * source.config.num_hidden_layers
    assert fields["window_size"] == ((1023, 0) if third else (4095, 0))
    assert fields["window_attn_skip_freq"] == pattern[: source.config.num_hidden_layers]
    assert fields["softmax_scale"] == (168 if third else 144) ** -0.5
    assert fields["embedding_scale"] == source.config.hidden_size**0.5
    assert fields["final_logit_softcapping"] == (None if third else 30.0)
    assert fields.get("attn_logit_softcapping") == (None if third else 50.0)
    assert fields["layernorm_zero_centered_gamma"] and fields["post_layernorm"]
    assert fields.get("qk_layernorm", False) == third


def test_rotary_frequencies_by_layer_type_are_transformers_own(published: tuple[ModelSource, int]) -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RotaryEmbedding
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

    config = published[0].config
    if published[0].family.name == "gemma2":
        assert rope_layer_types(config) == (None,)
        assert torch.equal(rope_frequencies(config)[0], Gemma2RotaryEmbedding(config).inv_freq)
        return
    expected = Gemma3RotaryEmbedding(config)
    assert rope_layer_types(config) == ("full_attention", "sliding_attention")
    for kind in ("full_attention", "sliding_attention"):
        frequencies, factor = rope_frequencies(config, kind)
        assert torch.equal(frequencies, getattr(expected, f"{kind}_inv_freq"))
        assert factor == getattr(expected, f"{kind}_attention_scaling")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma-3-27b", {"model_type": "gemma3"}, r"model_type 'gemma3' is .* vision tower.*saved as gemma3_text"),
        ("gemma-2-27b", {"attention_bias": True}, r"attention_bias: True is not supported; allowed: False"),
        ("gemma-2-27b", {"hidden_activation": "gelu"}, r"hidden_activation: 'gelu' is not supported"),
        ("gemma-2-27b", {"sliding_window": None}, r"sliding_window: None is not supported"),
        ("gemma-3-27b", {"use_bidirectional_attention": True}, r"use_bidirectional_attention: True is not supported"),
        ("gemma-3-27b", {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping: 50.0 is not supported"),
    ],
)
def test_what_the_layers_do_not_implement(tmp_path: Path, name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        source = source_of(tmp_path, MODELS[name][1] | changes)
        source.family.read_config(source.config)


def test_layers_on_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is put into Transformer Engine's layers; Megatron's own ones stand for them, which need no GPU."""
    platform = prepared()
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from mcore_swift.models import layers, post_norm
    from mcore_swift.models.soft_cap import CappedAttention

    def block(config: Any, **_: Any) -> TransformerBlockSubmodules:
        return TransformerBlockSubmodules([get_gpt_layer_local_spec(normalization="LayerNorm")] * config.num_layers)

    monkeypatch.setattr(layers, "get_gpt_decoder_block_spec", block)
    plan = resolve(ParallelSection(), world_size=None)
    source = source_of(tmp_path, MODELS["gemma-2-27b"][1])
    config = transformer_config(source, plan, platform, dtype=torch.bfloat16)
    spec: Any = layers.decoder_spec(config, replace(platform, layers="transformer_engine"), chunk=None)
    assert len(spec.layer_specs) == 46
    for layer in spec.layer_specs:
        parts = layer.submodules
        assert parts.self_attention.submodules.core_attention is CappedAttention
        assert post_norm.NORM_KEYS.items() <= parts.sharded_state_dict_keys_map.items()
        for step in (parts.self_attn_bda, parts.mlp_bda):
            assert step.module is post_norm.NormDropoutAdd and step.params["norm"] is TENorm
