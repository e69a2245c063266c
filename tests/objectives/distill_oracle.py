"""What distillation should give: TRL 1.16.0's divergence of transformers' logits, in float64, on the CPU.

`trl.experimental.gkd.GKDTrainer.generalized_jsd_loss` takes whole logits; top-k hands it those of the teacher's k most
probable tokens. Each document alone; the rows are those of `rank_model`. Runs in a forked process.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcore_swift.recipe import ObjectiveSection
from tests.distributed.rank_model import documents, saved_gradients
from tests.objectives.trl_oracle import Result, alone

BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0}  # TRL's, which makes one loss of the three


def distilled(student: Path, teacher: Path, cases: Mapping[str, ObjectiveSection]) -> dict[str, Result]:
    """Loss, metrics and the student's gradients of each case."""
    alone()
    model, other = load(student), load(teacher)
    size = model.config.vocab_size
    rows = [(torch.from_numpy(tokens).long(), torch.from_numpy(loss)[1:] > 0) for tokens, loss in documents(size)]
    found = {}
    for name, case in cases.items():
        model.zero_grad()
        of_student, of_teacher, labels = [], [], []
        for tokens, counted in rows:
            of_student.append(model(tokens[None]).logits[0, :-1][counted])
            with torch.no_grad():
                of_teacher.append(other(tokens[None]).logits[0, :-1][counted])
            labels.append(tokens[1:][counted])
        s, t, label = torch.cat(of_student), torch.cat(of_teacher), torch.cat(labels)
        loss, metrics = loss_of(s, t, label, case)
        loss.backward()
        found[name] = Result(float(loss), metrics, saved_gradients(model))
    return found


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def loss_of(s: Tensor, t: Tensor, label: Tensor, case: ObjectiveSection) -> tuple[Tensor, dict[str, float]]:
    """Of the logits of n labels that count, [n, vocabulary]."""
    nll = torch.nn.functional.cross_entropy(s, label)
    kl = (t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum(-1).mean()
    agreement = (s.argmax(-1) == t.argmax(-1)).double().mean()
    divergence = divergence_of(s, t, case)
    loss = case.distill_weight * divergence + (1 - case.distill_weight) * nll
    shown = {"divergence": divergence, "kl": kl, "nll": nll, "agreement": agreement}
    return loss, {name: float(value) for name, value in shown.items()}


def divergence_of(s: Tensor, t: Tensor, case: ObjectiveSection) -> Tensor:
    """TRL's, a mean over the n tokens, which is also what the definitions give."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    some_s, some_t = at_best(s, t, case)
    found: Any = GKDTrainer.generalized_jsd_loss(
        some_s, some_t, beta=beta_of(case), temperature=case.temperature, num_items_in_batch=len(s)
    )
    expected = float(definition(s, t, case).mean())
    assert abs(float(found) - expected) <= 1e-10 * expected
    return found


def at_best(s: Tensor, t: Tensor, case: ObjectiveSection) -> tuple[Tensor, Tensor]:
    if case.top_k is None:
        return s, t
    best = t.topk(case.top_k).indices
    return s.gather(-1, best), t.gather(-1, best)


def beta_of(case: ObjectiveSection) -> float:
    return BETAS.get(case.loss or "forward_kl", 0.5 if case.beta is None else case.beta)


def definition(s: Tensor, t: Tensor, case: ObjectiveSection) -> Tensor:
    """The divergences by their definitions, in probabilities: [n]."""
    s, t = at_best(s, t, case)
    p, q, beta = (s / case.temperature).softmax(-1), (t / case.temperature).softmax(-1), beta_of(case)
    if beta in (0.0, 1.0):
        p, q = (p, q) if beta else (q, p)
        return (p * (p / q).log()).sum(-1)
    m = beta * q + (1 - beta) * p
    return (beta * q * (q / m).log() + (1 - beta) * p * (p / m).log()).sum(-1)
