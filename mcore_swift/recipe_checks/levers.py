"""Rules about memory and overlap levers that the recipe alone decides.

What they rest on is megatron-core 0.19.2 (the checks of TransformerConfig and OptimizerConfig, and those of its own
training script that concern more than its command line) and Transformer Engine 2.20.
"""

from __future__ import annotations

from mcore_swift.recipe import OptimizerSection, Recipe
from mcore_swift.recipe_checks.table import Row

# TransformerConfig.recompute_modules and .offload_modules, but for what no family here has.
RECOMPUTE_MODULES = ("core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts")
OFFLOAD_MODULES = ("attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act")
IN_EXPERTS = {"moe_act", "expert_fc1"}
MUON_KEYS = [name for name in OptimizerSection.__dataclass_fields__ if name.startswith("muon_")]


def recomputes(recipe: Recipe, *modules: str) -> bool:
    """Whether one of `modules` is recomputed by itself."""
    return recipe.runtime.recompute == "selective" and bool(set(modules) & set(recipe.runtime.recompute_modules))


def lean_states(recipe: Recipe) -> bool:
    """Whether a part of Adam's states is held in less than fp32."""
    section = recipe.optimizer
    return (section.main_params, section.exp_avg_dtype, section.exp_avg_sq_dtype) != ("fp32", "fp32", "fp32")


def muon_options(recipe: Recipe) -> list[str]:
    """Muon's keys that are not at their defaults."""
    defaults = OptimizerSection()
    return [key for key in MUON_KEYS if getattr(recipe.optimizer, key) != getattr(defaults, key)]


LEAN_KEYS = "optimizer.main_params optimizer.exp_avg_dtype optimizer.exp_avg_sq_dtype"

RECOMPUTE: list[Row[Recipe]] = [
    Row(
        "runtime.recompute_modules",
        "others than " + ", ".join(RECOMPUTE_MODULES),
        lambda r: set(r.runtime.recompute_modules) - set(RECOMPUTE_MODULES),
        "found {r.runtime.recompute_modules}",
        "allowed: " + ", ".join(RECOMPUTE_MODULES),
    ),
    Row(
        "runtime.recompute_modules",
        "empty, with runtime.recompute: selective",
        lambda r: r.runtime.recompute == "selective" and not r.runtime.recompute_modules,
        "it is empty, but runtime.recompute is selective",
        "name one of " + ", ".join(RECOMPUTE_MODULES),
    ),
    Row(
        "runtime.recompute_modules",
        "any, with another runtime.recompute than selective",
        lambda r: r.runtime.recompute != "selective" and r.runtime.recompute_modules != ["core_attn"],
        "they are used by runtime.recompute: selective only, found {r.runtime.recompute}",
        "leave them out",
    ),
    Row(
        "runtime.recompute_layers",
        "any, with another runtime.recompute than full",
        lambda r: r.runtime.recompute != "full" and r.runtime.recompute_layers != 1,
        "it is used by runtime.recompute: full only, found {r.runtime.recompute}",
        "leave it out",
    ),
    Row(
        "runtime.recompute_method",
        "block, with another runtime.recompute than full",
        lambda r: r.runtime.recompute != "full" and r.runtime.recompute_method != "uniform",
        "{r.runtime.recompute_method} is used by runtime.recompute: full only, found {r.runtime.recompute}",
        "leave it out",
    ),
    Row(
        "runtime.recompute_modules",
        "moe together with moe_act or shared_experts",
        lambda r: recomputes(r, "moe") and recomputes(r, "moe_act", "shared_experts"),
        "moe recomputes the whole layer of experts, moe_act and shared_experts are parts of it",
        "name either the whole or parts",
    ),
    Row(
        "runtime.recompute_modules",
        "moe_act or layernorm, with precision.fp8: delayed",
        lambda r: recomputes(r, "moe_act", "layernorm") and r.precision.fp8 == "delayed",
        "moe_act and layernorm would be quantized a second time, with delayed scales that have moved on",
        "use another precision.fp8, or recompute mlp or moe",
    ),
]

