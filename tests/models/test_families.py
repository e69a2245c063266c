"""The families' tables: config rows in both directions, and what is refused with which words."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_swift.errors import InputError
from mcore_swift.models.build import check_layout, padded_vocab_size, read_source, tensor_rules, transformer_config
from mcore_swift.models.context_rules import context_fields
from mcore_swift.models.registry import FAMILIES, family_of
from mcore_swift.models.rope import rope_frequencies
from mcore_swift.parallel import resolve
from mcore_swift.platform import cuda
from mcore_swift.recipe import ParallelSection
from mcore_swift.weights.safetensors_io import SafetensorsFolder
from tests.distributed.harness import prepared
from tests.distributed.tiny_models import VARIANTS, tiny_config, tiny_folder, tiny_model


def write_config(folder: Path, variant: str = "llama", **changes: Any) -> Path:
    """A folder with config.json only; a change to None removes the key."""
    raw = tiny_config(variant).to_dict() | changes
    raw = {key: value for key, value in raw.items() if not (key in changes and value is None)}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def megatron_config(folder: Path, **layout: Any) -> Any:
    import torch

    source = read_source(folder)
    plan = resolve(ParallelSection(**layout), world_size=None)
    check_layout(source, plan)
    return transformer_config(source, plan, prepared(), dtype=torch.float32)


# --- config rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_reading_what_was_written_gives_the_same(tmp_path: Path, variant: str) -> None:
    from transformers import CONFIG_MAPPING

    source = read_source(write_config(tmp_path, variant))
    fields = source.family.read_config(source.config)
    written = source.family.write_config(megatron_config(tmp_path))
    assert written["model_type"] == VARIANTS[variant][0]
    again = CONFIG_MAPPING[source.config.model_type].from_dict(json.loads(json.dumps(written)))
    assert source.family.read_config(again) == fields
    assert source.family.write_config(megatron_config(tmp_path)) == written


def test_values_arrive(tmp_path: Path) -> None:
    fields = read_fields(write_config(tmp_path, "qwen2-window", rms_norm_eps=3e-6, attention_dropout=0.25))
    assert fields["num_layers"] == 4
    assert fields["hidden_size"] == 64
    assert fields["ffn_hidden_size"] == 96
    assert fields["num_attention_heads"] == 4
    assert fields["num_query_groups"] == 2
    assert fields["kv_channels"] == 16
    assert fields["layernorm_epsilon"] == 3e-6
    assert fields["attention_dropout"] == 0.25
    assert fields["add_qkv_bias"] is True
    assert fields["window_size"] == (4, 0)  # Hugging Face's 5 counts the token itself
    assert fields["window_attn_skip_freq"] == [0, 0, 1, 1]


def read_fields(folder: Path) -> dict[str, Any]:
    source = read_source(folder)
    return source.family.read_config(source.config)


def test_defaults_of_what_a_config_leaves_out(tmp_path: Path) -> None:
    fields = read_fields(write_config(tmp_path, num_key_value_heads=None, head_dim=None, attention_dropout=None))
    assert fields["num_query_groups"] == 4
    assert fields["kv_channels"] == 16
    assert fields["attention_dropout"] == 0.0
    assert "window_size" not in fields


@pytest.mark.parametrize("variant", VARIANTS)
def test_rules_name_the_models_own_tensors(tmp_path: Path, variant: str) -> None:
    """Every tensor that transformers saves has exactly one rule, and no rule is left over."""
    source = read_source(tiny_folder(tmp_path / "model", variant))
    rules = tensor_rules(source, megatron_config(tmp_path / "model"))
    named = [name for rule in rules.values() for _, name in rule.parts()]
    assert sorted(named) == sorted(SafetensorsFolder(tmp_path / "model").entries)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "rope" in v or v == "qwen3"])
def test_rotary_frequencies_are_transformers_own(variant: str) -> None:
    import torch

    rotary = tiny_model(variant).model.rotary_emb
    frequencies, factor = rope_frequencies(tiny_config(variant))
    assert torch.equal(frequencies, rotary.inv_freq)
    assert factor == rotary.attention_scaling


@pytest.mark.parametrize(
    ("vocab_size", "tp", "padded"), [(101, 1, 101), (101, 2, 102), (102, 2, 102), (49152, 9, 49158)]
)
def test_padded_vocab_size(vocab_size: int, tp: int, padded: int) -> None:
    assert padded_vocab_size(vocab_size, tp) == padded


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("written", "meant"), [("qwen2_5", "qwen2"), ("Llama", "llama"), ("mistral3", "mistral")])
def test_unknown_family_names_the_nearest(tmp_path: Path, written: str, meant: str) -> None:
    write_config(tmp_path, model_type=written)
    with pytest.raises(
        InputError, match=f"model_type '{written}' is not a known family.*Did you mean '{meant}'"
    ) as error:
        read_source(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)
    assert all(name in str(error.value) for name in FAMILIES)


def test_config_without_a_family(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"config\.json: model_type 'None' is not a known family"):
        read_source(tmp_path)


@pytest.mark.parametrize("text", ["[1]", '"llama"', "{,}", "\x00"])
def test_malformed_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json: not "):
        read_source(tmp_path)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no config\.json; a Hugging Face model folder is needed"):
        read_source(tmp_path)


def test_package_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.50.3")
    with pytest.raises(
        InputError, match=r"x/config\.json: qwen3 needs transformers ≥ 4\.51, but 4\.50\.3 is installed"
    ):
        family_of("qwen3", source="x/config.json")
    assert family_of("llama", source="x/config.json") is FAMILIES["llama"]


@pytest.mark.parametrize(
    ("have", "enough"), [("4.51", True), ("4.51.0", True), ("4.51.0.dev0", True), ("5.17.0+cu", True), ("4.9.9", False)]
)
def test_versions_compare_as_numbers(monkeypatch: pytest.MonkeyPatch, have: str, enough: bool) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: have)
    if enough:
        family_of("qwen3", source="config.json")
    else:
        with pytest.raises(InputError, match=f"but {have} is installed"):
            family_of("qwen3", source="config.json")


UNSUPPORTED = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported; allowed: 'silu'"),
    (
        "llama",
        {"attention_bias": True},
        "attention_bias True with mlp_bias False is not supported; set both or neither",
    ),
    ("llama", {"mlp_bias": True}, "attention_bias False with mlp_bias True is not supported; set both or neither"),
    ("qwen3", {"attention_bias": True}, "attention_bias: True is not supported; allowed: False"),
]


@pytest.mark.parametrize(
    ("variant", "changes", "message"), UNSUPPORTED, ids=[f"{v}-{next(iter(c))}" for v, c, _ in UNSUPPORTED]
)
def test_what_the_layers_do_not_implement(tmp_path: Path, variant: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        read_fields(write_config(tmp_path, variant, **changes))
    assert message in str(error.value)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_frequencies_that_depend_on_the_length(kind: str) -> None:
    config = tiny_config("llama")
    config.rope_parameters = {"rope_type": kind, "rope_theta": 1000.0, "factor": 2.0}
    with pytest.raises(
        InputError, match=f"rope_type '{kind}' is not supported; allowed: default, linear, llama3, yarn"
    ):
        rope_frequencies(config)


LAYOUTS = [
    ("llama", {"tp": 3}, "parallel.tp: 3 does not divide the model's 4 attention heads", "allowed: 1, 2"),
    ("llama", {"tp": 4}, "parallel.tp: 4 does not divide the model's 2 key-value heads", "allowed: 1, 2"),
    ("llama-9-heads", {"tp": 2}, "parallel.tp: 2 does not divide the model's 9 attention heads", "allowed: 1, 3"),
    ("llama", {"pp": 8}, "parallel.pp: pp 8 × vpp 1 is more than the model's 4 layers", "lower one of them"),
    ("llama", {"pp": 4, "vpp": 2}, "parallel.pp: pp 4 × vpp 2 is more than the model's 4 layers", "lower one of them"),
    (
        "llama",
        {"pp": 3, "first_stage_layers": 3},
        "parallel.first_stage_layers, parallel.last_stage_layers: 1 of the model's 4 layers are left for 2 other",
        "lower or raise them",
    ),
    (
        "llama",
        {"pp": 2, "first_stage_layers": 1, "last_stage_layers": 2},
        "parallel.first_stage_layers, parallel.last_stage_layers: 1 of the model's 4 layers are left for 0 other",
        "lower or raise them",
    ),
    (
        "llama",
        {"pp": 2, "pipeline_layout": "Et*3|ttL"},
        "parallel.pipeline_layout: Ettt|ttL has other than the model's 4 layers",
        "write a t for each layer",
    ),
    (
        "llama",
        {"pp": 2, "pipeline_layout": "Et*3|tmL"},
        "parallel.pipeline_layout: Ettt|tmL has other than the model's 0 multi-token prediction layers",
        "write an m for each of them before the L",
    ),
    (
        "llama",
        {"pp": 8, "account_embedding": True, "account_loss": True},
        "parallel.pp: pp 8 × vpp 1 is more than the model's 4 layers",
        "lower one of them",
    ),
    (
        "llama",
        {"tp": 2, "cp": 2, "cp_comm_type": "a2a"},
        "parallel.cp_comm_type: an all-to-all gives each of its ranks whole heads: tp 2 x its ranks (all of cp 2, ",
        "use p2p or all_gather where the model can, or fewer ranks",
    ),
    (
        "qwen3",
        {"cp": 8, "cp_comm_type": "a2a+p2p", "hierarchical_cp": [4, 2]},
        "parallel.cp_comm_type: an all-to-all gives each of its ranks whole heads",
        "use p2p or all_gather where the model can, or fewer ranks",
    ),
    (
        "mistral-window",
        {"cp": 2, "cp_comm_type": "p2p"},
        "parallel.cp_comm_type: p2p has no sliding windows, which this model's attention has",
        "use all_gather or a2a",
    ),
    (
        "gpt-oss",
        {"cp": 2, "cp_comm_type": "all_gather"},
        "parallel.cp_comm_type: all_gather has no attention sinks, which this model has",
        "use a2a",
    ),
    (
        "gpt-oss",  # a2a is what it gets by itself
        {"cp": 4},
        "parallel.cp_comm_type: an all-to-all gives each of its ranks whole heads",
        "use p2p or all_gather where the model can, or fewer ranks",
    ),
    (
        "gemma2",
        {"cp": 2, "cp_comm_type": "a2a"},
        "parallel.cp_comm_type: a2a has no soft-capped attention scores, which this model has",
        "use all_gather",
    ),
]


@pytest.mark.parametrize(
    ("variant", "layout", "message", "allowed"), LAYOUTS, ids=[f"{v}-{la}" for v, la, *_ in LAYOUTS]
)
def test_layouts_that_do_not_fit(
    tmp_path: Path, variant: str, layout: dict[str, Any], message: str, allowed: str
) -> None:
    source = read_source(write_config(tmp_path, variant))
    with pytest.raises(InputError) as error:
        check_layout(source, resolve(ParallelSection(**layout), world_size=None))
    assert str(error.value).startswith(message)
    assert str(error.value).endswith(allowed)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("variant", "layout", "expected"),
    [
        ("qwen3", {}, None),
        ("qwen3", {"cp": 2}, "p2p"),
        ("mistral-window", {"cp": 2}, "all_gather"),
        ("mistral-head-dim", {"cp": 2}, "p2p"),
        ("gpt-oss", {"cp": 2}, "a2a"),
        ("gemma2", {"cp": 2}, "all_gather"),
        ("qwen3", {"cp": 2, "cp_comm_type": "a2a"}, "a2a"),
        ("qwen3", {"cp": 4, "cp_comm_type": "a2a+p2p", "hierarchical_cp": [2, 2]}, "a2a+p2p"),
    ],
)
def test_ways_of_context_parallelism(
    tmp_path: Path, variant: str, layout: dict[str, Any], expected: str | None
) -> None:
    source = read_source(write_config(tmp_path, variant))
    plan = resolve(ParallelSection(**layout), world_size=None)
    check_layout(source, plan)
    found = context_fields(plan, source.family.read_config(source.config))
    assert found["cp_comm_type"] == expected and found["context_parallel_size"] == plan.cp
    assert found["hierarchical_context_parallel_sizes"] == layout.get("hierarchical_cp")


def test_intermediate_size_not_divisible(tmp_path: Path) -> None:
    source = read_source(write_config(tmp_path, intermediate_size=95))
    with pytest.raises(InputError, match=r"parallel.tp: 2 does not divide the model's 95 ffn size .*allowed: 1$"):
        check_layout(source, resolve(ParallelSection(tp=2), world_size=None))


def test_overrides(tmp_path: Path) -> None:
    write_config(tmp_path)
    source = read_source(tmp_path, overrides={"num_hidden_layers": 8, "vocab_size": 33})
    assert (source.family.read_config(source.config)["num_layers"], source.vocab_size) == (8, 33)
    with pytest.raises(InputError, match=r"model\.overrides: num_layers is not in .*num_hidden_layers"):
        read_source(tmp_path, overrides={"num_layers": 8})


def test_fused_rotation_is_off_where_it_would_leave_out_a_factor(tmp_path: Path) -> None:
    prepared()
    tiny_config("llama-rope-yarn").save_pretrained(tmp_path)
    plan = resolve(ParallelSection(), world_size=None)
    config = transformer_config(read_source(tmp_path), plan, cuda.PLATFORM, dtype=torch.bfloat16)
    assert cuda.PLATFORM.transformer_config()["apply_rope_fusion"] and not config.apply_rope_fusion
