"""Targets in Hugging Face names; what matches nothing, and what a PEFT folder may not ask for, is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mcore_swift.errors import InputError
from mcore_swift.models.build import read_source
from mcore_swift.models.keys import weight_rules
from mcore_swift.peft.targets import select
from tests.distributed.tiny_models import tiny_config


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Any:
    def of(variant: str) -> Any:
        folder = tmp_path_factory.mktemp(variant)
        tiny_config(variant).save_pretrained(folder)
        return weight_rules(read_source(folder))

    return {variant: of(variant) for variant in ("qwen3", "qwen3-moe", "deepseek-v3", "gpt-oss")}


@pytest.mark.parametrize(
    ("variant", "targets", "count"),
    [
        ("qwen3", ["q_proj"], 4),
        ("qwen3", ["attention"], 16),
        ("qwen3", ["mlp", "up_proj"], 12),
        ("qwen3", ["all-linear"], 28),
        ("qwen3", ["model.layers.[01].*.q_proj", "model.layers.3.mlp.*"], 5),
        ("qwen3-moe", ["experts"], 3 * 8 * 3),  # layer 1 is dense
        ("qwen3-moe", ["mlp"], 3),
        ("qwen3-moe", ["gate_proj"], 3 * 8 + 1),
        ("qwen3-moe", ["model.layers.0.mlp.experts.5.*"], 3),
        ("qwen3-moe", ["gate_up_proj", "model.layers.2.mlp.experts.down_proj"], 3 * 16 + 8),  # transformers' tensors
    ],
)
def test_select(rules: Any, variant: str, targets: list[str], count: int) -> None:
    found = select(targets, rules[variant])
    assert len(found) == len(set(found)) == count


@pytest.mark.parametrize(
    ("variant", "target", "message"),
    [
        ("qwen3", "qproj", r"'qproj' matches no linear layer .*q_proj"),
        ("qwen3", "linear_qkv", r"'linear_qkv' matches no linear layer .*allowed: attention, mlp, experts, all-linear"),
        ("qwen3", "experts", r"'experts' matches no linear layer"),
        ("qwen3", "model.layers.7.*", r"'model.layers.7.\*' matches no linear layer"),
        ("qwen3", "lm_head", r"'lm_head' matches no linear layer"),
        ("qwen3-moe", "gate", r"'gate' matches no linear layer"),
        ("deepseek-v3", "model.layers.4.*", r"matches no linear layer"),  # multi-token prediction
        ("gpt-oss", "experts", r"'experts' matches no linear layer"),  # one tensor of all experts
    ],
)
def test_a_target_that_matches_nothing(rules: Any, variant: str, target: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        select(["attention", target], rules[variant])


GOOD = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


def folder_with(folder: Path, config: dict[str, Any]) -> Path:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.ones(4, 8)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_settings_of_a_folder(tmp_path: Path) -> None:
    from mcore_swift.peft.peft_folder import read_settings

    settings, modules = read_settings(folder_with(tmp_path, GOOD | {"use_rslora": True, "lora_dropout": 0.1}))
    assert (settings.rank, settings.alpha, settings.dropout, settings.scaling) == (4, 8, 0.1, 4.0)
    assert modules == ["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, r"peft_type: 'IA3' is not supported; allowed: \['LORA'\]"),
        ({"bias": "all"}, r"bias: 'all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save: 'lm_head' has no tensor in adapter_model\.safetensors"),
        ({"rank_pattern": {"q_proj": 8}}, r"rank_pattern: .* is not supported"),
        ({"alpha_pattern": {"q_proj": 9}}, r"alpha_pattern: .* is not supported"),
        (
            {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 2}},
            r"alpha_pattern: .* scaling 0\.5; allowed: r",
        ),
        ({"target_parameters": "experts.down_proj"}, r"target_parameters: found .*; it must be a list"),
        ({"fan_in_fan_out": True}, r"fan_in_fan_out: True is not supported; allowed: it is left out or off"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights: 'pissa' is not supported"),
        ({"a_new_feature": True}, r"a_new_feature: True is not supported; allowed: it is left out or off"),
        ({"r": 0}, r"r: found 0; it must be a whole number, at least 1"),
        ({"lora_bias": True}, r"lora_bias: True is not supported"),
    ],
)
def test_what_a_folder_may_not_ask_for(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    from mcore_swift.peft.peft_folder import read_settings

    with pytest.raises(InputError, match=rf"adapter_config\.json: {message}"):
        read_settings(folder_with(tmp_path, GOOD | changes))


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    from mcore_swift.peft.peft_folder import read_settings

    with pytest.raises(InputError, match=r"is no PEFT folder; adapter_config\.json and adapter_model\.safetensors"):
        read_settings(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        read_settings(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    with pytest.raises(InputError, match="lora_alpha: found None; it must be a number"):
        read_settings(tmp_path)


def test_a_rank_beyond_the_layer_is_refused() -> None:
    from types import SimpleNamespace

    from mcore_swift.peft.adapters import _check_site

    part = SimpleNamespace(name="model.layers.0.mlp.experts.5.up_proj", rows=8)
    site: Any = SimpleNamespace(module=SimpleNamespace(), parts=(part,), in_features=8)
    with pytest.raises(InputError, match=r"adapter\.rank: 9 is larger than .*\[8, 8\]; allowed: 1 to 8"):
        _check_site(9, site)