OFFLOAD: list[Row[Recipe]] = [
    Row(
        "runtime.offload_modules",
        "others than " + ", ".join(OFFLOAD_MODULES),
        lambda r: set(r.runtime.offload_modules) - set(OFFLOAD_MODULES),
        "found {r.runtime.offload_modules}",
        "allowed: " + ", ".join(OFFLOAD_MODULES),
    ),
    Row(
        "runtime.offload_modules runtime.offload_layers",
        "both",
        lambda r: r.runtime.offload_modules and r.runtime.offload_layers,
        "whole layers and parts of layers are offloaded by two mechanisms that know nothing of each other",
        "set one of them",
    ),
    Row(
        "runtime.offload_modules",
        "attn_proj without core_attn",
        lambda r: "attn_proj" in r.runtime.offload_modules and "core_attn" not in r.runtime.offload_modules,
        "attn_proj's input is core_attn's output, which core_attn's backward pass holds on to",
        "add core_attn",
    ),
    Row(
        "runtime.offload_modules",
        "moe_act or expert_fc1, with recompute_modules: [moe]",
        lambda r: IN_EXPERTS & set(r.runtime.offload_modules) and recomputes(r, "moe"),
        "moe recomputes all that moe_act and expert_fc1 would offload",
        "leave them out, or don't recompute moe",
    ),
    Row(
        "runtime.offload_modules",
        "any, with runtime.recompute: full",
        lambda r: r.runtime.offload_modules and r.runtime.recompute == "full",
        "full recomputation keeps nothing of a layer's inside that could be offloaded",
        "use runtime.recompute: selective or none",
    ),
    Row(
        "runtime.offload_layers",
        "any, with recomputation",
        lambda r: r.runtime.offload_layers and r.runtime.recompute != "none",
        "Megatron offloads whole layers only where nothing is recomputed, found runtime.recompute: "
        "{r.runtime.recompute}",
        "leave one out, or use runtime.offload_modules, which go with recompute: selective",
    ),
    Row(
        "runtime.offload_layers",
        "any, with pipeline stages",
        lambda r: r.runtime.offload_layers and r.parallel.pp > 1,
        "Megatron offloads whole layers only without pipeline stages, found parallel.pp {r.parallel.pp}",
        "use runtime.offload_modules",
    ),
]

STATES: list[Row[Recipe]] = [
    Row(
        "optimizer.name",
        "sgd or muon, with optimizer.distributed: true",
        lambda r: r.optimizer.name != "adam" and r.optimizer.distributed,
        "{r.optimizer.name} is not sharded by Megatron's distributed optimizer",
        "set optimizer.distributed: false",
    ),
    Row(
        "optimizer.muon_*",
        "any, with another optimizer.name than muon",
        lambda r: r.optimizer.name != "muon" and muon_options(r),
        "muon's settings do nothing for optimizer.name: {r.optimizer.name}",
        "set optimizer.name: muon, or leave them out",
    ),
    Row(
        LEAN_KEYS,
        "less than fp32, with another optimizer.name than adam",
        lambda r: lean_states(r) and r.optimizer.name != "adam",
        "they are forms of Adam's states, found optimizer.name: {r.optimizer.name}",
        "leave them out",
    ),
    Row(
        LEAN_KEYS,
        "less than fp32, with optimizer.distributed: false",
        lambda r: lean_states(r) and not r.optimizer.distributed,
        "only the distributed optimizer leaves the fp32 parameters to Adam's own kernel",
        "set optimizer.distributed: true",
    ),
    Row(
        LEAN_KEYS,
        "less than fp32, with precision.dtype: fp32",
        lambda r: lean_states(r) and r.precision.dtype == "fp32",
        "the optimizer has no states of its own for fp32 parameters to save on",
        "use precision.dtype: bf16, or leave them out",
    ),
    Row(
        "optimizer.main_params",
        "remainder, with precision.fp8_param_gather, unless precision.fp8 is delayed",
        lambda r: (
            r.optimizer.main_params == "remainder" and r.precision.fp8_param_gather and r.precision.fp8 != "delayed"
        ),
        "there are no bf16 parameters that fp32 ones could be the remainder of",
        "set optimizer.main_params: fp32",
    ),
    Row(
        "optimizer.offload_fraction",
        "greater than 0, with states in less than fp32",
        lambda r: r.optimizer.offload_fraction and lean_states(r),
        "the CPU's Adam holds its states in fp32",
        "leave out main_params and the dtypes of the moments",
    ),
    Row(
        "optimizer.offload_fraction",
        "greater than 0, with another optimizer.name than adam",
        lambda r: r.optimizer.offload_fraction and r.optimizer.name != "adam",
        "{r.optimizer.offload_fraction} of {r.optimizer.name}'s states can't be offloaded",
        "use optimizer.name: adam",
    ),
    Row(
        "optimizer.offload_fraction",
        "greater than 0, with optimizer.distributed: false",
        lambda r: r.optimizer.offload_fraction and not r.optimizer.distributed,
        "each rank would update all parameters on its CPU, and they share its memory",
        "set optimizer.distributed: true",
    ),
    Row(
        "optimizer.offload_fraction",
        "greater than 0, with precision.fp8_param_gather, unless precision.fp8 is delayed",
        lambda r: r.optimizer.offload_fraction and r.precision.fp8_param_gather and r.precision.fp8 != "delayed",
        "the CPU's Adam can't quantize what it has updated",
        "use precision.fp8: delayed, or leave fp8_param_gather out",
    ),
]

