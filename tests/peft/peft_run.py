"""What PEFT gives: a model of its own, trained on the documents that our ranks train on."""

from __future__ import annotations

from typing import Any

import torch

from tests.distributed.rank_model import STEPS, documents

LEARNING_RATE = 1e-4

Tensors = dict[str, torch.Tensor]


def peft_steps(adapted: Any, vocab_size: int, *, ratio: float = 1.0) -> tuple[float, Tensors, Tensors]:
    """Loss and gradients of the first of STEPS AdamW steps, and what is trained after the last, named as in a folder.

    `ratio`: LoRA+'s, the learning rate of the B matrices over that of the others.
    """
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    groups = [
        {
            "params": [parameter],
            "weight_decay": 0.1 if parameter.dim() > 1 else 0.0,
            "lr": LEARNING_RATE * (ratio if "lora_B" in name else 1.0),
        }
        for name, parameter in trained.items()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    first: tuple[float, Tensors] | None = None
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(adapted, vocab_size)
        loss.backward()
        first = first or (float(loss), {plain(name): p.grad.clone() for name, p in trained.items()})
        torch.nn.utils.clip_grad_norm_(list(trained.values()), 0.1)
        optimizer.step()
    assert first is not None
    return *first, {plain(name): p.detach() for name, p in trained.items()}


def loss_of(model: Any, vocab_size: int) -> torch.Tensor:
    """The mean loss of all labels that count, float64; each document by itself."""
    texts = documents(vocab_size)
    count = sum(int(loss[1:].sum()) for _, loss in texts)
    total = torch.zeros((), dtype=torch.float64)
    for tokens, loss in texts:
        inputs = torch.from_numpy(tokens).long()
        logps = model(inputs[None]).logits[0, :-1].double().log_softmax(-1)
        total = total - (logps.gather(1, inputs[1:, None])[:, 0] * torch.from_numpy(loss[1:])).sum()
    return total / count


def plain(name: str) -> str:
    """A parameter's name in PEFT's model → its tensor's in a folder."""
    name = name.removeprefix("base_model.model.").replace(".default", "")
    return name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
