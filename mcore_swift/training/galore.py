"""GaLore (Zhao et al. 2024, arXiv:2403.03507): AdamW whose moments live in a small subspace of each matrix's gradient.

For a matrix W [m, n] with gradient G, m ≥ n (for m < n, the same of the transposes), in update number t from 0:

    P ← the first r right singular vectors of G, [n, r]      where t is a multiple of the interval
    g = G P                                                   [m, r]
    M ← β₁ M + (1 − β₁) g,   V ← β₂ V + (1 − β₂) g²,   N = (M / (1 − β₁ᵗ⁺¹)) / (√(V / (1 − β₂ᵗ⁺¹)) + ε)
    W ← (1 − ηλ) W − η · scale · N Pᵀ

The paper's algorithm, with AdamW's decay as everywhere else here. As in the authors' code the moments are kept when P
is renewed. Which of a singular vector and its opposite a decomposition gives is chance; the authors leave it at that,
though moments made along the one mean nothing along the other. Here its largest component is positive. What isn't
projected is updated by plain AdamW.

G is a Hugging Face module's gradient (q's, k's and v's each for itself), and the whole of it, however tensor parallel
ranks share out W: P is made from the gathered gradient, and each rank holds its rows of P, or its part of M and V. The
result doesn't depend on the layout. Data parallel ranks share out the decompositions. The distributed optimizer cuts
matrices into ranges of elements, of which no projection could be made without gathering them: it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_swift import parallel
from mcore_swift.errors import InputError
from mcore_swift.peft.sites import Part, Site, find_sites
from mcore_swift.peft.targets import select
from mcore_swift.recipe import OptimizerSection
from mcore_swift.training.optimizer_state import main_parameters, members
from mcore_swift.weights.rules import TensorRule

KEY = "optimizer.galore"  # how the global keys of its states begin


@dataclass
class Projection:
    """The state of one Hugging Face module's weight, this rank's part of each tensor.

    tall (m ≥ n): basis Pᵀ [r, n], moments [m, r]. Otherwise: basis P [m, r], moments [r, n].
    """

    site: Site
    part: Part
    group: dist.ProcessGroup  # the ranks that share out the weight
    replicas: dist.ProcessGroup  # the ranks that hold the same part of it
    number: int  # among the rank's projections
    basis: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @property
    def tall(self) -> bool:
        return self.part.rows >= self.site.in_features

    def rows(self, whole: Tensor) -> Tensor:
        """The part's rows in the layer's tensor, a view: [groups, rows / groups, columns]."""
        return self.site.rows_of(self.part, whole)

    def renew(self, gradient: Tensor) -> None:
        """Sets the basis from this rank's part of the gradient, [rows, columns]. Collective."""
        copies, size = dist.get_world_size(self.replicas), dist.get_world_size(self.group)
        owner = self.number % copies
        if dist.get_rank(self.replicas) == owner:
            rank = self.basis.size(0 if self.tall else 1)
            whole = _gathered(gradient, self.site, self.group)
            found = whole.new_empty((rank, whole.size(1)) if self.tall else (whole.size(0), rank))
            source = (self.number // copies) % size
            if dist.get_rank(self.group) == source:
                left, _, right = torch.linalg.svd(whole, full_matrices=False)
                found.copy_(_oriented(right[:rank]) if self.tall else _oriented(left[:, :rank].T).T)
            if size > 1:
                dist.broadcast(found, group=self.group, group_src=source)
            axis = {"rows": 0, "columns": 1}.get(self.site.split)
            shared = axis is not None and (axis == 1) == self.tall
            self.basis.copy_(found.chunk(self.site.size, dim=axis)[self.site.rank] if shared else found)  # type: ignore[arg-type]
        if copies > 1:
            dist.broadcast(self.basis, group=self.replicas, group_src=owner)

    def down(self, gradient: Tensor) -> Tensor:
        """This rank's part of the gradient, [rows, columns] → its part of the projected one. Collective."""
        low = gradient @ self.basis.T if self.tall else self.basis.T @ gradient
        if self.site.split == ("columns" if self.tall else "rows"):
            dist.all_reduce(low, group=self.group)
        return low

    def up(self, low: Tensor) -> Tensor:
        """The inverse on the subspace: [rows, columns]."""
        return low @ self.basis if self.tall else self.basis @ low

    def sharded(self) -> Iterator[Any]:
        """Megatron's descriptions of the tensors, under keys and in shapes that don't depend on the layout."""
        from megatron.core.dist_checkpointing import ShardedTensor

        axis = {"rows": 0, "columns": 1, "none": None}[self.site.split]
        for name, with_rows, with_columns in (
            ("basis", not self.tall, self.tall),
            ("exp_avg", self.tall, not self.tall),
            ("exp_avg_sq", self.tall, not self.tall),
        ):
            own = axis is not None and (with_rows, with_columns)[axis]
            place: list[Any] = [(axis, self.site.rank, self.site.size)] if own else []
            replica = (0, 0 if own else dist.get_rank(self.group), dist.get_rank(self.replicas))
            key = f"{KEY}.{name}.{self.part.name}"
            yield ShardedTensor.from_rank_offsets(key, getattr(self, name), *place, replica_id=replica)


def _oriented(rows: Tensor) -> Tensor:
    """Each row times 1 or −1, so that its largest component is positive."""
    return rows * rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()


def _gathered(shard: Tensor, site: Site, group: dist.ProcessGroup) -> Tensor:
    """One module's gradient from all ranks' parts."""
    if site.split == "none":
        return shard
    shards = [torch.empty_like(shard) for _ in range(site.size)]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return torch.cat(shards, dim=0 if site.split == "rows" else 1)


class GaLoreAdamW(torch.optim.Optimizer):
    """The inner optimizer of one of Megatron's. `projections`: id of a tensor that it updates → those of its modules.

    As Transformer Engine's Adam it counts updates for each group: group["step"].
    """

    def __init__(
        self, groups: list[dict[str, Any]], projections: Mapping[int, list[Projection]], *, interval: int, scale: float
    ) -> None:
        super().__init__(groups, {})
        self.projections, self.interval, self.scale = projections, interval, scale

    def initialize(self) -> None:
        """Makes the states that the first step would make."""
        for main in (main for group in self.param_groups for main in group["params"]):
            if id(main) not in self.projections and not self.state[main]:
                self.state[main] |= {"exp_avg": torch.zeros_like(main), "exp_avg_sq": torch.zeros_like(main)}

    def sharded_states(self) -> list[Any]:
        """What a checkpoint holds beside the states of plain AdamW."""
        return [item for own in self.projections.values() for projection in own for item in projection.sharded()]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.initialize()
        for group in self.param_groups:
            number = group["step"] = group.get("step", 0) + 1
            for main in group["params"]:
                if main.grad is None:
                    continue
                main.mul_(1 - group["lr"] * group["weight_decay"])
                for projection in self.projections.get(id(main), ()):
                    rows, gradient = projection.rows(main), projection.rows(main.grad)
                    flat = gradient.reshape(-1, gradient.size(-1))
                    if (number - 1) % self.interval == 0:
                        projection.renew(flat)
                    low = _adam(projection.down(flat), projection.exp_avg, projection.exp_avg_sq, group)
                    rows.sub_(projection.up(low).view_as(rows), alpha=group["lr"] * self.scale)
                if id(main) not in self.projections:
                    state = self.state[main]
                    main.sub_(_adam(main.grad, state["exp_avg"], state["exp_avg_sq"], group), alpha=group["lr"])


def _adam(gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Updates the moments; the direction that Adam takes."""
    beta1, beta2 = group["betas"]
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = (exp_avg_sq / (1 - beta2 ** group["step"])).sqrt_().add_(group["eps"])
    return exp_avg / (1 - beta1 ** group["step"]) / denominator


# --- from a recipe ----------------------------------------------------------------------------------------------------


def install(optimizer: Any, chunks: Sequence[Any], rules: Mapping[str, TensorRule], section: OptimizerSection) -> None:
    """Puts GaLore in the place of AdamW in Megatron's optimizer. Called by all ranks.

    Raises InputError, on all ranks, for a target that matches nothing, for modules that Megatron holds as one tensor
    and of which only some are targets, and for a rank that is larger than a matrix.
    """
    targets = set(select(section.galore_targets, rules, key="optimizer.galore_targets"))
    sites: dict[int, Site] = {}
    error: InputError | None = None
    try:
        for site in (site for chunk in chunks for site in find_sites(chunk, rules)):
            if _is_target(site, targets, section.galore_rank):
                sites[id(site.weight)] = site
    except InputError as problem:
        error = problem
    parallel.raise_together(error)
    number = 0
    for member in members(optimizer):
        projections: dict[int, list[Projection]] = {}
        for parameter, main, *_ in main_parameters(member):
            if id(parameter) in sites:
                site = sites[id(parameter)]
                own = projections[id(main)] = [
                    _projection(site, part, main, number + index, section.galore_rank)
                    for index, part in enumerate(site.parts)
                ]
                number += len(own)
        inner = GaLoreAdamW(
            member.optimizer.param_groups, projections, interval=section.galore_interval, scale=section.galore_scale
        )
        member.optimizer, member.init_state_fn = inner, lambda inner, config: inner.initialize()


def _is_target(site: Site, targets: set[str], rank: int) -> bool:
    wanted = [part for part in site.parts if part.name in targets]
    if wanted and len(wanted) < len(site.parts):
        other = next(part for part in site.parts if part.name not in targets)
        raise InputError(
            f"optimizer.galore_targets: {wanted[0].name} is one of them and {other.name} isn't, but Megatron holds both"
            " in one tensor; name both, or none"
        )
    for part in wanted:
        smaller = min(part.rows, site.in_features)
        if rank > smaller:
            raise InputError(
                f"optimizer.galore_rank: {rank} is larger than {part.name}, which is [{part.rows}, {site.in_features}];"
                f" allowed: 1 to {smaller}"
            )
    return bool(wanted)


def _projection(site: Site, part: Part, main: Tensor, number: int, rank: int) -> Projection:
    group, replicas = parallel.expert_weight_groups() if site.expert else parallel.weight_groups()
    rows, columns = part.local_rows, site.weight.size(1)
    tall = part.rows >= site.in_features
    low = (rows, rank) if tall else (rank, columns)
    return Projection(
        site=site,
        part=part,
        group=group,
        replicas=replicas,
        number=number,
        basis=main.new_zeros((rank, columns) if tall else (rows, rank)),
        exp_avg=main.new_zeros(low),
        exp_avg_sq=main.new_zeros(low),
    )
