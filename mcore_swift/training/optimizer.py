"""Megatron's data parallel wrapper and optimizer for a recipe.

What the wrapper and the optimizer are told is made by functions of the recipe alone (`data_parallel_config`,
`optimizer_config`), so that what a key means to Megatron is tested without the hardware that the key needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from mcore_swift.parallel import ParallelPlan
from mcore_swift.recipe import OptimizerSection, Recipe

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig
    from megatron.core.transformer import TransformerConfig

    from mcore_swift.models.layers import DecoderModel

# What torch calls the precision of float32 matrix products; the Newton-Schulz iteration runs in it.
MATMUL_PRECISIONS = {"bf16": "medium", "tf32": "high", "fp32": "highest"}


def data_parallel_config(recipe: Recipe, plan: ParallelPlan, *, overlap: bool) -> DistributedDataParallelConfig:
    """How gradients and parameters are held and exchanged over data parallel ranks.

    `overlap` hides the reduction behind the backward pass, and the parameters' all-gather behind the forward pass.
    """
    from megatron.core.distributed import DistributedDataParallelConfig

    fields: dict[str, Any] = {
        "grad_reduce_in_fp32": True,
        "overlap_grad_reduce": overlap and plan.dp > 1,
        "overlap_param_gather": overlap and plan.dp > 1 and recipe.optimizer.distributed,
        "use_distributed_optimizer": recipe.optimizer.distributed,
        "average_in_collective": False,
        "delay_wgrad_compute": recipe.runtime.delay_wgrad,
        **fp8_gather_fields(recipe),
    }
    return DistributedDataParallelConfig(**fields)


def fp8_gather_fields(recipe: Recipe) -> dict[str, bool]:
    """The fields that the wrapper and the optimizer share. MXFP8 needs the gradients' memory for its two copies."""
    if not recipe.precision.fp8_param_gather:
        return {}
    found = {"fp8_param_gather": True}
    return found | ({"reuse_grad_buf_for_mxfp8_param_ag": True} if recipe.precision.fp8 == "mxfp8" else {})


def wrap_chunks(
    chunks: Sequence[DecoderModel], config: TransformerConfig, recipe: Recipe, plan: ParallelPlan, *, overlap: bool
) -> list[DistributedDataParallel]:
    """Wraps each model chunk in Megatron's DDP: contiguous fp32 gradient buffers, reduced over data parallel ranks."""
    from megatron.core.distributed import DistributedDataParallel

    if recipe.optimizer.fsdp:
        from mcore_swift.training import fsdp

        return fsdp.wrap(chunks, config, recipe, device=next(chunks[0].parameters()).device)
    ddp = data_parallel_config(recipe, plan, overlap=overlap)
    # The first chunk's bucket is reduced last and cannot be hidden: later chunks are not split (Megatron's own choice).
    return [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=number > 0) for number, chunk in enumerate(chunks)
    ]


def precision_aware(section: OptimizerSection) -> bool:
    """Whether Megatron leaves the fp32 parameters to the optimizer, which may hold its states in other forms."""
    moments = (section.exp_avg_dtype, section.exp_avg_sq_dtype)
    return section.main_params != "fp32" or moments != ("fp32", "fp32") or section.offload_fraction > 0


