"""The recipe's moe section: what is refused with which words, and what it is in Megatron's config."""

from __future__ import annotations

import importlib.util
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from mcore_swift.errors import InputError
from mcore_swift.models.build import check_layout, read_source
from mcore_swift.models.experts import EXPERT_RULES, check_experts, expert_fields
from mcore_swift.parallel import resolve
from mcore_swift.recipe import (
    DataSection,
    ModelSection,
    MoeSection,
    ParallelSection,
    Recipe,
    RuntimeSection,
    ScheduleSection,
    SourceSection,
)
from mcore_swift.recipe_checks import check_recipe
from mcore_swift.recipe_checks.moe import EXPERTS
from mcore_swift.recipe_checks.table import explained
from tests.distributed.harness import prepared
from tests.models.test_families import write_config

MODEL = [
    (
        "qwen3",
        {"aux_loss": "aux_loss", "aux_loss_coeff": 0.1},
        {},
        "moe: aux_loss, aux_loss_coeff: qwen3 has no experts",
    ),
    ("qwen3", {"router_dtype": "fp64"}, {}, "moe: router_dtype: qwen3 has no experts"),
    ("qwen3-moe", {"permute_fusion": True}, {}, "moe: permute_fusion: True needs a GPU"),
    ("qwen3-moe", {"dispatcher": "flex"}, {"device": "cpu"}, "moe: dispatcher: flex needs a GPU"),
    (
        "qwen3-moe",
        {"dispatcher": "flex"},
        {"device": "cuda"},
        "moe.dispatcher: flex needs DeepEP, but the package deep_ep is not installed; install it",
    ),
    (
        "qwen3-moe",
        {"expert_bias_update_rate": 0.1},
        {},
        "moe.expert_bias_update_rate: 0.1, but qwen3_moe has no correction bias",
    ),
    (
        "deepseek-v3",
        {"router_fusion": True},
        {"device": "cuda"},
        "moe.router_fusion: deepseek_v3 scores experts otherwise",
    ),
    (
        "mixtral",
        {"shared_expert_overlap": True},
        {"device": "cuda"},
        "moe.shared_expert_overlap: mixtral has no shared",
    ),
    (
        "qwen3-moe",
        {"capacity_factor": 2.7, "pad_to_capacity": True},
        {},
        "moe.capacity_factor: 2.7 with moe.pad_to_capacity: true would pad each expert beyond all tokens; at most",
    ),
    (
        "qwen3-moe",
        {},
        {"tp": 2, "sequence_parallel": False},
        "parallel.sequence_parallel: false with parallel.tp 2: experts are sent each token once",
    ),
]


