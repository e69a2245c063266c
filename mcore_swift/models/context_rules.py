"""What a model's attention asks of context parallelism, and Transformer Engine of the model (its 2.20)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mcore_swift.recipe_checks.table import Row

if TYPE_CHECKING:
    from mcore_swift.models.layout_rules import Fit
    from mcore_swift.parallel import ParallelPlan


def comm_type(plan: ParallelPlan, fields: Mapping[str, Any]) -> str | None:
    """The recipe's way of exchanging keys and values, or the fastest that this model's attention has."""
    if plan.cp == 1 or plan.cp_comm_type is not None:
        return plan.cp_comm_type
    if has_sinks(fields):
        return "a2a"
    return "all_gather" if fields.get("window_size") else "p2p"


def context_fields(plan: ParallelPlan, fields: Mapping[str, Any]) -> dict[str, object]:
    """TransformerConfig fields. `fields`: those the family makes of its config."""
    return {
        "context_parallel_size": plan.cp,
        "cp_comm_type": comm_type(plan, fields),
        "hierarchical_context_parallel_sizes": list(plan.hierarchical_cp) if plan.hierarchical_cp else None,
    }


def has_sinks(fields: Mapping[str, Any]) -> bool:
    """Whether the softmax has a term that is no token's (gpt-oss)."""
    return fields.get("softmax_type", "vanilla") != "vanilla"


def head_ranks(plan: ParallelPlan, fields: Mapping[str, Any]) -> int:
    """Ranks that share out the heads during attention: those of TP, times those of an all-to-all."""
    if plan.hierarchical_cp:
        return plan.tp * plan.hierarchical_cp[0]
    return plan.tp * plan.cp if comm_type(plan, fields) == "a2a" else plan.tp


CONTEXT_RULES: list[Row[Fit]] = [
    Row(
        "parallel.cp_comm_type",
        "a2a, a2a+p2p, for key-value heads that tp x the ranks of the all-to-all does not divide",
        lambda r: r.plan.cp > 1 and any(n % head_ranks(r.plan, r.fields) for n in (r.heads, r.groups)),
        "an all-to-all gives each of its ranks whole heads: tp {r.plan.tp} x its ranks (all of cp {r.plan.cp}, or the"
        " first of parallel.hierarchical_cp) does not divide the model's {r.groups} key-value heads ({r.folder})",
        "use p2p or all_gather where the model can, or fewer ranks",
    ),
    Row(
        "parallel.cp_comm_type",
        "p2p, a2a+p2p, for a model with sliding windows",
        lambda r: r.fields.get("window_size") and r.plan.cp_comm_type in ("p2p", "a2a+p2p"),
        "{r.plan.cp_comm_type} has no sliding windows, which this model's attention has ({r.folder})",
        "use all_gather or a2a",
    ),
    Row(
        "parallel.cp_comm_type",
        "other than a2a, for a model with attention sinks",
        lambda r: has_sinks(r.fields) and r.plan.cp > 1 and r.plan.cp_comm_type not in (None, "a2a"),
        "{r.plan.cp_comm_type} has no attention sinks, which this model has ({r.folder})",
        "use a2a",
    ),
    Row(
        "parallel.cp_comm_type",
        "other than all_gather, for a model with soft-capped attention scores",
        lambda r: r.fields.get("attn_logit_softcapping") and r.plan.cp_comm_type not in (None, "all_gather"),
        "{r.plan.cp_comm_type} has no soft-capped attention scores, which this model has ({r.folder})",
        "use all_gather",
    ),
]
