"""Which node gets which ranks: tensor parallel groups within nodes, experts' groups and then pipeline neighbours close.

Megatron numbers ranks with tp fastest, then cp, dp, and pp slowest (`parallel_state`, order tp-cp-ep-dp-pp), so with
nodes in plain order the next pipeline stage is world_size / pp ranks away. Here nodes are dealt out otherwise: the
nodes of one stage that must be close (a block) are followed by the same block of the next stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm

from mcore_swift.parallel import ParallelPlan


def node_order(plan: ParallelPlan, *, gpus_per_node: int) -> list[int]:
    """For each node rank the index, along the leaf switches, of the node that gets it.

    Node rank r runs the ranks r · gpus_per_node … . Plain order where stages don't fill whole nodes.
    """
    nodes, stage_ranks = plan.world_size // gpus_per_node, plan.world_size // plan.pp
    close = lcm(plan.tp * plan.cp, plan.etp * plan.ep, gpus_per_node)
    block = close if stage_ranks % close == 0 else stage_ranks
    if block % gpus_per_node:
        return list(range(nodes))
    width = block // gpus_per_node
    order = []
    for stage in range(plan.pp):
        for number in range(stage_ranks // block):
            first = (number * plan.pp + stage) * width
            order += range(first, first + width)
    return order


def hosts_by_rank(plan: ParallelPlan, hosts: Sequence[str], *, gpus_per_node: int) -> list[str]:
    """`hosts`, leaf by leaf, in the order of node ranks."""
    return [hosts[index] for index in node_order(plan, gpus_per_node=gpus_per_node)]


@dataclass(frozen=True)
class Place:
    """A rank's place in the layout."""

    tp: int
    cp: int
    dp: int
    pp: int


def place(plan: ParallelPlan, rank: int) -> Place:
    """Megatron's numbering of ranks."""
    rest, tp = divmod(rank, plan.tp)
    rest, cp = divmod(rest, plan.cp)
    pp, dp = divmod(rest, plan.dp)
    return Place(tp=tp, cp=cp, dp=dp, pp=pp)


def table(plan: ParallelPlan, hosts: Sequence[str], *, gpus_per_node: int, rows: int = 16) -> str:
    """For a reader: the first nodes along the leaf switches, with what each runs."""
    rank_of = {host: rank for rank, host in enumerate(hosts_by_rank(plan, hosts, gpus_per_node=gpus_per_node))}
    lines = []
    for host in hosts[:rows]:
        first = rank_of[host] * gpus_per_node
        start, end = place(plan, first), place(plan, first + gpus_per_node - 1)
        stages = f"stage {start.pp}" if start.pp == end.pp else f"stages {start.pp}-{end.pp}"
        replicas = f"replica {start.dp}" if start.dp == end.dp else f"replicas {start.dp}-{end.dp}"
        lines.append(f"  {host}: ranks {first}-{first + gpus_per_node - 1}, {stages}, {replicas}")
    if len(hosts) > rows:
        lines.append(f"  … {len(hosts) - rows:,} nodes more")
    return "\n".join(lines)
