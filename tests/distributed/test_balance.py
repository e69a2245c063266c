"""The router's losses are means over the global batch's real tokens, at every layout, and so are the metrics.

The reference is written here from the papers' formulas, on transformers' router logits in float64: a document alone, so
that padding, packing, masks, micro-batches and layouts are all Megatron's side only.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mcore_swift.recipe import MoeSection, ParallelSection
from tests.distributed.harness import run_ranks
from tests.distributed.rank_model import PACK_LENGTHS, Trained, assert_close, documents, recipe_for, train

COEFFICIENT, Z_COEFFICIENT = 0.3, 0.02  # large: a loss of 1e-5 of its weight would show
VARIANTS = ("qwen3-moe", "glm4-moe")  # softmax; sigmoid with a correction bias, which the losses don't see
slow, nightly = pytest.mark.slow, pytest.mark.nightly

Docs = Sequence[int]  # numbers of the documents whose choices are counted together


@dataclass(frozen=True)
class Expected:
    """In float64: the gradients of loss and losses together, and the metrics of the step."""

    gradients: dict[str, torch.Tensor]
    metrics: dict[str, float]


@dataclass(frozen=True)
class Spans:
    """For each document, whose choices its tokens are weighed with."""

    counted_with: dict[int, Docs]

    @classmethod
    def of(cls, kind: str, *, dp: int) -> Spans:
        """A micro-batch is two packs of two documents; `dp` of them are computed at a time."""
        number = 2 * len(PACK_LENGTHS)
        if kind == "seq_aux_loss":
            return cls({i: [i] for i in range(number)})
        if kind == "aux_loss":
            return cls({i: range(i // 4 * 4, i // 4 * 4 + 4) for i in range(number)})
        size = 4 * dp
        return cls({i: range((i // size + 1) * size) for i in range(number)})


@functools.cache
def expected(folder: Path, kind: str, dp: int = 1) -> Expected:
    return run_ranks(_expected, 1, folder, Spans.of(kind, dp=dp))[0]


def _expected(folder: Path, spans: Spans) -> Expected:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    sigmoid = hasattr(gates[0], "e_score_correction_bias")
    outputs: list[list[Any]] = [[] for _ in gates]
    for gate, found in zip(gates, outputs, strict=True):
        gate.register_forward_hook(lambda module, args, output, found=found: found.append(output))
    texts = documents(model.config.vocab_size)
    labels, tokens = sum(int(loss[1:].sum()) for _, loss in texts), sum(len(text) for text, _ in texts)
    total = torch.zeros((), dtype=torch.float64)
    for text, loss in texts:
        inputs = torch.from_numpy(text).long()
        logps = model(inputs[None]).logits[0, :-1].log_softmax(-1)
        total = total - (logps.gather(1, inputs[1:, None])[:, 0] * torch.from_numpy(loss[1:])).sum() / labels
    aux, z, load = _losses(outputs, spans, tokens, sigmoid=sigmoid)
    (total + COEFFICIENT * aux.sum() + Z_COEFFICIENT * z.sum()).backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)
        gradients = load_file(next(Path(place).glob("*.safetensors")))
    for name, _ in model.named_buffers():
        gradients.pop(name, None)
    metrics = {"aux_loss": aux.mean(), "z_loss": z.mean(), "expert_load": load.mean()}
    return Expected(gradients, {name: float(value) for name, value in metrics.items()})


def _losses(
    outputs: list[list[Any]], spans: Spans, tokens: int, *, sigmoid: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each layer: aux loss, z loss, the busiest expert's load. outputs: layer → document → (logits, _, top k)."""
    rows = []
    for layer in outputs:
        logits = [output[0].double() for output in layer]
        scores = [
            part.sigmoid() / part.sigmoid().sum(-1, keepdim=True) if sigmoid else part.softmax(-1) for part in logits
        ]
        top_k = layer[0][2].size(-1)
        choices = [torch.zeros_like(s).scatter_(1, s.topk(top_k).indices, 1) for s in scores]
        aux = torch.zeros((), dtype=torch.float64)
        for document, score in enumerate(scores):
            counts = torch.cat([choices[other] for other in spans.counted_with[document]]).mean(0) / top_k
            aux = aux + score.size(1) * (counts * score.sum(0)).sum() / tokens
        z = torch.cat(logits).logsumexp(-1).square().sum() / tokens
        taken = torch.cat([output[2].flatten() for output in layer]).bincount(minlength=scores[0].size(1)).double()
        rows.append(torch.stack([aux, z, taken.max() / taken.mean()]))
    return tuple(torch.stack(rows).unbind(1))  # type: ignore[return-value]


