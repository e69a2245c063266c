"""Rules about adapters."""

from __future__ import annotations

from dataclasses import fields

from mcore_swift.recipe import AdapterSection, Recipe
from mcore_swift.recipe_checks.table import Row

# What a PEFT folder that the run goes on from has decided.
_OF_THE_FOLDER = ("targets", "rank", "alpha", "dropout", "rslora", "dora", "init")


def _changed(section: AdapterSection, *names: str) -> list[str]:
    """Those of the keys `names`, or of all but `name`, that differ from their defaults."""
    default = AdapterSection()
    names = names or tuple(field.name for field in fields(section) if field.name != "name")
    return [name for name in names if getattr(section, name) != getattr(default, name)]


ADAPTER: list[Row[Recipe]] = [
    Row(
        "adapter.name",
        "none, with another adapter key set",
        lambda r: r.adapter.name == "none" and _changed(r.adapter),
        "none trains the model itself, so the section's other keys do nothing",
        "set adapter.name: lora, or leave them out",
    ),
    Row(
        "adapter.path",
        "any, with " + ", ".join(f"adapter.{name}" for name in _OF_THE_FOLDER),
        lambda r: r.adapter.path is not None and _changed(r.adapter, *_OF_THE_FOLDER),
        "{r.adapter.path} decides " + ", ".join(_OF_THE_FOLDER),
        "leave those out, or the path to start anew",
    ),
    Row(
        "adapter.init",
        "pissa, with adapter.dora: true",
        lambda r: r.adapter.init == "pissa" and r.adapter.dora,
        "pissa changes the frozen weights, of which dora's magnitudes are the lengths",
        "choose one of the two",
    ),
    Row(
        "adapter.targets",
        "an empty list",
        lambda r: not r.adapter.targets,
        "it is empty",
        "name modules such as q_proj, or attention, mlp, experts, all-linear",
    ),
    Row(
        "model.init",
        "random, with adapter.name: lora",
        lambda r: r.adapter.name != "none" and r.model.init == "random" and r.data.format != "synthetic",
        "random weights are frozen beside the adapters, so nothing useful can be learned",
        "use pretrained weights (benchmarks with data.format: synthetic may use random ones)",
    ),
]