FP8_GATHER: list[Row[Recipe]] = [
    Row(
        "precision.fp8_param_gather",
        "true, without precision.fp8",
        lambda r: r.precision.fp8_param_gather and not r.precision.fp8,
        "there are no FP8 parameters without precision.fp8",
        "set precision.fp8, or leave it out",
    ),
    Row(
        "precision.fp8_param_gather",
        "true, with optimizer.distributed: false",
        lambda r: r.precision.fp8_param_gather and not r.optimizer.distributed,
        "parameters are gathered by the distributed optimizer only",
        "set optimizer.distributed: true",
    ),
    Row(
        "precision.fp8_param_gather",
        "true, with model.init: pretrained",
        lambda r: r.precision.fp8_param_gather and r.model.init != "random",
        "parameters that exist in FP8 only can't be filled part by part: each part would change the tensor's scale",
        "it is for model.init: random; otherwise leave it out",
    ),
    Row(
        "precision.fp8_param_gather",
        "true, with checkpoint.dir",
        lambda r: r.precision.fp8_param_gather and r.checkpoint.dir and r.checkpoint.resume != "never",
        "parameters that exist in FP8 only can't be restored from a checkpoint part by part",
        "set checkpoint.resume: never, or leave it out",
    ),
]

OVERLAP: list[Row[Recipe]] = [
    Row(
        "runtime.tp_overlap",
        "true, with parallel.tp: 1",
        lambda r: r.runtime.tp_overlap and r.parallel.tp == 1,
        "with parallel.tp: 1 there is no tensor parallel communication",
        "leave it out",
    ),
    Row(
        "runtime.tp_overlap",
        "true, with parallel.sequence_parallel: false",
        lambda r: r.runtime.tp_overlap and r.parallel.sequence_parallel is False,
        "what is hidden are sequence parallelism's gathers and scatters, and parallel.sequence_parallel is false",
        "leave parallel.sequence_parallel out",
    ),
    Row(
        "runtime.tp_overlap",
        "true, with rows of differing lengths (data.packing: false)",
        lambda r: r.runtime.tp_overlap and not r.data.fixed_length,
        "its buffers are made once, for micro-batches of one length",
        "set data.packing: true",
    ),
    Row(
        "runtime.tp_overlap",
        "true, with sequence_length not a multiple of tp x cp",
        lambda r: r.runtime.tp_overlap and r.data.sequence_length % (r.parallel.tp * r.parallel.cp),
        "its buffers are made for data.sequence_length {r.data.sequence_length}, which is padded for "
        "tp {r.parallel.tp} x cp {r.parallel.cp}",
        "make it a multiple of them",
    ),
    Row(
        "runtime.ep_overlap",
        "true, with parallel.ep: 1",
        lambda r: r.runtime.ep_overlap and r.parallel.ep == 1,
        "with parallel.ep: 1 experts exchange nothing",
        "raise parallel.ep or leave it out",
    ),
    Row(
        "runtime.ep_overlap",
        "true, with pipeline stages that are not interleaved",
        lambda r: r.runtime.ep_overlap and r.parallel.pp > 1 and r.parallel.vpp == 1,
        "with parallel.pp {r.parallel.pp} only the interleaved schedule has two micro-batches to combine",
        "set parallel.vpp to 2 or more",
    ),
    Row(
        "runtime.ep_overlap",
        "true, with precision.dtype: fp32",
        lambda r: r.runtime.ep_overlap and r.precision.dtype == "fp32",
        "Megatron combines forward and backward passes in bf16 only",
        "use precision.dtype: bf16",
    ),
    Row(
        "runtime.ep_overlap",
        "true, with runtime.recompute: full",
        lambda r: r.runtime.ep_overlap and r.runtime.recompute == "full",
        "layers are taken apart to combine them, so they can't be recomputed whole",
        "use runtime.recompute: selective, without moe",
    ),
    Row(
        "runtime.ep_overlap",
        "true, with recompute_modules: [moe]",
        lambda r: r.runtime.ep_overlap and recomputes(r, "moe"),
        "recomputing moe would repeat the exchange that is to be hidden",
        "recompute moe_act, layernorm or core_attn",
    ),
    Row(
        "runtime.ep_overlap",
        "true, with runtime.offload_layers",
        lambda r: r.runtime.ep_overlap and r.runtime.offload_layers,
        "layers are taken apart to combine them, so they can't be offloaded whole",
        "use runtime.offload_modules",
    ),
    Row(
        "runtime.delay_wgrad",
        "true, without runtime.ep_overlap",
        lambda r: r.runtime.delay_wgrad and not r.runtime.ep_overlap,
        "weight gradients are delayed to hide more of the experts' exchange, which is not overlapped",
        "set runtime.ep_overlap: true, or leave it out",
    ),
]

FSDP: list[Row[Recipe]] = [
    Row(
        "optimizer.fsdp",
        "any",
        lambda r: r.optimizer.fsdp,
        "{r.optimizer.fsdp} is not supported yet",
        "leave it out",
    ),
]

LEVERS = [*RECOMPUTE, *OFFLOAD, *STATES, *FP8_GATHER, *OVERLAP, *FSDP]
