"""DeepSeek-V2's published configurations: sizes, routing and the softmax's scale; what of them is refused.

DeepSeek-V3's real shapes are with those of other large models, in tests/ckpt_tools.
"""

from __future__ import annotations

import json
from math import log, prod
from pathlib import Path
from typing import Any

import pytest

from mcore_swift.errors import InputError
from mcore_swift.models.build import ModelSource, read_source
from mcore_swift.models.keys import global_shapes, weight_rules
from mcore_swift.models.mla import softmax_fields

# From the models' public config.json files, in the older spelling that they have.
LITE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
FULL = LITE | {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}


def source(folder: Path, config: dict[str, Any], **changes: Any) -> ModelSource:
    (folder / "config.json").write_text(json.dumps(config | changes))
    return read_source(folder)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [pytest.param(LITE, 15_706_484_224, id="V2-Lite"), pytest.param(FULL, 235_741_434_880, id="V2")],
)
def test_every_tensor_has_a_known_shape_and_they_add_up(
    tmp_path: Path, config: dict[str, Any], parameters: int
) -> None:
    """The parameters are those that the hub counts in the published files."""
    model = source(tmp_path, config)
    shapes = global_shapes(model)
    assert shapes.keys() == weight_rules(model).keys()
    assert sum(map(prod, shapes.values())) == parameters


def test_groups_are_chosen_as_the_model_was_trained(tmp_path: Path) -> None:
    full = source(tmp_path, FULL)
    fields = full.fields()
    assert (fields["moe_router_num_groups"], fields["moe_router_group_topk"]) == (8, 3)
    assert full.family.group_rank == 1  # a group's best expert, where Megatron adds up the best 6 // 3
    lite = source(tmp_path, LITE).fields()
    assert lite["moe_router_num_groups"] is None
    assert lite["moe_router_pre_softmax"] is True


def test_scale_of_the_softmax(tmp_path: Path) -> None:
    """Megatron multiplies by (0.1 · mscale_all_dim · ln factor + 1)², which DeepSeek's own code does as well."""
    fields = softmax_fields(source(tmp_path, LITE).config)
    assert 0.1 * fields["mscale_all_dim"] * log(fields["rotary_scaling_factor"]) + 1 == pytest.approx(1.26080336)  # type: ignore[operator, arg-type]
    plain = softmax_fields(source(tmp_path, {k: v for k, v in LITE.items() if k != "rope_scaling"}).config)
    assert plain == {"rotary_scaling_factor": 1.0, "mscale_all_dim": 0.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 8}, "num_key_value_heads: 8 is not supported"),
        (
            {"topk_method": "noaux_tc"},
            "topk_method: 'noaux_tc' is not supported; allowed: greedy, group_limited_greedy",
        ),
        ({"norm_topk_prob": True}, "norm_topk_prob: True is not supported; allowed: False"),
        ({"attention_bias": True}, "attention_bias: True is not supported; allowed: False"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_layers_do_not_implement(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        source(tmp_path, LITE, **changes).fields()
