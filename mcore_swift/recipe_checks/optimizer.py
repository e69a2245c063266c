"""Rules about the optimizer: in what form its states are held, where, and what is sharded over data parallel ranks."""

from __future__ import annotations

from mcore_swift.recipe import OptimizerSection, Recipe
from mcore_swift.recipe_checks.table import Row

MUON_KEYS = [name for name in OptimizerSection.__dataclass_fields__ if name.startswith("muon_")]


def lean_states(recipe: Recipe) -> bool:
    """Whether a part of Adam's states is held in less than fp32."""
    section = recipe.optimizer
    return (section.main_params, section.exp_avg_dtype, section.exp_avg_sq_dtype) != ("fp32", "fp32", "fp32")


def muon_options(recipe: Recipe) -> list[str]:
    """Muon's keys that are not at their defaults."""
    defaults = OptimizerSection()
    return [key for key in MUON_KEYS if getattr(recipe.optimizer, key) != getattr(defaults, key)]


LEAN_KEYS = "optimizer.main_params optimizer.exp_avg_dtype optimizer.exp_avg_sq_dtype"

STATES: list[Row[Recipe]] = [
    Row(
        "optimizer.name",
        "sgd, muon or galore, with optimizer.distributed: true",
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
        "greater than 0, with precision.dtype: fp32",
        lambda r: r.optimizer.offload_fraction and r.precision.dtype == "fp32",
        "Megatron offloads what bf16 parameters need beside themselves; fp32 parameters it can't offload",
        "use precision.dtype: bf16",
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

FSDP: list[Row[Recipe]] = [
    Row(
        "optimizer.fsdp",
        "any, with tensor, context, expert or pipeline parallelism",
        lambda r: r.optimizer.fsdp and max(r.parallel.tp, r.parallel.pp, r.parallel.cp, r.parallel.ep) > 1,
        "{r.optimizer.fsdp} is proved for data parallelism alone, found tp {r.parallel.tp} pp {r.parallel.pp} "
        "cp {r.parallel.cp} ep {r.parallel.ep}",
        "set them to 1, or leave fsdp out",
    ),
    Row(
        "optimizer.fsdp",
        "any, with a checkpoint or an export",
        lambda r: r.optimizer.fsdp and r.checkpoint.dir and (c := r.checkpoint) and (c.interval or c.final or c.export),
        "parameters in {r.optimizer.fsdp}'s shards can't be saved or exported yet",
        "leave checkpoint.dir out, or set checkpoint.final and export: false (to measure)",
    ),
    Row(
        "optimizer.fsdp",
        "any, with another optimizer.name than adam",
        lambda r: r.optimizer.fsdp and r.optimizer.name != "adam",
        "{r.optimizer.fsdp} is proved with adam only, found optimizer.name: {r.optimizer.name}",
        "use optimizer.name: adam",
    ),
    Row(
        "optimizer.fsdp",
        "megatron, with optimizer.distributed: false",
        lambda r: r.optimizer.fsdp == "megatron" and not r.optimizer.distributed,
        "megatron shards the optimizer's states too",
        "set optimizer.distributed: true",
    ),
    Row(
        "optimizer.fsdp",
        "torch, with optimizer.distributed: true",
        lambda r: r.optimizer.fsdp == "torch" and r.optimizer.distributed,
        "torch shards states by itself, and Megatron's distributed optimizer can't take its shards",
        "set optimizer.distributed: false",
    ),
    Row(
        "optimizer.fsdp",
        "any, with states in less than fp32, or on the CPU",
        lambda r: r.optimizer.fsdp and (lean_states(r) or r.optimizer.offload_fraction),
        "{r.optimizer.fsdp} holds the states itself, in fp32",
        "leave out main_params, the dtypes of the moments and offload_fraction",
    ),
    Row(
        "optimizer.fsdp",
        "any, with precision.fp8_param_gather",
        lambda r: r.optimizer.fsdp and r.precision.fp8_param_gather,
        "{r.optimizer.fsdp}'s shards are gathered in bf16 here",
        "leave precision.fp8_param_gather out",
    ),
    Row(
        "optimizer.fsdp",
        "any, with runtime.overlap: false",
        lambda r: r.optimizer.fsdp and r.runtime.overlap is False,
        "{r.optimizer.fsdp} always overlaps",
        "leave runtime.overlap out",
    ),
]

OPTIMIZER = [*STATES, *FP8_GATHER, *FSDP]