def optimizer_config(recipe: Recipe, *, bf16: bool, overlap_param_gather: bool) -> OptimizerConfig:
    """Megatron's OptimizerConfig. `bf16`: the model's parameters are bf16, and the optimizer keeps fp32 ones."""
    import torch
    from megatron.core.optimizer import OptimizerConfig

    section = recipe.optimizer
    gather = fp8_gather_fields(recipe)
    fields: dict[str, Any] = {
        "optimizer": "adam" if section.name == "galore" else section.name,  # GaLore then takes AdamW's place
        "lr": recipe.schedule.learning_rate,
        "min_lr": recipe.schedule.min_learning_rate,
        "weight_decay": section.weight_decay,
        "adam_beta1": section.beta1,
        "adam_beta2": section.beta2,
        "adam_eps": section.eps,
        "clip_grad": section.clip_grad,
        "bf16": bf16,
        "params_dtype": torch.bfloat16 if bf16 else torch.float32,
        "use_distributed_optimizer": section.distributed,
        "overlap_param_gather": overlap_param_gather,
        # Megatron decides by it who holds the fp32 parameters; with FP8 compute alone they are bf16's.
        "fp8_recipe": recipe.precision.fp8 if gather else None,
        "reuse_grad_buf_for_mxfp8_param_ag": gather.get("reuse_grad_buf_for_mxfp8_param_ag", False),
    }
    return OptimizerConfig(**fields | state_fields(section) | muon_fields(section))


def state_fields(section: OptimizerSection) -> dict[str, Any]:
    """Where and in what form Adam's states are held."""
    import torch

    if not precision_aware(section):
        return {}
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    fields: dict[str, Any] = {
        "use_precision_aware_optimizer": True,
        "store_param_remainders": section.main_params == "remainder",
        "exp_avg_dtype": dtypes[section.exp_avg_dtype],
        "exp_avg_sq_dtype": dtypes[section.exp_avg_sq_dtype],
    }
    if section.offload_fraction:
        fields |= {
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": section.offload_fraction,
            "overlap_cpu_optimizer_d2h_h2d": True,  # one parameter is copied while another is updated
        }
    return fields


def muon_fields(section: OptimizerSection) -> dict[str, Any]:
    """Muon's own settings.

    Megatron's default is to orthogonalize each tensor parallel shard by itself, which makes the update depend on the
    layout. Here the whole matrix is gathered, always.
    """
    if section.name != "muon":
        return {}
    return {
        "muon_momentum": section.muon_momentum,
        "muon_nesterov": section.muon_nesterov,
        "muon_num_ns_steps": section.muon_steps,
        "muon_coefficient_type": section.muon_coefficients,
        "muon_scale_mode": section.muon_scale,
        "muon_extra_scale_factor": section.muon_extra_scale,
        "muon_fp32_matmul_prec": MATMUL_PRECISIONS[section.muon_precision],
        "muon_split_qkv": True,
        "muon_tp_mode": "duplicated",
        "muon_scalar_optimizer": "adam",
    }


def build_optimizer(models: Sequence[DistributedDataParallel], recipe: Recipe, *, bf16: bool) -> MegatronOptimizer:
    """Megatron's optimizer (fp32 master weights under bf16). Biases and norms are not decayed."""
    import torch.distributed as dist
    from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
    from megatron.core.optimizer.optimizer_config import ParamKey

    overlap = models[0].ddp_config.overlap_param_gather
    config = optimizer_config(recipe, bf16=bf16, overlap_param_gather=overlap)
    gloo = dist.get_backend() == "gloo"  # on GPUs NCCL serves, and a thousand ranks save a set of groups
    overrides = get_standard_config_overrides(config)
    if recipe.adapter.learning_rate_ratio != 1:  # LoRA+ (Hayou et al. 2024, arXiv:2402.12354)
        overrides[ParamKey(name="*.lora_B.*")] = cast(Any, {"lr_mult": recipe.adapter.learning_rate_ratio})
    if recipe.adapter.name == "reft":  # a decayed rotation would turn the subspace towards some of the axes
        overrides[ParamKey(name="*.reft_rotation")] = cast(Any, {"wd_mult": 0.0})
    if recipe.optimizer.lisa_layers is not None:
        from mcore_swift.training.lisa import layer_groups

        overrides |= cast(Any, layer_groups([cast(Any, model).module for model in models]))
    return get_megatron_optimizer(config, list(models), overrides, use_gloo_process_groups=gloo)  # type: ignore[arg-type]


def set_learning_rate(optimizer: Any, learning_rate: float, weight_decay: float) -> None:
    """Sets this step's learning rate and weight decay in every parameter group, times the group's own multipliers."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
