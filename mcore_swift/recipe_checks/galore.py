"""Rules about GaLore, which projects gradients."""

from __future__ import annotations

from mcore_swift.recipe import OptimizerSection, Recipe
from mcore_swift.recipe_checks.table import Row

KEYS = [name for name in OptimizerSection.__dataclass_fields__ if name.startswith("galore_")]


def _changed(recipe: Recipe) -> bool:
    default = OptimizerSection()
    return any(getattr(recipe.optimizer, key) != getattr(default, key) for key in KEYS)


GALORE: list[Row[Recipe]] = [
    Row(
        "optimizer.galore_*",
        "any, with another optimizer.name than galore",
        lambda r: r.optimizer.name != "galore" and _changed(r),
        "GaLore's settings do nothing for optimizer.name: {r.optimizer.name}",
        "set optimizer.name: galore, or leave them out",
    ),
    Row(
        "optimizer.name",
        "galore, with adapter.name, model.trainable or model.freeze",
        lambda r: r.optimizer.name == "galore" and (r.adapter.name != "none" or r.model.partly_frozen),
        "GaLore is there to train the whole model in little memory",
        "use adam, or leave adapter.name, model.trainable and model.freeze out",
    ),
]
