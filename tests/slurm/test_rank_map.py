"""Which node gets which ranks, held against Megatron's own numbering, and hosts along the leaf switches."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import pytest

from launch.slurm.hosts import expand, in_leaf_order
from launch.slurm.rank_map import hosts_by_rank, node_order, place, table
from mcore_swift.parallel import ParallelPlan, resolve
from mcore_swift.recipe import ParallelSection


def plan(world_size: int, **sizes: Any) -> ParallelPlan:
    return resolve(ParallelSection(**sizes), world_size=world_size)


def megatron_groups(plan: ParallelPlan, kind: str, *, experts: bool = False) -> list[list[int]]:
    """The groups as Megatron makes them."""
    from tests.distributed.harness import prepared

    prepared()
    from megatron.core.parallel_state import RankGenerator

    sizes = {"tp": plan.tp, "ep": 1, "dp": plan.dp, "pp": plan.pp, "cp": plan.cp}
    if experts:
        rest = plan.world_size // (plan.etp * plan.ep * plan.pp)
        sizes = {"tp": plan.etp, "ep": plan.ep, "dp": rest, "pp": plan.pp, "cp": 1}
    return RankGenerator(**sizes, order="tp-cp-ep-dp-pp").get_ranks(kind)


LAYOUTS: list[dict[str, Any]] = [
    {"nodes": 1024, "gpus": 8, "tp": 8, "pp": 4},
    {"nodes": 1024, "gpus": 8, "tp": 8, "pp": 8, "cp": 2},
    {"nodes": 256, "gpus": 8, "tp": 2, "pp": 16, "ep": 64, "etp": 1},
    {"nodes": 128, "gpus": 8, "tp": 4, "pp": 8, "ep": 32, "etp": 1},
    {"nodes": 2, "gpus": 8, "tp": 1, "pp": 2, "ep": 8, "etp": 1},
    {"nodes": 16, "gpus": 4, "tp": 2, "pp": 2},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda sizes: " ".join(f"{k}{v}" for k, v in sizes.items()))
def test_tensor_groups_within_nodes_and_pipeline_neighbours_adjacent(layout: dict[str, Any]) -> None:
    layout = dict(layout)
    nodes, gpus = layout.pop("nodes"), layout.pop("gpus")
    this = plan(nodes * gpus, **layout)
    order = node_order(this, gpus_per_node=gpus)
    assert sorted(order) == list(range(nodes))
    where = [order[rank // gpus] for rank in range(nodes * gpus)]  # a rank's node along the leaf switches
    for group in megatron_groups(this, "tp"):
        assert len({where[rank] for rank in group}) == 1
    # The nodes that a stage's close ranks fill; a pipeline neighbour is that far away, and no farther.
    block = max(this.tp * this.cp, this.ep * this.etp, gpus) // gpus
    for group in megatron_groups(this, "pp"):
        assert all(where[after] - where[before] == block for before, after in pairwise(group))
    for group in megatron_groups(this, "ep", experts=True):
        span = [where[rank] for rank in group]
        assert max(span) - min(span) < block
    for group in megatron_groups(this, "cp"):
        span = [where[rank] for rank in group]
        assert max(span) - min(span) < block


def test_places_are_megatrons() -> None:
    this = plan(64, tp=2, pp=4, cp=2)
    for kind in ("tp", "cp", "dp", "pp"):
        others = [name for name in ("tp", "cp", "dp", "pp") if name != kind]
        for group in megatron_groups(this, kind):
            places = [place(this, rank) for rank in group]
            assert [getattr(each, kind) for each in places] == list(range(len(group)))
            assert all(getattr(each, name) == getattr(places[0], name) for each in places for name in others)


def test_stages_that_share_nodes_keep_the_plain_order() -> None:
    assert node_order(plan(8, tp=1, pp=4), gpus_per_node=4) == [0, 1]
    assert node_order(plan(8, tp=2, pp=4), gpus_per_node=8) == [0]


def test_eight_thousand_ranks_in_a_moment() -> None:
    this = plan(8192, tp=8, pp=4)
    hosts = expand("n[0001-1024]")
    start = time.process_time()
    ordered = hosts_by_rank(this, hosts, gpus_per_node=8)
    text = table(this, hosts, gpus_per_node=8)
    assert time.process_time() - start < 0.5
    assert ordered[:3] == ["n0001", "n0005", "n0009"] and ordered[256] == "n0002"
    assert text.splitlines()[:2] == [
        "  n0001: ranks 0-7, stage 0, replica 0",
        "  n0002: ranks 2048-2055, stage 1, replica 0",
    ]
    assert text.splitlines()[-1] == "  … 1,008 nodes more"


@pytest.mark.parametrize(
    ("written", "hosts"),
    [
        ("n01", ["n01"]),
        ("n[01-03,07]-x,login", ["n01-x", "n02-x", "n03-x", "n07-x", "login"]),
        ("r[1-2]n[09-10]", ["r1n09", "r1n10", "r2n09", "r2n10"]),
        ("a[8-11]", ["a8", "a9", "a10", "a11"]),
        ("", []),
    ],
)
def test_hosts_as_slurm_writes_them(written: str, hosts: list[str]) -> None:
    assert expand(written) == hosts


def test_hosts_along_the_leaf_switches() -> None:
    topology = """\
SwitchName=s10 Level=0 LinkSpeed=1 Nodes=n[05-06]
SwitchName=s2 Level=0 LinkSpeed=1 Nodes=n01,n04
SwitchName=s3 Level=0 LinkSpeed=1 Nodes=n[02-03]
SwitchName=a Level=1 LinkSpeed=1 Nodes=n[02-03,05-06] Switches=s3,s10
SwitchName=b Level=1 LinkSpeed=1 Nodes=n01,n04 Switches=s2
SwitchName=top Level=2 LinkSpeed=1 Nodes=n[01-06] Switches=a,b
"""
    hosts = ["n01", "n02", "n03", "n04", "n05", "n06", "x"]
    assert in_leaf_order(hosts, topology) == ["n02", "n03", "n05", "n06", "n01", "n04", "x"]
    assert in_leaf_order(hosts, "Topology is not configured\n") == hosts
