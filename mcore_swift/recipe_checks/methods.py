"""Rules about what belongs to which kind of adapter."""

from __future__ import annotations

from mcore_swift.recipe import AdapterSection, Recipe
from mcore_swift.recipe_checks.table import Row

# Keys that only some methods know.
USERS = {
    "targets": "lora bottleneck",
    "alpha": "lora",
    "dropout": "lora",
    "rslora": "lora",
    "dora": "lora",
    "share_a": "lora",
    "modules_to_save": "lora",
    "init": "lora",
    "quantization": "lora",
    "double_quantization": "lora",
    "several": "lora",
    "learning_rate_ratio": "lora",
    "activation": "bottleneck",
    "layers": "reft",
    "first_tokens": "reft",
    "last_tokens": "reft",
}
# What a folder that the run goes on from has decided, beside what `adapter` says.
OF_FOLDERS = ("activation", "layers", "first_tokens", "last_tokens")


def _changed(recipe: Recipe, *keys: str) -> bool:
    return any(getattr(recipe.adapter, key) != getattr(AdapterSection(), key) for key in keys)


def _of_others(key: str, users: str) -> Row[Recipe]:
    def when(recipe: Recipe) -> bool:
        return _changed(recipe, key) and recipe.adapter.name not in ("none", *users.split())

    return Row(
        f"adapter.{key}",
        f"any, with another adapter.name than {users.replace(' ', ', ')}",
        when,
        f"{{r.adapter.name}} doesn't know it; it is for adapter.name: {users.replace(' ', ', ')}",
        "leave it out",
    )


METHODS: list[Row[Recipe]] = [
    *(_of_others(key, users) for key, users in USERS.items()),
    Row(
        "adapter.path",
        "any, with " + ", ".join(f"adapter.{key}" for key in OF_FOLDERS),
        lambda r: r.adapter.path is not None and _changed(r, *OF_FOLDERS),
        "{r.adapter.path} decides " + ", ".join(OF_FOLDERS),
        "leave those out, or the path to start anew",
    ),
    Row(
        "adapter.merge",
        "true, with another adapter.name than lora",
        lambda r: r.adapter.merge and r.adapter.name not in ("none", "lora"),
        "{r.adapter.name} can't be folded into the model's weights",
        "leave it out",
    ),
    Row(
        "adapter.first_tokens adapter.last_tokens",
        "both 0, with adapter.name: reft",
        lambda r: r.adapter.name == "reft" and not r.adapter.first_tokens and not r.adapter.last_tokens,
        "nothing would be changed, or trained",
        "set one of them to at least 1",
    ),
    Row(
        "adapter.layers",
        "an empty list",
        lambda r: r.adapter.layers == [],
        "it is empty",
        "name layers, from 0, or leave it out for all",
    ),
    Row(
        "runtime.recompute",
        "full, with adapter.name: reft",
        lambda r: r.adapter.name == "reft" and r.runtime.recompute == "full",
        "a layer that is computed again would be changed at another micro-batch's positions",
        "use selective, or none",
    ),
]
