"""The recipe's `moe` section for a model: what is refused, and what it is in Megatron's TransformerConfig."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_swift.parallel import ParallelPlan
from mcore_swift.recipe import MoeSection
from mcore_swift.recipe_checks.moe import changed_keys
from mcore_swift.recipe_checks.table import Row, refuse

if TYPE_CHECKING:
    from mcore_swift.models.build import ModelSource


@dataclass(frozen=True)
class ExpertFit:
    """A `moe` section for a model at a layout. `device`: the platform's name; `fields`: what the family's rows give."""

    moe: MoeSection
    plan: ParallelPlan
    fields: Mapping[str, Any]
    device: str
    family: str
    folder: Path

    @property
    def experts(self) -> int | None:
        return self.fields.get("num_moe_experts")

    @property
    def plain_softmax(self) -> bool:
        """Whether experts are chosen by a softmax over all of them, with no bias and no groups."""
        kind = self.fields.get("moe_router_score_function", "softmax")
        return kind == "softmax" and not self.fields.get("moe_router_num_groups")

    @property
    def most_capacity(self) -> float:
        """The capacity factor at which an expert takes every token."""
        return (self.experts or 1) / self.fields["moe_router_topk"]

    @property
    def changed(self) -> str:
        return ", ".join(changed_keys(self.moe))

    @property
    def gpu_only(self) -> str:
        """Keys that are set to what the CPU platform hasn't."""
        wanted = {"dispatcher": "flex"} | dict.fromkeys(
            ("router_fusion", "permute_fusion", "shared_expert_overlap"), True
        )
        return ", ".join(f"{key}: {value}" for key, value in wanted.items() if getattr(self.moe, key) == value)


EXPERT_RULES: list[Row[ExpertFit]] = [
    Row(
        "moe",
        "any key, for a model without experts",
        lambda r: r.experts is None and r.changed,
        "{r.changed}: {r.family} has no experts ({r.folder})",
        "leave the section out",
    ),
    Row(
        "moe",
        "flex, router_fusion, permute_fusion or shared_expert_overlap, on the CPU",
        lambda r: r.device == "cpu" and r.gpu_only,
        "{r.gpu_only} needs a GPU",
        "leave it out",
    ),
    Row(
        "moe.expert_bias_update_rate",
        "any, for a family without a correction bias",
        lambda r: r.moe.expert_bias_update_rate and not r.fields.get("moe_router_enable_expert_bias"),
        "{r.moe.expert_bias_update_rate}, but {r.family} has no correction bias ({r.folder})",
        "use moe.aux_loss",
    ),
    Row(
        "moe.router_fusion",
        "true, for a family with another score than softmax, or with groups of experts",
        lambda r: r.moe.router_fusion and not r.plain_softmax,
        "{r.family} scores experts otherwise than by a softmax over all",
        "leave it out",
    ),
    Row(
        "moe.shared_expert_overlap",
        "true, for a model without shared experts",
        lambda r: r.moe.shared_expert_overlap and not r.fields.get("moe_shared_expert_intermediate_size"),
        "{r.family} has no shared experts ({r.folder})",
        "leave it out",
    ),
    Row(
        "moe.capacity_factor",
        "more than experts / experts a token, with moe.pad_to_capacity: true",
        lambda r: r.experts is not None and r.moe.pad_to_capacity and (r.moe.capacity_factor or 0) > r.most_capacity,
        "{r.moe.capacity_factor} with moe.pad_to_capacity: true would pad each expert beyond all tokens",
        "at most {r.most_capacity:.4g} for {r.family}, where it holds every token",
    ),
    Row(
        "moe.dispatcher",
        "flex, without the package deep_ep",
        lambda r: r.moe.dispatcher == "flex" and importlib.util.find_spec("deep_ep") is None,
        "flex needs DeepEP, but the package deep_ep is not installed",
        "install it (github.com/deepseek-ai/DeepEP), or use alltoall",
    ),
    Row(
        "parallel.sequence_parallel",
        "false, for a model with experts at parallel.tp greater than 1",
        lambda r: r.experts is not None and r.plan.tp > 1 and not r.plan.sequence_parallel,
        "false with parallel.tp {r.plan.tp}: experts are sent each token once, so ranks must not hold the same ones",
        "leave it out",
    ),
]


def check_experts(source: ModelSource, plan: ParallelPlan, moe: MoeSection, *, device: str) -> None:
    """Raises InputError when the section does not fit the model, the layout or the platform (`device`: its name)."""
    fields = source.family.read_config(source.config)
    refuse(EXPERT_RULES, ExpertFit(moe, plan, fields, device, source.family.name, source.folder))


def expert_fields(moe: MoeSection, fields: Mapping[str, Any], *, device: str) -> dict[str, object]:
    """TransformerConfig fields of the section for a model whose family gives `fields`; none for a dense model."""
    if fields.get("num_moe_experts") is None:
        return {}
    cuda = device == "cuda"
    return {
        "moe_router_load_balancing_type": moe.aux_loss,
        "moe_aux_loss_coeff": moe.aux_loss_coeff,
        "moe_z_loss_coeff": moe.z_loss_coeff or None,
        "moe_router_bias_update_rate": moe.expert_bias_update_rate,
        "moe_router_dtype": moe.router_dtype,
        "moe_expert_capacity_factor": moe.capacity_factor,
        "moe_token_drop_policy": moe.drop_policy,
        "moe_pad_expert_input_to_capacity": moe.pad_to_capacity,
        "moe_token_dispatcher_type": moe.dispatcher,
        "moe_grouped_gemm": cuda if moe.grouped is None else moe.grouped,
        "moe_router_fusion": moe.router_fusion,
        "moe_permute_fusion": cuda if moe.permute_fusion is None else moe.permute_fusion,
        "moe_shared_expert_overlap": moe.shared_expert_overlap,
    }
