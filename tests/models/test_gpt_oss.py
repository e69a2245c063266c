"""What gpt-oss alone has: its activation is Megatron's fused one too; what Megatron can't honour is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_swift.errors import InputError
from mcore_swift.models.build import check_layout, read_source
from mcore_swift.models.rope import rope_frequencies
from mcore_swift.parallel import resolve
from mcore_swift.recipe import ParallelSection
from tests.distributed.harness import in_fork, prepared
from tests.distributed.tiny_models import tiny_config, tiny_model
from tests.models.test_families import read_fields, write_config


@in_fork
def test_the_fused_activation_is_transformers_own() -> None:
    """Forward and gradient, by the function that the fusion on GPUs calls, with values beyond both clamps."""
    prepared()
    from megatron.core.fusions.fused_bias_geglu import weighted_bias_quick_geglu_impl
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    experts = GptOssExperts(tiny_config("gpt-oss"))
    ours = (5 * torch.randn(64, 2 * 40, dtype=torch.float64)).requires_grad_()  # gate, then up
    theirs = torch.stack(ours.detach().chunk(2, dim=-1), dim=-1).flatten(-2).requires_grad_()  # in turn
    weights = torch.rand(64, 1, dtype=torch.float64)
    assert (ours > 7).any() and (ours < -7).any()
    found = weighted_bias_quick_geglu_impl(ours, None, weights, False, 1.0, 7.0)
    expected = experts._apply_gate(theirs) * weights
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(found)
    found.backward(upstream)
    expected.backward(upstream)
    assert ours.grad is not None and theirs.grad is not None
    gradient = torch.cat([theirs.grad[:, 0::2], theirs.grad[:, 1::2]], dim=-1)
    torch.testing.assert_close(ours.grad, gradient, rtol=1e-12, atol=1e-12)


def test_yarn_without_truncation() -> None:
    rotary = tiny_model("gpt-oss").model.rotary_emb
    frequencies, factor = rope_frequencies(tiny_config("gpt-oss"))
    assert torch.equal(frequencies, rotary.inv_freq)
    assert factor == rotary.attention_scaling > 1
    truncated = tiny_config("gpt-oss")
    truncated.rope_parameters["truncate"] = True
    assert not torch.equal(frequencies, rope_frequencies(truncated)[0]), "the key would not be read"


def test_values_arrive(tmp_path: Path) -> None:
    fields = read_fields(write_config(tmp_path, "gpt-oss"))
    assert fields["num_moe_experts"] == 8
    assert fields["moe_router_topk"] == 3
    assert fields["moe_ffn_hidden_size"] == fields["ffn_hidden_size"] == 40
    assert fields["window_size"] == (4, 0)
    assert fields["window_attn_skip_freq"] == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": False}, "attention_bias: False is not supported; allowed: True"),
        ({"swiglu_limit": 5.0}, "swiglu_limit: 5.0 is not supported; allowed: 7.0"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported; allowed: 'silu'"),
    ],
)
def test_what_the_layers_do_not_implement(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        read_fields(write_config(tmp_path, "gpt-oss", **changes))
    assert message in str(error.value)


@pytest.mark.parametrize("layout", [{"tp": 2}, {"tp": 2, "ep": 2, "etp": 2, "dp": 2}])
def test_experts_with_biases_are_not_cut(tmp_path: Path, layout: dict[str, Any]) -> None:
    whole: dict[str, Any] = layout | {"etp": 1}
    source = read_source(write_config(tmp_path, "gpt-oss"))
    with pytest.raises(InputError, match=r"parallel.etp: 2 .* gpt_oss have biases, .*; set parallel.etp: 1$"):
        check_layout(source, resolve(ParallelSection(**layout), world_size=None))
    check_layout(source, resolve(ParallelSection(**whole), world_size=None))
