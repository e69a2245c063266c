"""How far a student's next token is from a teacher's, where tensor parallel ranks share out the vocabulary.

Logits are made of hidden states for a few tokens at a time, in the forward pass and again in the backward pass, so that
those of all tokens are never there. Whatever is summed over the vocabulary is summed over the ranks that share it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch.nn.functional import pad

if TYPE_CHECKING:
    from torch import Tensor

    from mcore_swift.recipe import ObjectiveSection

LOGITS_AT_ONCE = 2**25  # of one model on one rank: 128 MiB in float32, and a few such at a time


def tokens_at_once(columns: int) -> int:
    """`columns`: of the vocabulary on each rank, padding included, for ranks must agree."""
    return max(1, LOGITS_AT_ONCE // columns)


@dataclass(frozen=True)
class Shard:
    """This rank's columns of the vocabulary: they begin at `first`. `group`: the ranks that have the others, if any."""

    first: int = 0
    group: dist.ProcessGroup | None = None

    def sum(self, values: Tensor) -> Tensor:
        """Over the last dimension and the ranks; it stays, with size 1."""
        return self._reduced(values.sum(-1, keepdim=True), dist.ReduceOp.SUM)

    def log_softmax(self, logits: Tensor) -> Tensor:
        shifted = logits - self._reduced(logits.amax(-1, keepdim=True), dist.ReduceOp.MAX)
        return shifted - self.sum(shifted.exp()).log()

    def argmax(self, logits: Tensor) -> Tensor:
        """Numbers in the whole vocabulary: int64 [c]; of equal logits the first."""
        values, columns = logits.max(-1)
        best = self._reduced(values.clone(), dist.ReduceOp.MAX)
        columns = torch.where(values == best, columns + self.first, torch.iinfo(torch.int64).max)
        return self._reduced(columns, dist.ReduceOp.MIN)

    def topk(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits of the whole vocabulary, [c, k], and their numbers in it, int64: on every rank."""
        own = min(k, logits.size(-1))
        values, columns = logits.topk(own)
        if self.group is None:
            return values, columns
        values, columns = pad(values, (0, k - own), value=-torch.inf), pad(columns + self.first, (0, k - own))
        found, place = self._gathered(values).topk(k)
        return found, self._gathered(columns).gather(-1, place)

    def pick(self, values: Tensor, columns: Tensor) -> Tensor:
        """values [c, v] at columns [c, k] of the whole vocabulary: [c, k] on every rank."""
        own, local = self._local(columns, values.size(-1))
        return self._reduced(torch.where(own, values.gather(-1, local), 0.0), dist.ReduceOp.SUM)

    def place(self, values: Tensor, columns: Tensor, width: int) -> Tensor:
        """The transpose of `pick`: values [c, k] in this rank's columns of zeros [c, width]."""
        own, local = self._local(columns, width)
        return values.new_zeros(len(values), width).scatter_add_(-1, local, torch.where(own, values, 0.0))

    def _local(self, columns: Tensor, width: int) -> tuple[Tensor, Tensor]:
        local = columns - self.first
        return (local >= 0) & (local < width), local.clamp(0, width - 1)

    def _reduced(self, values: Tensor, op: Any) -> Tensor:
        if self.group is not None:
            dist.all_reduce(values, op=op, group=self.group)
        return values

    def _gathered(self, values: Tensor) -> Tensor:
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, values.contiguous(), group=self.group)
        return torch.cat(parts, -1)


class Pair(NamedTuple):
    """Log-probabilities of the student and of the teacher: float32 [c, v]. `sum`: over all that takes part."""

    s: Tensor
    t: Tensor
    beta: float
    sum: Callable[[Tensor], Tensor]

    @property
    def mixture(self) -> Tensor:
        """log(β p_t + (1 − β) p_s)."""
        weights = torch.tensor([self.beta, 1 - self.beta], dtype=self.s.dtype, device=self.s.device).log()
        return torch.logaddexp(self.t + weights[0], self.s + weights[1])


class Divergence(NamedTuple):
    """A divergence of two distributions, [c, 1], and its gradient with respect to the student's logits, [c, v]."""

    value: Callable[[Pair], Tensor]
    slope: Callable[[Pair], Tensor]


def _kl(p: Tensor, q: Tensor, sum: Callable[[Tensor], Tensor]) -> Tensor:
    return sum(p.exp() * (p - q))


def _centred(p: Pair, values: Tensor) -> Tensor:
    """Through the softmax: p_s (values − their mean under p_s)."""
    probabilities = p.s.exp()
    return probabilities * (values - p.sum(probabilities * values))


def _js(p: Pair) -> Tensor:
    m = p.mixture
    return p.beta * _kl(p.t, m, p.sum) + (1 - p.beta) * _kl(p.s, m, p.sum)


# The names are those of the knowledge distillation literature: forward is KL(teacher ‖ student).
DIVERGENCES: dict[str, Divergence] = {
    # Hinton et al. 2015, arXiv:1503.02531.
    "forward_kl": Divergence(lambda p: _kl(p.t, p.s, p.sum), lambda p: p.s.exp() - p.t.exp()),
    # Gu et al. 2023, arXiv:2306.08543.
    "reverse_kl": Divergence(lambda p: _kl(p.s, p.t, p.sum), lambda p: _centred(p, p.s - p.t)),
    # Agarwal et al. 2023, arXiv:2306.13649, equation 1: generalized Jensen-Shannon.
    "js": Divergence(_js, lambda p: (1 - p.beta) * _centred(p, p.s - p.mixture)),
}


