"""Memory and overlap levers: what the recipe's keys are in Megatron's TransformerConfig, and in the environment.

Functions of the recipe alone, so that they are tested without the hardware. What can't combine is refused by the rows
of `recipe_checks.levers` (the recipe alone) and `models.lever_rules` (with the platform and the model).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcore_swift.recipe import Recipe

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig


def precision_fields(recipe: Recipe) -> dict[str, object]:
    """FP8 (Transformer Engine recipes), and parameters that exist in FP8 only."""
    precision = recipe.precision
    if precision.fp8 is None:
        return {}
    return {"fp8": precision.fp8_format, "fp8_recipe": precision.fp8, "fp8_param": precision.fp8_param_gather}


def recompute_fields(recipe: Recipe) -> dict[str, object]:
    """Activations that are not kept but computed again in the backward pass."""
    runtime = recipe.runtime
    if runtime.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": runtime.recompute_modules}
    if runtime.recompute == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": runtime.recompute_method,
            "recompute_num_layers": runtime.recompute_layers,
        }
    return {}


def offload_fields(recipe: Recipe) -> dict[str, object]:
    """Activations that wait in CPU memory: of whole layers, or the inputs of some parts of each layer."""
    runtime = recipe.runtime
    if runtime.offload_layers:
        # Transformer Engine offloads weights too, unless told not to; parameters stay where the optimizer updates them.
        return {
            "cpu_offloading": True,
            "cpu_offloading_num_layers": runtime.offload_layers,
            "cpu_offloading_activations": True,
            "cpu_offloading_weights": False,
        }
    if runtime.offload_modules:
        return {"fine_grained_activation_offloading": True, "offload_modules": runtime.offload_modules}
    return {}


def overlap_fields(recipe: Recipe, *, overlap: bool) -> dict[str, object]:
    """Communication hidden behind compute. `overlap`: of pipeline stages, where the schedule is interleaved."""
    runtime = recipe.runtime
    fields: dict[str, object] = {"overlap_p2p_comm": overlap and recipe.parallel.vpp > 1}
    if fields["overlap_p2p_comm"]:
        fields["batch_p2p_comm"] = False
    if runtime.tp_overlap:
        fields["tp_comm_overlap"] = True
    if runtime.ep_overlap:
        fields |= {"overlap_moe_expert_parallel_comm": True, "delay_wgrad_compute": runtime.delay_wgrad}
    return fields


def config_fields(recipe: Recipe, *, overlap: bool) -> dict[str, object]:
    """All of the above."""
    return {
        **precision_fields(recipe),
        **recompute_fields(recipe),
        **offload_fields(recipe),
        **overlap_fields(recipe, overlap=overlap),
    }


def environment(recipe: Recipe) -> dict[str, str]:
    """Variables that CUDA and Transformer Engine read when they are loaded: set before the ranks start."""
    found = {}
    if (recipe.runtime.ep_overlap or recipe.optimizer.fsdp) and recipe.parallel.tp == 1:
        # One hardware queue is for tensor parallelism; here it would put the exchange back in line with the compute.
        found["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"
    if recipe.runtime.offload_modules:
        found["NVTE_CPU_OFFLOAD_V1"] = "1"  # from 2.10 on, Transformer Engine's other way takes the weights along
    return found


def start_user_buffers(recipe: Recipe, config: TransformerConfig) -> None:
    """Makes the buffers that tensor parallel ranks write to one another in; their size is that of a micro-batch."""
    if not recipe.runtime.tp_overlap:
        return
    from transformer_engine.pytorch.module.base import (  # type: ignore[import-not-found]
        UserBufferQuantizationMode,
        initialize_ub,
    )

    mode = UserBufferQuantizationMode.FP8 if recipe.precision.fp8 else UserBufferQuantizationMode.NONE
    tokens = recipe.data.sequence_length * recipe.schedule.micro_batch_size // recipe.parallel.cp
    initialize_ub(
        shape=[tokens, config.hidden_size],
        tp_size=recipe.parallel.tp,
        quantization_modes=[mode],
        ub_cfgs={},
        bootstrap_backend="nccl",
    )
