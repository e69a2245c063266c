"""Rules about training a part of the model."""

from __future__ import annotations

from mcore_swift.recipe import Recipe
from mcore_swift.recipe_checks.table import Row

_KEYS = "model.trainable model.freeze"

FREEZING: list[Row[Recipe]] = [
    Row(
        _KEYS,
        "any, with adapter.name",
        lambda r: r.model.partly_frozen and r.adapter.name != "none",
        "adapter.name: {r.adapter.name} freezes the whole model already",
        "leave them out, or train without adapters",
    ),
    Row(
        _KEYS,
        "any, with moe.expert_bias_update_rate more than 0",
        lambda r: r.model.partly_frozen and r.moe.expert_bias_update_rate,
        "the correction biases of frozen layers would change, too",
        "leave moe.expert_bias_update_rate out",
    ),
    Row(
        _KEYS,
        "any, with optimizer.fsdp, runtime.ep_overlap or precision.fp8_param_gather",
        lambda r: r.model.partly_frozen and (r.optimizer.fsdp or r.runtime.ep_overlap or r.precision.fp8_param_gather),
        "neither of optimizer.fsdp, runtime.ep_overlap and precision.fp8_param_gather is proved for a model in parts",
        "leave those out",
    ),
]