@dataclass(frozen=True)
class Head:
    """An output layer's share on this rank. weight: [v, hidden], without padding; scale: of logits, such as a cap."""

    weight: Tensor
    scale: Callable[[Tensor], Tensor] = field(default=lambda logits: logits)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [c, hidden] → float32 [c, v]."""
        return self.scale(hidden @ self.weight.t()).float()


@dataclass(frozen=True)
class Comparison:
    """What a student's logits are compared with, at n tokens.

    labels: int64 [n]; states: the teacher's hidden states, [n, its hidden size]; head: the teacher's; options: filled;
    at_once: of how many tokens logits are made at a time, the same number on every rank of the shard's group.
    """

    labels: Tensor
    states: Tensor
    head: Head
    shard: Shard
    options: ObjectiveSection
    at_once: int

    def values(self, s: Tensor, part: slice) -> Tensor:
        """float32 [4, c] of logits s [c, v]: −log p of the label, the divergence, KL(teacher ‖ student), agreement.

        The KL is that of the whole distributions, without temperature: the same measure whatever is minimized.
        """
        t = self.head.logits(self.states[part])
        whole = Pair(self.shard.log_softmax(s), self.shard.log_softmax(t), 0.0, self.shard.sum)
        nll = -self.shard.pick(whole.s, self.labels[part, None])
        kl = DIVERGENCES["forward_kl"].value(whole)
        agreement = self.shard.argmax(s) == self.shard.argmax(t)
        if self._plain and self.options.loss == "forward_kl":
            divergence = kl
        else:
            divergence = self._divergence.value(self._pair(s, t, self._columns(t)))
        return torch.stack([nll[:, 0], divergence[:, 0], kl[:, 0], agreement.float()])

    def slopes(self, s: Tensor, part: slice, weights: Tensor) -> Tensor:
        """The gradient with respect to s of the first two of `values`, weighed by weights [2, c]: float32 [c, v]."""
        t = self.head.logits(self.states[part])
        columns = self._columns(t)
        found = self._divergence.slope(self._pair(s, t, columns)) * (weights[1, :, None] / self.options.temperature)
        if columns is not None:
            found = self.shard.place(found, columns, s.size(-1))
        if self.options.distill_weight < 1:
            label = self.shard.place(weights[0, :, None], self.labels[part, None], s.size(-1))
            found += self.shard.log_softmax(s).exp() * weights[0, :, None] - label
        return found

    def parts(self) -> Iterator[slice]:
        """The tokens, `at_once` at a time."""
        return (slice(start, start + self.at_once) for start in range(0, len(self.labels), self.at_once))

    @property
    def _divergence(self) -> Divergence:
        assert self.options.loss is not None
        return DIVERGENCES[self.options.loss]

    @property
    def _plain(self) -> bool:
        return self.options.top_k is None and self.options.temperature == 1

    def _columns(self, t: Tensor) -> Tensor | None:
        """The teacher's most probable tokens, if only those are compared: int64 [c, k], the same on every rank."""
        return None if self.options.top_k is None else self.shard.topk(t, self.options.top_k)[1]

    def _pair(self, s: Tensor, t: Tensor, columns: Tensor | None) -> Pair:
        shard = self.shard
        if columns is not None:  # then both distributions are those given that the token is one of them
            s, t, shard = shard.pick(s, columns), shard.pick(t, columns), Shard()
        temperature, beta = self.options.temperature, self.options.beta
        assert beta is not None
        return Pair(shard.log_softmax(s / temperature), shard.log_softmax(t / temperature), beta, shard.sum)


def compared(hidden: Tensor, head: Head, with_: Comparison) -> Tensor:
    """`Comparison.values` of the student at all n tokens: float32 [4, n], of which the first two have gradients.

    hidden: the student's states, [n, hidden], the same on every tensor parallel rank; each rank's gradient is that of
    its own columns, still to be summed. The gradient of the label's log-probability is left out where the objective has
    no use for it (distill_weight: 1).
    """
    return cast("Tensor", _Compared.apply(hidden, head.weight, head.scale, with_))


class _Compared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, scale: Callable[[Tensor], Tensor], of: Comparison) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.scale, ctx.of = scale, of
        head = Head(weight, scale)
        found = hidden.new_empty(4, len(hidden), dtype=torch.float32)
        for part in of.parts():
            found[:, part] = of.values(head.logits(hidden[part]), part)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight = ctx.saved_tensors
        to_hidden, to_weight = None, None
        if ctx.needs_input_grad[0]:
            to_hidden = torch.zeros_like(hidden)
        if ctx.needs_input_grad[1]:
            to_weight = torch.zeros_like(weight, dtype=torch.float32)
        for part in ctx.of.parts():
            raw = (hidden[part] @ weight.t()).requires_grad_()
            with torch.enable_grad():
                logits = ctx.scale(raw).float()
            slope = ctx.of.slopes(logits.detach(), part, gradients[0][:2, part])
            (slope,) = torch.autograd.grad(logits, raw, slope)
            if to_hidden is not None:
                to_hidden[part] = slope @ weight
            if to_weight is not None:
                to_weight += slope.t() @ hidden[part]
        return to_hidden, None if to_weight is None else to_weight.to(weight.dtype), None, None
