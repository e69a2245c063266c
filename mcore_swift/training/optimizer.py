"""Megatron's DDP wrapper and optimizer for a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mcore_swift.parallel import ParallelPlan
from mcore_swift.recipe import Recipe

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.transformer import TransformerConfig

    from mcore_swift.models.layers import DecoderModel


def wrap_chunks(
    chunks: Sequence[DecoderModel], config: TransformerConfig, recipe: Recipe, plan: ParallelPlan, *, overlap: bool
) -> list[DistributedDataParallel]:
    """Wraps each model chunk in Megatron's DDP: contiguous fp32 gradient buffers, reduced over data parallel ranks.

    `overlap` hides the reduction behind the backward pass, and the parameters' all-gather behind the forward pass.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    distributed = recipe.optimizer.distributed
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap and plan.dp > 1,
        overlap_param_gather=overlap and plan.dp > 1 and distributed,
        use_distributed_optimizer=distributed,
        average_in_collective=False,
    )
    # The first chunk's bucket is reduced last and cannot be hidden: later chunks are not split (Megatron's own choice).
    return [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=number > 0) for number, chunk in enumerate(chunks)
    ]


def build_optimizer(models: Sequence[DistributedDataParallel], recipe: Recipe, *, bf16: bool) -> MegatronOptimizer:
    """Megatron's optimizer (fp32 master weights under bf16). Biases and norms are not decayed."""
    import torch
    import torch.distributed as dist
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    section = recipe.optimizer
    config = OptimizerConfig(
        optimizer=section.name,
        lr=recipe.schedule.learning_rate,
        min_lr=recipe.schedule.min_learning_rate,
        weight_decay=section.weight_decay,
        adam_beta1=section.beta1,
        adam_beta2=section.beta2,
        adam_eps=section.eps,
        clip_grad=section.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=section.distributed,
        overlap_param_gather=models[0].ddp_config.overlap_param_gather,
    )
    gloo = dist.get_backend() == "gloo"  # on GPUs NCCL serves, and a thousand ranks save a set of groups
    return get_megatron_optimizer(config, list(models), use_gloo_process_groups=gloo)  # type: ignore[arg-type]


def set_learning_rate(optimizer: Any, learning_rate: float, weight_decay: float) -> None:
    """Sets this step's learning rate and weight decay in every parameter group, times the group's own multipliers."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
