"""Rules about memory and overlap levers on this platform, for this model: checked before a process group is made.

A lever that would silently do nothing is refused like one that can't work.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mcore_swift.parallel import ParallelPlan
from mcore_swift.recipe import Recipe
from mcore_swift.recipe_checks.levers import recomputes
from mcore_swift.recipe_checks.optimizer import lean_states
from mcore_swift.recipe_checks.table import Row, refuse

if TYPE_CHECKING:
    from mcore_swift.models.build import ModelSource


@dataclass(frozen=True)
class Run:
    """A recipe with the platform it is to run on, its layout, and its model's fields under TransformerConfig's names.

    `has_muon`: whether the package that Megatron-Core takes Muon from is installed.
    """

    recipe: Recipe
    plan: ParallelPlan
    on_cpu: bool
    fields: Mapping[str, Any]
    family: str
    has_muon: bool
    tied: bool = False

    @property
    def experts(self) -> int:
        return self.fields.get("num_moe_experts") or 0

    @property
    def shared_experts(self) -> bool:
        return bool(self.fields.get("moe_shared_expert_intermediate_size"))

    @property
    def latent_attention(self) -> bool:
        return bool(self.fields.get("multi_latent_attention"))

    @property
    def layers(self) -> int:
        return self.fields["num_layers"]

    @property
    def only_experts(self) -> bool:
        """Whether no layer has a dense feed-forward part."""
        places = self.fields.get("moe_layer_freq", 1)
        return bool(self.experts) and (places == 1 or (not isinstance(places, int) and all(places)))


ON_CPU: list[Row[Run]] = [
    Row(
        "runtime.recompute_modules",
        "layernorm, mla_up_proj or moe_act, on the CPU",
        lambda r: r.on_cpu and recomputes(r.recipe, "layernorm", "mla_up_proj", "moe_act"),
        "layernorm, mla_up_proj and moe_act drop their outputs too, which Megatron does with Transformer Engine only",
        "recompute core_attn, mlp, moe or shared_experts",
    ),
    Row(
        "runtime.offload_layers runtime.offload_modules",
        "any, on the CPU",
        lambda r: r.on_cpu and (r.recipe.runtime.offload_layers or r.recipe.runtime.offload_modules),
        "activations are moved from a GPU's memory to the CPU's, where they are already",
        "leave them out",
    ),
    Row(
        "optimizer.offload_fraction",
        "greater than 0, on the CPU",
        lambda r: r.on_cpu and r.recipe.optimizer.offload_fraction,
        "{r.recipe.optimizer.offload_fraction} of the states would move from a GPU to the CPU, where they are already",
        "leave it out",
    ),
    Row(
        "optimizer.main_params optimizer.exp_avg_dtype optimizer.exp_avg_sq_dtype",
        "less than fp32, on the CPU",
        lambda r: r.on_cpu and lean_states(r.recipe),
        "Transformer Engine's FusedAdam is what holds states in less than fp32, and it needs a GPU",
        "leave them out",
    ),
    Row(
        "optimizer.fsdp",
        "any, on the CPU",
        lambda r: r.on_cpu and r.recipe.optimizer.fsdp,
        "{r.recipe.optimizer.fsdp}'s device meshes are made of GPUs",
        "leave it out",
    ),
    Row(
        "runtime.tp_overlap",
        "true, on the CPU",
        lambda r: r.on_cpu and r.recipe.runtime.tp_overlap,
        "Transformer Engine's user buffers need GPUs",
        "leave it out",
    ),
    Row(
        "runtime.ep_overlap runtime.delay_wgrad",
        "true, on the CPU",
        lambda r: r.on_cpu and r.recipe.runtime.ep_overlap,
        "without a GPU's streams there is nothing to hide the exchange behind",
        "leave it out",
    ),
    Row(
        "precision.fp8_param_gather",
        "true, on the CPU",
        lambda r: r.on_cpu and r.recipe.precision.fp8_param_gather,
        "FP8 needs an NVIDIA GPU with Transformer Engine",
        "leave precision.fp8 and fp8_param_gather out",
    ),
]

SHARING: list[Row[Run]] = [
    Row(
        "data.share_prompts",
        "true, for a model with latent attention",
        lambda r: r.recipe.data.share_prompts and r.latent_attention,
        "queries, keys and values of {r.family} come from several products",
        "leave it out",
    ),
    Row(
        "data.share_prompts",
        "true, for a model with dropout in its attention",
        lambda r: r.recipe.data.share_prompts and r.fields.get("attention_dropout"),
        "{r.family} has dropout in its attention here, and it would differ for the two copies of a prompt",
        "leave it out",
    ),
]

FOR_MODEL: list[Row[Run]] = [
    *SHARING,
    Row(
        "optimizer.fsdp",
        "any, for a model with experts",
        lambda r: r.recipe.optimizer.fsdp and r.experts,
        "{r.recipe.optimizer.fsdp} is proved for dense models only, and {r.family} has experts",
        "leave it out",
    ),
    Row(
        "optimizer.fsdp",
        "torch, for a model whose embeddings are its output layer",
        lambda r: r.recipe.optimizer.fsdp == "torch" and r.tied,
        "torch can't gather a tensor that belongs to two units, and {r.family}'s embeddings are its output layer here",
        "use megatron",
    ),
    Row(
        "optimizer.name",
        "muon, without the package emerging-optimizers",
        lambda r: r.recipe.optimizer.name == "muon" and not r.has_muon,
        "muon needs the package emerging-optimizers (0.3 or later), which is not installed here",
        "install mcore-swift[muon], or use adam",
    ),
    Row(
        "runtime.recompute_modules",
        "moe, moe_act or shared_experts, for a model without them",
        lambda r: (
            (recomputes(r.recipe, "moe", "moe_act") and not r.experts)
            or (recomputes(r.recipe, "shared_experts") and not r.shared_experts)
        ),
        "{r.recipe.runtime.recompute_modules} names experts that {r.family} doesn't have",
        "name core_attn or mlp",
    ),
    Row(
        "runtime.recompute_modules",
        "mla_up_proj, for a model without latent attention",
        lambda r: recomputes(r.recipe, "mla_up_proj") and not r.latent_attention,
        "mla_up_proj is a part of latent attention, which {r.family} doesn't have",
        "name core_attn or mlp",
    ),
    Row(
        "runtime.recompute_modules",
        "mlp, where every layer has experts",
        lambda r: recomputes(r.recipe, "mlp") and r.only_experts,
        "mlp is a dense layer's feed-forward part, and all layers of {r.family} have experts",
        "name moe",
    ),
    Row(
        "runtime.recompute_modules",
        "layernorm, on a GPU, for a model with neither experts nor latent attention",
        lambda r: recomputes(r.recipe, "layernorm") and not (r.on_cpu or r.experts or r.latent_attention),
        "Transformer Engine has the norms of {r.family} inside its linear layers, which recompute them anyway",
        "leave layernorm out",
    ),
    Row(
        "runtime.recompute_layers",
        "more than a pipeline chunk's layers",
        lambda r: r.recipe.runtime.recompute_layers > -(-r.layers // (r.plan.pp * r.plan.vpp)),
        "{r.recipe.runtime.recompute_layers} is more than the layers of a model chunk: {r.layers} layers on "
        "pp {r.plan.pp} x vpp {r.plan.vpp}",
        "lower it",
    ),
    Row(
        "runtime.offload_layers",
        "all of the model's layers, or more",
        lambda r: r.recipe.runtime.offload_layers >= r.layers,
        "{r.recipe.runtime.offload_layers} of {r.layers} layers, but the last one's activations are needed at once",
        "lower it",
    ),
    Row(
        "runtime.offload_modules",
        "expert_fc1 or moe_act, for a model without experts",
        lambda r: {"expert_fc1", "moe_act"} & set(r.recipe.runtime.offload_modules) and not r.experts,
        "{r.recipe.runtime.offload_modules} names parts of experts, which {r.family} doesn't have",
        "leave them out",
    ),
    Row(
        "runtime.ep_overlap",
        "true, for a model without experts",
        lambda r: r.recipe.runtime.ep_overlap and not r.experts,
        "{r.family} has no experts that would exchange anything",
        "leave it out",
    ),
]

LEVER_RULES = [*ON_CPU, *FOR_MODEL]


def check_levers(recipe: Recipe, plan: ParallelPlan, source: ModelSource, *, on_cpu: bool) -> None:
    """Raises InputError for a lever that can't work, or would do nothing, on this platform with this model."""
    refuse(LEVER_RULES, _run(recipe, plan, source, on_cpu))


def check_sharing(recipe: Recipe, plan: ParallelPlan, source: ModelSource) -> None:
    """Raises InputError for a frozen model beside the trained one that can't take prompts that are computed once."""
    refuse(SHARING, _run(recipe, plan, source, on_cpu=False))


def _run(recipe: Recipe, plan: ParallelPlan, source: ModelSource, on_cpu: bool) -> Run:
    has_muon = importlib.util.find_spec("emerging_optimizers") is not None
    fields = source.family.read_config(source.config)
    return Run(recipe, plan, on_cpu, fields, source.family.name, has_muon, source.tied)
