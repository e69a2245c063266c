"""The balance of experts in a step: the weight of its losses, and what the metrics say of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from mcore_swift import parallel
from mcore_swift.data.batch import MicroBatch


def has_losses(config: Any) -> bool:
    """Whether the router of this TransformerConfig adds losses of its own."""
    return config.num_moe_experts is not None and bool(config.moe_aux_loss_coeff or config.moe_z_loss_coeff)


def set_loss_weight(
    config: Any, batches: Sequence[MicroBatch], device: torch.device, *, count: torch.Tensor | None
) -> None:
    """Makes the router's losses, which are sums over tokens, means over the global batch's real tokens.

    Megatron divides all gradients by what the objective counts in the global batch, `count` (a float64 scalar; it may
    be None where there are no such losses): what is to be divided by the number of tokens is multiplied by their ratio
    here, each step anew. Collective over the data parallel ranks; `batches` are whole, not a context parallel part.
    """
    if not has_losses(config):
        return
    assert count is not None
    tokens = sum(float(batch.tokens.numel() if batch.real is None else batch.real.sum()) for batch in batches)
    total = torch.tensor(tokens, dtype=torch.float64, device=device)
    dist.all_reduce(total, group=parallel.dp_group())
    weight = (count.clamp(min=1.0) * parallel.ranks().cp_size / total).float()
    config.moe_grad_scale_func = lambda: config.grad_scale_func(weight)


def routers(models: Sequence[torch.nn.Module]) -> list[Any]:
    from mcore_swift.models.router import Router

    return [module for model in models for module in model.modules() if isinstance(module, Router)]


def reset(config: Any, models: Sequence[torch.nn.Module]) -> None:
    """Begins a step's sums anew."""
    if config.num_moe_experts is None:
        return
    for router in routers(models):
        router.reset()


def metrics(config: Any, models: Sequence[torch.nn.Module], device: torch.device) -> dict[str, float]:
    """The balance since the last `reset`, the same on every rank; means over layers. {} for a dense model. Collective.

    expert_load: choices that the busiest expert of a layer got, divided by an even share; 1 is perfect.
    aux_loss, z_loss: without their coefficients, where they are on.
    """
    if config.num_moe_experts is None:
        return {}
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    layers = routers(models)
    if layers:
        sums = torch.stack([router.sums for router in layers])
        dist.all_reduce(sums, group=parallel.stage_group())
        counts, (tokens, aux, z) = sums[:, : config.num_moe_experts], sums[:, config.num_moe_experts :].unbind(1)
        load = counts.amax(1) / counts.mean(1).clamp(min=1e-9)
        used = (tokens > 0).double()  # a layer that only lies there (multi-token prediction's) has no load
        tokens = tokens.clamp(min=1)
        totals = torch.stack([used, load, aux / tokens, z / tokens]).sum(1)
    dist.all_reduce(totals, group=parallel.pp_group())
    number, load, aux, z = totals.tolist()
    number = max(number, 1.0)
    found = {"expert_load": load / number}
    if config.moe_aux_loss_coeff:
        found["aux_loss"] = aux / number
    if config.moe_z_loss_coeff:
        found["z_loss"] = z / number
    return found