@pytest.mark.parametrize(("variant", "section", "options", "message"), MODEL, ids=[m[3][:60] for m in MODEL])
def test_what_does_not_fit_the_model(
    tmp_path: Path, variant: str, section: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    assert importlib.util.find_spec("deep_ep") is None
    device = options.pop("device", "cpu") if "device" in (options := dict(options)) else "cpu"
    source = read_source(write_config(tmp_path, variant))
    plan = resolve(ParallelSection(**options), world_size=None)
    with pytest.raises(InputError) as error:
        check_experts(source, plan, MoeSection(**section), device=device)
    assert str(error.value).startswith(message)


LAYOUTS = [
    ({"ep": 3, "dp": 3}, "parallel.ep: 3 does not divide the model's 8 experts", "allowed: 1, 2, 4, 8"),
    ({"ep": 16, "dp": 16}, "parallel.ep: 16 does not divide the model's 8 experts", "allowed: 1, 2, 4, 8"),
    ({"tp": 1, "etp": 3, "dp": 3}, "parallel.etp: 3 does not divide the model's 40 expert ffn size", ", 40"),
]


@pytest.mark.parametrize(("layout", "message", "allowed"), LAYOUTS, ids=[m for _, m, _ in LAYOUTS])
def test_experts_that_cannot_be_shared_out(tmp_path: Path, layout: dict[str, Any], message: str, allowed: str) -> None:
    source = read_source(write_config(tmp_path, "qwen3-moe"))
    with pytest.raises(InputError) as error:
        check_layout(source, resolve(ParallelSection(**layout), world_size=None))
    assert str(error.value).startswith(message)
    assert str(error.value).endswith(allowed)


RANKS = [
    (
        {"ep": 2},
        "ep 2 × etp 1 = 2 ranks do not divide the 1 ranks of a pipeline stage (tp 1 × cp 1 × dp 1)",
    ),
    (
        {"ep": 4, "dp": 2},
        "ep 4 × etp 1 = 4 ranks do not divide the 2 ranks of a pipeline stage",
    ),
    (
        {"ep": 2, "pp": 2},
        "ep 2 × etp 1 = 2 ranks do not divide the 1 ranks of a pipeline stage",
    ),
    (
        {"ep": 2, "tp": 2},
        "ep 2 × etp 2 = 4 ranks do not divide the 2 ranks of a pipeline stage",
    ),
    ({"etp": 2}, "ep 1 × etp 2 = 2 ranks do not divide the 1 ranks of a pipeline stage"),
    (
        {"etp": 4, "tp": 2},
        "ep 1 × etp 4 = 4 ranks do not divide the 2 ranks of a pipeline stage",
    ),
]


@pytest.mark.parametrize(("layout", "message"), RANKS, ids=[m for _, m in RANKS])
def test_ranks_that_are_not_there(layout: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        resolve(ParallelSection(**layout), world_size=None)
    assert str(error.value).startswith(f"parallel.ep, parallel.etp: {message}")


RECIPES = [
    ({"aux_loss": "aux_loss"}, {}, "moe.aux_loss_coeff: moe.aux_loss: aux_loss has no weight; give one, such as 0.001"),
    ({"aux_loss_coeff": 0.1}, {}, "moe.aux_loss_coeff: 0.1 does nothing with moe.aux_loss: none"),
    ({"aux_loss_coeff": -0.1}, {}, "moe.aux_loss_coeff: found -0.1; it must be at least 0"),
    ({"z_loss_coeff": -0.1}, {}, "moe.z_loss_coeff: found -0.1; it must be at least 0"),
    ({"capacity_factor": 0.0}, {}, "moe.capacity_factor: found 0.0; it must be greater than 0"),
    (
        {"aux_loss": "seq_aux_loss", "aux_loss_coeff": 0.1},
        {},
        "moe.aux_loss: seq_aux_loss counts in a row, but a packed",
    ),
    ({"drop_policy": "position"}, {}, "moe.drop_policy: position does nothing without moe.capacity_factor"),
    ({"pad_to_capacity": True}, {}, "moe.pad_to_capacity: there is no capacity to pad to without moe.capacity_factor"),
    (
        {"pad_to_capacity": True, "capacity_factor": 1.0, "dispatcher": "allgather"},
        {},
        "moe.pad_to_capacity: Megatron-Core pads in the alltoall dispatcher only, found allgather",
    ),
    ({"dispatcher": "allgather"}, {"packing": False}, "moe.dispatcher: allgather with data.packing: false is not supp"),
    ({"dispatcher": "flex"}, {"device": "cpu"}, "moe.dispatcher: flex needs a GPU, found runtime.device: cpu"),
    ({"permute_fusion": True}, {"device": "cpu"}, "moe.permute_fusion: True needs a GPU, found runtime.device: cpu"),
    (
        {"shared_expert_overlap": True, "dispatcher": "allgather"},
        {},
        "moe.shared_expert_overlap: shared experts run between the two exchanges of alltoall or flex, found allgather",
    ),
    (
        {"shared_expert_overlap": True},
        {"runtime": {"ep_overlap": True}},
        "moe.shared_expert_overlap: runtime.ep_overlap hides the exchange behind another micro-batch already",
    ),
    (
        {"shared_expert_overlap": True},
        {"runtime": {"recompute": "selective", "recompute_modules": ["shared_experts"]}},
        "moe.shared_expert_overlap: shared experts that run inside the exchange can't be recomputed by themselves",
    ),
    (
        {"dispatcher": "allgather"},
        {"runtime": {"ep_overlap": True}},
        "moe.dispatcher: runtime.ep_overlap splits the exchange of alltoall or flex, found allgather",
    ),
]


@pytest.mark.parametrize(("section", "options", "message"), RECIPES, ids=[m for _, _, m in RECIPES])
def test_what_contradicts_itself(section: dict[str, Any], options: dict[str, Any], message: str) -> None:
    recipe = Recipe(
        model=ModelSection(path="model"),
        data=DataSection(train=[SourceSection(path="a.jsonl")], packing=options.get("packing", True)),
        schedule=ScheduleSection(steps=10),
        parallel=ParallelSection(ep=2),
        runtime=RuntimeSection(device=options.get("device", "auto"), **options.get("runtime", {})),
        moe=MoeSection(**section),
    )
    with pytest.raises(InputError) as error:
        check_recipe(recipe)
    assert str(error.value).startswith(message)


def test_rows_explain_themselves() -> None:
    for row in explained([*EXPERTS, *EXPERT_RULES]):
        assert all(row.values())


def test_fields_are_megatrons() -> None:
    prepared()
    from megatron.core.transformer import TransformerConfig

    known = {field.name for field in fields(TransformerConfig)}
    section = MoeSection(z_loss_coeff=0.1, dispatcher="flex")
    on_cuda = expert_fields(section, {"num_moe_experts": 8}, device="cuda")
    assert set(on_cuda) <= known
    assert on_cuda["moe_grouped_gemm"] is on_cuda["moe_permute_fusion"] is True
    on_cpu = expert_fields(section, {"num_moe_experts": 8}, device="cpu")
    assert on_cpu["moe_grouped_gemm"] is on_cpu["moe_permute_fusion"] is False
    assert expert_fields(section, {"num_moe_experts": None}, device="cuda") == {}


ROUTING = [
    ("mixtral", {"router_jitter_noise": 0.1}, "config.json: router_jitter_noise: 0.1 is not supported; allowed: 0.0"),
    (
        "glm4-moe",
        {"norm_topk_prob": False},
        "config.json: norm_topk_prob: False with num_experts_per_tok 3 is not",
    ),
    (
        "glm4-moe",
        {"num_experts_per_tok": 1},
        "config.json: norm_topk_prob: True with num_experts_per_tok 1 is not",
    ),
    (
        "glm4-moe-groups",
        {"topk_group": 3},
        "config.json: topk_group: 3 of 4 groups with num_experts_per_tok 4 is not supported: groups are ranked by",
    ),
]


@pytest.mark.parametrize(("variant", "changes", "message"), ROUTING, ids=[m for *_, m in ROUTING])
def test_routing_that_megatron_has_not(tmp_path: Path, variant: str, changes: dict[str, Any], message: str) -> None:
    source = read_source(write_config(tmp_path, variant, **changes))
    with pytest.raises(InputError) as error:
        source.family.read_config(source.config)
    assert str(error.value).startswith(message)
