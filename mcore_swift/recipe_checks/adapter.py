"""Rules about adapters."""

from __future__ import annotations

import re
from dataclasses import fields

from mcore_swift.recipe import AdapterSection, NamedAdapter, Recipe
from mcore_swift.recipe_checks.table import Row

# What a PEFT folder that the run goes on from has decided.
_OF_THE_FOLDER = ("targets", "rank", "alpha", "rslora", "dora", "modules_to_save", "init")


def _changed(section: AdapterSection, *names: str) -> list[str]:
    """Those of the keys `names`, or of all but `name`, that differ from their defaults."""
    default = AdapterSection()
    names = names or tuple(field.name for field in fields(section) if field.name != "name")
    return [name for name in names if getattr(section, name) != getattr(default, name)]


def _out_of_bounds(one: NamedAdapter) -> bool:
    return (
        (one.rank is not None and one.rank < 1)
        or (one.alpha is not None and one.alpha <= 0)
        or (one.dropout is not None and not 0 <= one.dropout < 1)
        or one.targets == []
    )


def _saves(recipe: Recipe) -> bool:
    """Whether something of the run is to be kept."""
    return bool(recipe.checkpoint.interval or recipe.checkpoint.final or recipe.checkpoint.export)


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
        "adapter.double_quantization",
        "false, with adapter.quantization: none or fp8",
        lambda r: not r.adapter.double_quantization and r.adapter.quantization in ("none", "fp8"),
        "there are no weights in four bits whose scales it could be about",
        "leave it out, or set adapter.quantization: nf4",
    ),
    Row(
        "adapter.quantization",
        "nf4, fp4 or fp8, with adapter.init: pissa",
        lambda r: r.adapter.quantization != "none" and r.adapter.init == "pissa",
        "pissa changes the frozen weights, which are quantized already",
        "leave one of the two out",
    ),
    Row(
        "adapter.quantization precision.fp8",
        "nf4 or fp4, with precision.fp8",
        lambda r: r.adapter.quantization in ("nf4", "fp4") and r.precision.fp8,
        "Transformer Engine would hold the weights of every layer in FP8, too",
        "leave precision.fp8 out",
    ),
    Row(
        "adapter.quantization precision.fp8",
        "fp8, without precision.fp8: tensorwise",
        lambda r: r.adapter.quantization == "fp8" and r.precision.fp8 != "tensorwise",
        "weights that are held in FP8 have one scale each, so matrix products must be in FP8 with one scale a tensor",
        "set precision.fp8: tensorwise",
    ),
    Row(
        "adapter.quantization runtime.offload_layers runtime.offload_modules",
        "nf4, fp4 or fp8, with activations that wait in CPU memory",
        lambda r: r.adapter.quantization != "none" and (r.runtime.offload_layers or r.runtime.offload_modules),
        "what a quantized layer keeps for the backward pass is not moved",
        "use runtime.recompute instead",
    ),
    Row(
        "adapter.init",
        "pissa, with adapter.share_a: true",
        lambda r: r.adapter.init == "pissa" and r.adapter.share_a,
        "each module's A starts with its own singular vectors",
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
        "adapter.several",
        "a name with other characters than letters, digits, _ and -",
        lambda r: any(not re.fullmatch(r"[A-Za-z0-9_-]+", name) for name in r.adapter.several),
        "names become folders",
        "use letters, digits, _ and - only",
    ),
    Row(
        "adapter.several",
        "a rank below 1, an alpha of 0 or less, a dropout outside 0 ≤ x < 1, an empty list of targets",
        lambda r: any(_out_of_bounds(one) for one in r.adapter.several.values()),
        "such an adapter can't be",
        "give a possible value",
    ),
    Row(
        "adapter.several",
        "a path, beside other keys of the same adapter",
        lambda r: any(one.path and one != NamedAdapter(path=one.path) for one in r.adapter.several.values()),
        "the folder decides them",
        "leave those out, or the path to start anew",
    ),
    Row(
        "adapter.several",
        "any, with adapter.path, adapter.modules_to_save, adapter.init: pissa or adapter.merge: true",
        lambda r: (
            r.adapter.several
            and (r.adapter.path or r.adapter.modules_to_save or r.adapter.init == "pissa" or r.adapter.merge)
        ),
        "several adapters stand on one unchanged model, and there is no one model that they are merged into",
        "give each its own path, and merge the one you want with `mcore-swift merge`",
    ),
    Row(
        "adapter.several data.adapter_field",
        "one without the other",
        lambda r: bool(r.adapter.several) != bool(r.data.adapter_field),
        "each row has to say which of the adapters it trains",
        "name the rows' field in data.adapter_field, and the adapters in adapter.several",
    ),
    Row(
        "data.adapter_field",
        "any, with data.streaming, data.format: indexed or synthetic, or an objective.name other than sft",
        lambda r: (
            r.data.adapter_field
            and (r.data.streaming or r.data.format in ("indexed", "synthetic") or r.objective.name != "sft")
        ),
        "rows are told apart in tokenized files of conversations, questions and texts, for sft",
        "leave it out, and train the adapters one by one",
    ),
    Row(
        "moe.expert_bias_update_rate",
        "more than 0, with adapter.name: lora",
        lambda r: r.adapter.name != "none" and r.moe.expert_bias_update_rate,
        "it changes the frozen model's correction biases, which neither the adapter nor its checkpoints hold",
        "leave it out",
    ),
    Row(
        "model.mtp_loss_scale",
        "more than 0, with adapter.name: lora",
        lambda r: r.adapter.name != "none" and r.model.mtp_loss_scale,
        "the layers of multi-token prediction are frozen and have no adapters",
        "leave it out",
    ),
    Row(
        "optimizer.fsdp optimizer.name",
        "fsdp, or muon, with adapter.name: lora",
        lambda r: r.adapter.name != "none" and (r.optimizer.fsdp or r.optimizer.name == "muon"),
        "neither sharded parameters nor muon's updates are proved for adapters",
        "use optimizer.name: adam or sgd, without fsdp",
    ),
    Row(
        "runtime.ep_overlap precision.fp8_param_gather",
        "true, with adapter.name: lora",
        lambda r: r.adapter.name != "none" and (r.runtime.ep_overlap or r.precision.fp8_param_gather),
        "it is not proved for a frozen model with adapters",
        "leave it out",
    ),
    Row(
        "model.init",
        "random, with adapter.name: lora, data and results that are kept",
        lambda r: r.adapter.name != "none" and r.model.init == "random" and r.data.format != "synthetic" and _saves(r),
        "random weights are frozen beside the adapters, so nothing useful can be learned",
        "use pretrained weights, or, to measure, set checkpoint.final and export: false (or data.format: synthetic)",
    ),
]
