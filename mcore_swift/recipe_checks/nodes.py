"""Rules about a layout and the nodes that its ranks lie on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mcore_swift.recipe_checks.table import Row

if TYPE_CHECKING:
    from mcore_swift.parallel import ParallelPlan

GIB = 2**30


@dataclass(frozen=True)
class Nodes:
    """A layout on nodes of `gpus_per_node` ranks each."""

    plan: ParallelPlan
    gpus_per_node: int
    fast_domain: int  # GPUs that fast links join: a node's, or more where NVLink joins nodes
    rank_bytes: int = 0  # most that a rank holds: weights, gradients, optimizer
    gpu_bytes: int | None = None  # memory of a GPU; None: not known, or no GPU

    @property
    def expert_ranks(self) -> int:
        return self.plan.ep * self.plan.etp

    @property
    def rank_gib(self) -> str:
        return f"{self.rank_bytes / GIB:.1f}"

    @property
    def gpu_gib(self) -> str:
        return f"{(self.gpu_bytes or 0) / GIB:.1f}"


NODES: list[Row[Nodes]] = [
    Row(
        "parallel.tp",
        "ranks of a tensor parallel group on several nodes",
        lambda r: r.gpus_per_node % r.plan.tp,
        "groups of tp {r.plan.tp} don't lie within nodes of {r.gpus_per_node} GPUs, and every layer waits for them",
        "choose a tp that divides a node's GPUs, and raise parallel.pp",
    ),
    Row(
        "parallel.ep parallel.etp",
        "an expert group larger than the GPUs that fast links join",
        lambda r: r.plan.ep > 1 and r.expert_ranks > r.fast_domain,
        "ep {r.plan.ep} x etp {r.plan.etp} = {r.expert_ranks} ranks exchange tokens in every layer, but fast links join"
        " {r.fast_domain} GPUs",
        "lower ep, or say with --fast-domain that {r.expert_ranks} GPUs may form a group",
    ),
    Row(
        "parallel",
        "weights, gradients and optimizer states that exceed a GPU's memory",
        lambda r: r.gpu_bytes is not None and r.rank_bytes > r.gpu_bytes,
        "a rank holds {r.rank_gib} GiB of weights, gradients and optimizer states, a GPU {r.gpu_gib} GiB",
        "raise tp or pp, use more nodes, or see `mcore-swift plan` for what else saves memory",
    ),
]
