"""A model's pipeline stages: what the recipe wishes, or what balances them."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from mcore_swift.models.keys import global_shapes, rule_config
from mcore_swift.parallel import ParallelPlan
from mcore_swift.pipeline import bubble_fraction, imbalance, layout_of, written

if TYPE_CHECKING:
    from mcore_swift.models.build import ModelSource


def pipeline_layout(source: ModelSource, plan: ParallelPlan) -> tuple[str, ...]:
    """The model's chunks at this layout, in the order a token meets them (see `mcore_swift.pipeline`)."""
    fields = source.fields()
    return layout_of(
        plan.pipeline,
        pp=plan.pp,
        vpp=plan.vpp,
        layers=int(fields["num_layers"]),  # type: ignore[call-overload]
        mtp=int(fields.get("mtp_num_layers") or 0),  # type: ignore[call-overload]
        loss_cost=loss_cost(source),
    )


def describe(source: ModelSource, plan: ParallelPlan, *, micro_batches: int) -> str:
    """For a reader: what lies on which stage, and the share of a step that the stages wait; "" without stages."""
    if plan.pp == 1:
        return ""
    chunks = pipeline_layout(source, plan)
    bubble = bubble_fraction(pp=plan.pp, vpp=plan.vpp, micro_batches=micro_batches)
    uneven = imbalance(chunks, pp=plan.pp, loss_cost=loss_cost(source))
    return (
        f"{written(chunks)}: idle for {100 * bubble:.1f} % of a step while it fills and empties, {100 * uneven:.1f} %"
        " waiting for the slowest stage"
    )


def loss_cost(source: ModelSource) -> float:
    """The time of the output layer, in layers: parameters that meet every token, over those of the mean layer.

    Attention's products with keys and values are left out: they depend on the documents' lengths.
    """
    config = rule_config(source)
    layers = 0.0
    for key, shape in global_shapes(source).items():
        if key.startswith("decoder.layers."):
            used = config.moe_router_topk / config.num_moe_experts if ".experts.experts." in key else 1.0
            layers += prod(shape) * used
    return source.num_outputs * config.hidden_size / (layers / config.num_layers)


def megatron_layout(source: ModelSource, plan: ParallelPlan) -> str | None:
    """TransformerConfig.pipeline_model_parallel_layout; None where Megatron's own even split says the same."""
    fields = source.fields()
    even = plan.pipeline.empty and not int(fields["num_layers"]) % (plan.pp * plan.vpp)  # type: ignore[call-overload]
    return None if plan.pp == 1 or even else "|".join(pipeline_layout(source, plan))
