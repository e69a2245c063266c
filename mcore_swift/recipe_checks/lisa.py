"""Rules about LISA, which trains a few layers at a time."""

from __future__ import annotations

from dataclasses import dataclass

from mcore_swift.recipe import OptimizerSection, Recipe
from mcore_swift.recipe_checks.optimizer import lean_states
from mcore_swift.recipe_checks.table import Row


def _on(recipe: Recipe) -> bool:
    return recipe.optimizer.lisa_layers is not None


_KEY = "optimizer.lisa_layers"

LISA: list[Row[Recipe]] = [
    Row(
        "optimizer.lisa_interval",
        "any, without optimizer.lisa_layers",
        lambda r: not _on(r) and r.optimizer.lisa_interval != OptimizerSection().lisa_interval,
        "{r.optimizer.lisa_interval} does nothing without optimizer.lisa_layers",
        "set it, or leave the interval out",
    ),
    Row(
        _KEY,
        "any, with adapter.name, model.trainable or model.freeze",
        lambda r: _on(r) and (r.adapter.name != "none" or r.model.partly_frozen),
        "LISA decides itself what is trained",
        "leave adapter.name, model.trainable and model.freeze out",
    ),
    Row(
        _KEY,
        "any, with another optimizer.name than adam",
        lambda r: _on(r) and r.optimizer.name != "adam",
        "LISA is proved with adam, found optimizer.name: {r.optimizer.name}",
        "use optimizer.name: adam",
    ),
    Row(
        _KEY,
        "any, with optimizer.fsdp, states in less than fp32 or on the CPU, or precision.fp8_param_gather",
        lambda r: (
            _on(r)
            and (r.optimizer.fsdp or lean_states(r) or r.optimizer.offload_fraction or r.precision.fp8_param_gather)
        ),
        "passing a layer over is proved for states in fp32 on the device alone",
        "leave out fsdp, main_params, the dtypes of the moments, offload_fraction and precision.fp8_param_gather",
    ),
    Row(
        _KEY,
        "any, with runtime.overlap: true or runtime.ep_overlap",
        lambda r: _on(r) and (r.runtime.overlap or r.runtime.ep_overlap),
        "a gradient's reduction starts when all of a bucket's parameters have one, and those of other layers never do",
        "leave runtime.overlap and runtime.ep_overlap out",
    ),
    Row(
        _KEY,
        "any, with moe.expert_bias_update_rate or model.mtp_loss_scale more than 0",
        lambda r: _on(r) and (r.moe.expert_bias_update_rate or r.model.mtp_loss_scale),
        "correction biases and the layers of multi-token prediction would change in every step",
        "leave moe.expert_bias_update_rate and model.mtp_loss_scale out",
    ),
]


@dataclass(frozen=True)
class Layers:
    """A recipe and the number of its model's decoder layers."""

    recipe: Recipe
    num_layers: int


LISA_LAYERS: list[Row[Layers]] = [
    Row(
        _KEY,
        "more than the model has layers",
        lambda r: (r.recipe.optimizer.lisa_layers or 0) > r.num_layers,
        "{r.recipe.optimizer.lisa_layers} of {r.num_layers} layers",
        "at most {r.num_layers} can be trained at a time",
    ),
]
