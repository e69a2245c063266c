"""Fully sharded data parallelism: parameters, gradients and states in shards, gathered layer by layer as they are used.

Two implementations that Megatron-Core offers: its own (Megatron-FSDP), and torch's `fully_shard`. What they can't do
here yet is refused by `recipe_checks.optimizer`: no checkpoint is written from shards, so these are for measuring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.torch_fully_sharded_data_parallel import TorchFullyShardedDataParallel
from megatron.core.distributed.torch_fully_sharded_data_parallel_config import TorchFullyShardedDataParallelConfig
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.transformer.transformer_layer import TransformerLayer

from mcore_swift.recipe import Recipe

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

    from mcore_swift.models.layers import DecoderModel

# What torch gathers at once. Megatron's default has the linear layers inside them as units too, which torch refuses
# where they are Megatron's own (not Transformer Engine's); the output layer is then the root's.
UNITS: set[Any] = {TransformerLayer, LanguageModelEmbedding}


class TorchFSDP(TorchFullyShardedDataParallel):
    """Megatron's wrapper of `fully_shard`, whose gradients are a mean over ranks and ignore the number of tokens.

    Everywhere else in this project they are sums divided by the global number of tokens: so here.
    """

    def scale_gradients(self, scaling_factor: float) -> None:
        factor = scaling_factor * dist.get_world_size(self.process_group)  # type: ignore[arg-type]
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


def megatron_config() -> DistributedDataParallelConfig:
    """Everything sharded (ZeRO-3), main parameters and gradients in fp32; it always overlaps."""
    return DistributedDataParallelConfig(
        use_megatron_fsdp=True,
        data_parallel_sharding_strategy="optim_grads_params",
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        average_in_collective=False,
        megatron_fsdp_main_params_dtype=torch.float32,
        megatron_fsdp_main_grads_dtype=torch.float32,
    )


def wrap(chunks: Sequence[DecoderModel], config: TransformerConfig, recipe: Recipe, *, device: torch.device) -> Any:
    """Shards the model over data parallel ranks; what it returns stands for Megatron's DDP."""
    (chunk,) = chunks  # no pipeline stages
    if recipe.optimizer.fsdp == "torch":
        # Under activation recomputation the order in which units are gathered must be told; Megatron's wrapper does.
        return [TorchFSDP(config, TorchFullyShardedDataParallelConfig(), chunk, sub_modules_to_wrap=UNITS)]
    from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel

    return [FullyShardedDataParallel(config, megatron_config(), chunk, device=device)]