def with_losses(folder: Path, kind: str, layout: ParallelSection | None = None) -> Trained:
    moe = MoeSection(aux_loss=kind, aux_loss_coeff=COEFFICIENT, z_loss_coeff=Z_COEFFICIENT)  # type: ignore[arg-type]
    packing = kind != "seq_aux_loss"
    return train(recipe_for(folder, layout, moe=moe, packing=packing, micro_batch_size=2 if packing else 4))


def assert_as_expected(found: Trained, reference: Expected) -> None:
    assert found.metrics == pytest.approx(reference.metrics, rel=1e-6)
    assert_close(found.gradients, reference.gradients)


@pytest.mark.parametrize(
    ("variant", "kind"),
    [
        pytest.param("qwen3-moe", "aux_loss", marks=slow),
        pytest.param("glm4-moe", "seq_aux_loss", marks=slow),
        pytest.param("qwen3-moe", "seq_aux_loss", marks=nightly),
        pytest.param("glm4-moe", "aux_loss", marks=nightly),
        pytest.param("qwen3-moe", "global_aux_loss", marks=slow),
    ],
)
def test_the_formula(models: Any, variant: str, kind: str) -> None:
    folder = models(variant)
    assert_as_expected(with_losses(folder, kind), expected(folder, kind))


LAYOUTS = {
    "DP2": ParallelSection(dp=2),
    "EP2": ParallelSection(ep=2, dp=2),
    "EP2xTP2": ParallelSection(ep=2, tp=2, dp=2),
    "PP2": ParallelSection(pp=2),
    "CP2": ParallelSection(cp=2),
    "EP2xCP2": ParallelSection(ep=2, cp=2),
    "EP2xTP2xPP2": ParallelSection(ep=2, tp=2, etp=1, pp=2),
    "EP2xPP2xVPP2xDP2": ParallelSection(ep=2, pp=2, vpp=2, dp=2),
}


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        pytest.param("EP2", "aux_loss", marks=nightly),
        pytest.param("EP2", "global_aux_loss", marks=slow),
        pytest.param("EP2xTP2", "aux_loss", marks=nightly),
        pytest.param("EP2xTP2", "global_aux_loss", marks=nightly),
        pytest.param("EP2xTP2", "seq_aux_loss", marks=nightly),
        pytest.param("EP2xCP2", "aux_loss", marks=nightly),
        pytest.param("EP2xTP2xPP2", "aux_loss", marks=slow),
        *(pytest.param(layout, "aux_loss", marks=nightly) for layout in ("DP2", "PP2", "CP2", "EP2xPP2xVPP2xDP2")),
    ],
)
def test_layout(models: Any, layout: str, kind: str) -> None:
    """Gradients and metrics; the micro-batches are the same ones at every data parallel size."""
    folder = models("qwen3-moe")
    section = LAYOUTS[layout]
    dp = (section.dp or 1) if kind == "global_aux_loss" else 1
    assert_as_expected(with_losses(folder, kind, section), expected(folder, kind, dp))


@pytest.mark.slow
def test_the_losses_show(models: Any) -> None:
    """Without them the gradients are others: the tests above would see a loss that is left out."""
    reference = expected(models("qwen3-moe"), "aux_loss").gradients
    with pytest.raises(AssertionError, match="tensors differ"):
        assert_close(train(recipe_for(models("qwen3-moe"))).gradients, reference, tolerance=1e-2)
