"""Rules about experts that the recipe alone decides; those that depend on the model are in `models.experts`."""

from __future__ import annotations

from mcore_swift.recipe import MoeSection, Recipe
from mcore_swift.recipe_checks.levers import recomputes
from mcore_swift.recipe_checks.table import Row

EXPERTS: list[Row[Recipe]] = [
    Row(
        "moe.aux_loss_coeff",
        "0, with another moe.aux_loss than none",
        lambda r: r.moe.aux_loss != "none" and not r.moe.aux_loss_coeff,
        "moe.aux_loss: {r.moe.aux_loss} has no weight",
        "give one, such as 0.001",
    ),
    Row(
        "moe.aux_loss_coeff",
        "any, with moe.aux_loss: none",
        lambda r: r.moe.aux_loss == "none" and r.moe.aux_loss_coeff,
        "{r.moe.aux_loss_coeff} does nothing with moe.aux_loss: none",
        "choose aux_loss, seq_aux_loss or global_aux_loss",
    ),
    Row(
        "moe.aux_loss",
        "seq_aux_loss, with data.packing: true",
        lambda r: r.moe.aux_loss == "seq_aux_loss" and r.data.packing,
        "seq_aux_loss counts in a row, but a packed sequence holds many documents",
        "use aux_loss, or set data.packing: false",
    ),
    Row(
        "moe.drop_policy",
        "position, without moe.capacity_factor",
        lambda r: r.moe.capacity_factor is None and r.moe.drop_policy != "probs",
        "{r.moe.drop_policy} does nothing without moe.capacity_factor",
        "set it, or leave moe.drop_policy out",
    ),
    Row(
        "moe.pad_to_capacity",
        "true, without moe.capacity_factor",
        lambda r: r.moe.capacity_factor is None and r.moe.pad_to_capacity,
        "there is no capacity to pad to without moe.capacity_factor",
        "set it, or leave moe.pad_to_capacity out",
    ),
    Row(
        "moe.pad_to_capacity",
        "true, with another moe.dispatcher than alltoall",
        lambda r: r.moe.pad_to_capacity and r.moe.dispatcher != "alltoall",
        "Megatron-Core pads in the alltoall dispatcher only, found {r.moe.dispatcher}",
        "set moe.dispatcher: alltoall",
    ),
    Row(
        "moe.dispatcher",
        "allgather, with rows of differing lengths (data.packing: false)",
        lambda r: r.moe.dispatcher == "allgather" and not r.data.fixed_length,
        "allgather with data.packing: false is not supported: it gathers the same number of tokens from every rank",
        "use alltoall, or set data.packing: true",
    ),
    Row(
        "moe.shared_expert_overlap",
        "true, with moe.dispatcher: allgather",
        lambda r: r.moe.shared_expert_overlap and r.moe.dispatcher == "allgather",
        "shared experts run between the two exchanges of alltoall or flex, found allgather",
        "use another dispatcher, or leave it out",
    ),
    Row(
        "moe.shared_expert_overlap",
        "true, with runtime.ep_overlap: true",
        lambda r: r.moe.shared_expert_overlap and r.runtime.ep_overlap,
        "runtime.ep_overlap hides the exchange behind another micro-batch already",
        "leave one of them out",
    ),
    Row(
        "moe.shared_expert_overlap",
        "true, with shared_experts recomputed",
        lambda r: r.moe.shared_expert_overlap and recomputes(r, "shared_experts"),
        "shared experts that run inside the exchange can't be recomputed by themselves",
        "leave it out, or take shared_experts out of runtime.recompute_modules",
    ),
    Row(
        "moe.dispatcher",
        "allgather, with runtime.ep_overlap: true",
        lambda r: r.moe.dispatcher == "allgather" and r.runtime.ep_overlap,
        "runtime.ep_overlap splits the exchange of alltoall or flex, found allgather",
        "use another dispatcher, or leave runtime.ep_overlap out",
    ),
    *(
        Row(
            f"moe.{key}",
            f"{value}, with runtime.device: cpu",
            lambda r, key=key, value=value: r.runtime.device == "cpu" and getattr(r.moe, key) == value,
            f"{value} needs a GPU, found runtime.device: cpu",
            "leave it out",
        )
        for key, value in (
            ("dispatcher", "flex"),
            ("router_fusion", True),
            ("permute_fusion", True),
            ("shared_expert_overlap", True),
        )
    ),
]


def changed_keys(section: MoeSection) -> list[str]:
    """The section's keys that are not at their defaults."""
    default = MoeSection()
    return [name for name in section.__dataclass_fields__ if getattr(section, name) != getattr(default, name)]
