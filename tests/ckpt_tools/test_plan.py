"""Coverage of the real shapes of large models, both ways, from headers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckpt_tools.plan import megatron_specs, misfits
from ckpt_tools.source import part_segments
from ckpt_tools.torch_dist import plan_checkpoint
from mcore_swift.models.build import read_source
from mcore_swift.models.keys import global_shapes, weight_rules
from mcore_swift.weights.safetensors_io import TensorSpec

# From the models' public config.json files; `parameters` as published (the sum over the safetensors' headers).
MODELS: dict[str, dict[str, Any]] = {
    "Llama-3.1-405B": {
        "model_type": "llama",
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "parameters": 405_853_388_800,
    },
    "Qwen2.5-72B": {
        "model_type": "qwen2",
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "rope_theta": 1000000.0,
        "parameters": 72_706_203_648,
    },
    "Qwen3-32B": {
        "model_type": "qwen3",
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "rope_theta": 1000000.0,
        "parameters": 32_762_123_264,
    },
    "Mistral-Large-2407": {
        "model_type": "mistral",
        "hidden_size": 12288,
        "intermediate_size": 28672,
        "num_hidden_layers": 88,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 32768,
        "sliding_window": None,
        "rope_theta": 1000000.0,
        "parameters": 122_610_069_504,
    },
}


def model_tensors(c: dict[str, Any]) -> dict[str, TensorSpec]:
    """What the published folder holds, written down without the project's rules."""
    hidden, ffn, heads, groups = (
        c[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    head = c.get("head_dim", hidden // heads)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], hidden)}
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, rows in (("q", heads * head), ("k", groups * head), ("v", groups * head)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, hidden)
            if c["model_type"] == "qwen2":
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
            if c["model_type"] == "qwen3" and name != "v":
                shapes[f"{layer}self_attn.{name}_norm.weight"] = (head,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (hidden, heads * head)
        shapes[f"{layer}mlp.gate_proj.weight"] = shapes[f"{layer}mlp.up_proj.weight"] = (ffn, hidden)
        shapes[f"{layer}mlp.down_proj.weight"] = (hidden, ffn)
        shapes[f"{layer}input_layernorm.weight"] = shapes[f"{layer}post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (c["vocab_size"], hidden)
    return {name: TensorSpec("BF16", shape) for name, shape in shapes.items()}


@pytest.fixture(params=MODELS)
def large(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, dict[str, TensorSpec]]:
    config = MODELS[request.param] | {"tie_word_embeddings": False, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
    parameters = config.pop("parameters")
    (tmp_path / "config.json").write_text(json.dumps(config))
    specs = model_tensors(config)
    assert sum(spec.nbytes // 2 for spec in specs.values()) == parameters
    return read_source(tmp_path), specs


def test_every_tensor_is_consumed_and_produced_both_ways(large: tuple[Any, dict[str, TensorSpec]]) -> None:
    source, specs = large
    rules = weight_rules(source)
    assert not misfits(source, specs, megatron=False)
    fused = megatron_specs(rules, specs, dtype=None)
    assert {key: spec.shape for key, spec in fused.items()} == global_shapes(source)
    assert not misfits(source, fused, megatron=True)
    assert sum(spec.nbytes for spec in fused.values()) == sum(spec.nbytes for spec in specs.values())
    layout = plan_checkpoint(fused, Path("there"))
    assert layout.tensors.keys() == fused.keys()
    for key, stored in layout.tensors.items():
        stored.check(key)
    assert max(layout.sizes.values()) <= 5 * 10**9


def test_rows_go_there_and_back(large: tuple[Any, dict[str, TensorSpec]]) -> None:
    """Each row of the last layer's fused tensors: where it comes from, and that the way back finds it again."""
    source, specs = large
    last = f".{source.config.num_hidden_layers - 1}."
    for key, rule in weight_rules(source).items():
        if last not in key or not rule.rows:
            continue
        total = sum(rule.rows)
        origin = np.full((total, 2), -1)
        for start in range(0, total, 1000):  # pieces that don't end where groups do
            for part, first, stop, target in rule.segments(start, min(start + 1000, total), rule.rows):
                origin[start + target : start + target + stop - first] = [(part, row) for row in range(first, stop)]
        assert (origin >= 0).all() and len(np.unique(origin, axis=0)) == total
        for part, name in enumerate(rule.hf):
            rows = specs[name].shape[0]
            back = np.full(rows, -1)
            for start in range(0, rows, 777):
                for first, stop, target in part_segments(rule, part, start, min(start + 777, rows)):
                    back[start + target : start + target + stop - first] = range(first, stop)
            assert (origin[back, 0] == part).all() and (origin[back, 1] == np.arange(rows)).all()


def test_misfits_are_listed_whole(large: tuple[Any, dict[str, TensorSpec]]) -> None:
    source, specs = large
    layers = source.config.num_hidden_layers
    wrong = {name: spec for name, spec in specs.items() if not name.endswith("down_proj.weight")}
    wrong |= {f"extra.{i}": TensorSpec("BF16", (1,)) for i in range(30)}
    wrong["model.norm.weight"] = TensorSpec("I64", (7,))
    found = misfits(source, wrong, megatron=False)
    assert (len(found.missing), len(found.unexpected), len(found.wrong)) == (layers, 30, 2)
    assert all(name in found.text() for name in (*found.missing, *found.unexpected, *found.wrong))
