"""Rules about memory and overlap levers that the recipe alone decides.

What they rest on is megatron-core 0.19.2 (the checks of TransformerConfig and OptimizerConfig, and those of its own
training script that concern more than its command line) and Transformer Engine 2.20.
"""

from __future__ import annotations

from mcore_swift.recipe import Recipe
from mcore_swift.recipe_checks.objective import SCORED
from mcore_swift.recipe_checks.table import Row

# TransformerConfig.recompute_modules and .offload_modules, but for what no family here has.
RECOMPUTE_MODULES = ("core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts")
OFFLOAD_MODULES = ("attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act")
MULTIPLE = 16  # positions of a rank that pass the output layer: kernels are compiled for it, and FP8 wants it
IN_EXPERTS = {"moe_act", "expert_fc1"}


def recomputes(recipe: Recipe, *modules: str) -> bool:
    """Whether one of `modules` is recomputed by itself."""
    return recipe.runtime.recompute == "selective" and bool(set(modules) & set(recipe.runtime.recompute_modules))


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

LOSS_CHUNK: list[Row[Recipe]] = [
    Row(
        "runtime.loss_chunk",
        f"not a multiple of {MULTIPLE} x parallel.tp",
        lambda r: r.runtime.loss_chunk % (MULTIPLE * r.parallel.tp),
        "found {r.runtime.loss_chunk}; tensor parallel ranks share a chunk out, each a multiple of 16 positions",
        "make it a multiple of 16 x parallel.tp",
    ),
    Row(
        "runtime.loss_chunk",
        "any, with objective.name: " + " or ".join((*SCORED, "distill")),
        lambda r: r.runtime.loss_chunk and r.objective.name in (*SCORED, "distill"),
        "{r.objective.name} has no logits of all positions at once",
        "leave it out",
    ),
    Row(
        "runtime.loss_chunk",
        "any, with model.mtp_loss_scale",
        lambda r: r.runtime.loss_chunk and r.model.mtp_loss_scale,
        "the loss of multi-token prediction needs the logits of all positions at once",
        "leave one of them out",
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
        "true, with packed documents and parallel.cp > 1",
        lambda r: r.runtime.tp_overlap and r.parallel.cp > 1 and r.data.packing and r.data.format != "synthetic",
        "its buffers are made once, but with parallel.cp {r.parallel.cp} each packed document is padded by itself:"
        " lengths differ",
        "leave it out",
    ),
    Row(
        "runtime.tp_overlap",
        "true, with sequence_length not a multiple of tp x cp, and of 2 x tp x cp from cp 2 on",
        lambda r: (
            r.runtime.tp_overlap
            and r.data.sequence_length % (r.parallel.tp * (2 * r.parallel.cp if r.parallel.cp > 1 else 1))
        ),
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

LEVERS = [*RECOMPUTE, *LOSS_CHUNK, *OFFLOAD, *OVERLAP]
