"""Adapters without PEFT's help: their formulas in float64 on transformers' model, and what a layout gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from mcore_swift import parallel
from mcore_swift.objectives.registry import OBJECTIVES
from mcore_swift.recipe import AdapterSection, ParallelSection, Recipe
from tests.distributed.harness import run_ranks
from tests.distributed.rank_model import (
    CPU,
    STEPS,
    documents,
    gather_gradient_shards,
    merge,
    micro_batches,
    open_model,
    recipe_for,
)

RATE, DECAY = 1e-3, 0.1
Tensors = dict[str, torch.Tensor]


def in_float64(
    folder: Path,
    start: Mapping[str, torch.Tensor],
    hang: Callable[[Any, Tensors], None],
    undecayed: tuple[str, ...] = (),
) -> tuple[list[float], Tensors, Tensors]:
    """Losses of STEPS AdamW steps, the first gradients, and the tensors that `start` has become. In a fork.

    `hang` puts the method on transformers' model with these tensors, which alone are trained. Vectors, and what ends in
    one of `undecayed`, are not decayed. Each document by itself.
    """
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    model.eval().requires_grad_(False)
    tensors = {name: value.double().requires_grad_() for name, value in start.items()}
    hang(model, tensors)
    groups = [
        {"params": [value], "weight_decay": 0.0 if value.dim() == 1 or name.endswith(undecayed) else DECAY}
        for name, value in tensors.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    texts = documents(model.config.vocab_size)
    count = sum(int(loss[1:].sum()) for _, loss in texts)
    losses: list[float] = []
    gradients: Tensors = {}
    for _ in range(STEPS):
        total = torch.zeros((), dtype=torch.float64)
        for tokens, loss in texts:
            inputs = torch.from_numpy(tokens).long()
            logps = model(inputs[None]).logits[0, :-1].log_softmax(-1)
            total = total - (logps.gather(1, inputs[1:, None])[:, 0] * torch.from_numpy(loss[1:])).sum()
        optimizer.zero_grad()
        (total / count).backward()
        gradients = gradients or {name: value.grad.clone() for name, value in tensors.items()}  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(list(tensors.values()), 0.1)
        optimizer.step()
        losses.append(float(total / count))
    return losses, gradients, {name: value.detach() for name, value in tensors.items()}


def adapter_rank(recipe: Recipe) -> tuple[list[float], Tensors, Tensors]:
    """The same on a rank: losses, the adapters' gradients in the first step, the adapters after the last."""
    from mcore_swift.peft.peft_folder import whole_tensors
    from mcore_swift.training import step
    from mcore_swift.training.optimizer import set_learning_rate

    model = open_model(recipe)
    batches = micro_batches(recipe, model.source.vocab_size, parallel.ranks())
    set_learning_rate(model.optimizer, recipe.schedule.learning_rate, recipe.optimizer.weight_decay)
    gradients: Tensors = {}
    take_step = model.optimizer.step

    def look_and_step() -> Any:
        if not gradients:
            gather_gradient_shards(model.models)
            found = whole_tensors(model.chunks, value=attrgetter("main_grad"))
            gradients.update({name: tensor.clone() for name, tensor in found})
        return take_step()

    model.optimizer.step = look_and_step
    losses = [
        step.train_step(model.models, model.optimizer, batches, OBJECTIVES["sft"], CPU).loss for _ in range(STEPS)
    ]
    model.sync_parameters()
    return losses, gradients, {name: tensor.clone() for name, tensor in whole_tensors(model.chunks)}


def adapter_run(
    model: Path, place: ParallelSection, adapter: AdapterSection, **fields: Any
) -> tuple[list[float], Tensors, Tensors]:
    recipe = recipe_for(model, place, adapter=adapter, learning_rate=RATE, **fields)
    ranks = run_ranks(adapter_rank, parallel.resolve(place, world_size=None).world_size, recipe)
    return ranks[0][0], merge([rank[1] for rank in ranks]), merge([rank[2] for rank in ranks])


def write_rank(recipe: Recipe, folder: Path) -> None:
    from mcore_swift.training import adapters

    adapters.write(recipe, open_model(recipe), folder)


LAYOUTS = {
    "one rank": ParallelSection(),
    "TP2": ParallelSection(tp=2, sequence_parallel=False),
    "TP2+SP": ParallelSection(tp=2),
    "PP2": ParallelSection(pp=2),
    "CP2": ParallelSection(cp=2),
    "DP2": ParallelSection(dp=2),
    "TP2xPP2": ParallelSection(tp=2, pp=2),
    "TP2xCP2": ParallelSection(tp=2, cp=2),
}
