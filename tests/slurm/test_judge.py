"""Which nodes a preflight finds bad, and which slow, from what they report."""

from __future__ import annotations

from typing import Any

import pytest

from launch.preflight.judge import judge
from launch.preflight.limits import Limits, read_limits
from launch.preflight.speed import rounds
from launch.slurm.preflight import left_out
from mcore_swift.errors import InputError

HOSTS = [f"n{number}" for number in range(1, 7)]


def reports(hosts: list[str] = HOSTS) -> dict[str, Any]:
    """Six healthy nodes."""
    found = {
        host: {
            "problems": [],
            "versions": {"torch": "2.11.0"},
            "skew": 100.0,
            "speeds": {"gemm": 700.0, "all_reduce": 300.0},
            "pairs": {},
        }
        for host in hosts
    }
    for round in rounds(hosts):
        for first, second in round:
            found[first]["pairs"][second] = found[second]["pairs"][first] = {"all_reduce": 40.0}
    return found


def fail(found: dict[str, Any], first: str, second: str) -> None:
    for me, other in ((first, second), (second, first)):
        if me in found:
            found[me]["pairs"][other] = {"error": "timeout"}


def test_every_node_meets_two_others_and_one_at_a_time() -> None:
    for count in range(2, 9):
        hosts = [*HOSTS, "n7", "n8"]
        pairs = rounds(hosts[:count])
        for round in pairs:
            nodes = [host for pair in round for host in pair]
            assert len(nodes) == len(set(nodes))
        met = [host for round in pairs for pair in round for host in pair]
        assert set(met) == set(hosts[:count])
        if count > 2 and count % 2 == 0:
            assert all(met.count(host) == 2 for host in hosts[:count])
    assert rounds(["n1"]) == []


def test_healthy_nodes_are_good_whatever_the_batch_hosts_clock_says() -> None:
    found = judge(HOSTS, reports(), Limits())
    assert (found.bad, found.slow) == ({}, {})


def test_single_nodes_are_named_with_the_reason() -> None:
    given = reports()
    del given["n1"]
    for other in ("n2", "n6"):
        fail(given, other, "n1")
    given["n2"]["problems"] = ["GPU 3: 2 uncorrected memory errors: reset it"]
    given["n3"]["versions"]["torch"] = "2.10.0"
    given["n4"]["skew"] = 103.5
    found = judge(HOSTS, given, Limits(seconds=60))
    assert found.bad == {
        "n1": ["no report within 60 s"],
        "n2": ["GPU 3: 2 uncorrected memory errors: reset it"],
        "n3": ["torch 2.10.0, the other nodes have 2.11.0"],
        "n4": ["the clock is +3.5 s off the other nodes'"],
    }


def test_failed_pairs_are_explained_by_the_fewest_nodes() -> None:
    given = reports()
    for other in ("n2", "n4"):
        fail(given, "n3", other)
    assert judge(HOSTS, given, Limits()).bad == {"n3": ["all-reduce with n2, n4 failed: timeout"]}


def test_one_failed_pair_blames_whom_nobody_else_vouches_for() -> None:
    hosts = HOSTS[:3]
    given = reports(hosts)
    fail(given, "n1", "n2")  # n2 works with n3
    assert list(judge(hosts, given, Limits()).bad) == ["n1"]
    given = reports(HOSTS[:2])
    fail(given, "n1", "n2")
    found = judge(HOSTS[:2], given, Limits())
    assert list(found.bad) == ["n1", "n2"] and "nothing tells which" in found.bad["n1"][0]


def test_slow_nodes_are_named_and_make_way_only_for_spares() -> None:
    given = reports()
    given["n5"]["speeds"]["gemm"] = 500.0
    for other in ("n1", "n3"):
        given["n2"]["pairs"][other] = given[other]["pairs"]["n2"] = {"all_reduce": 10.0}
    given["n6"]["speeds"]["all_reduce"] = 230.0  # above 0.75 of the median
    found = judge(HOSTS, given, Limits())
    assert found.bad == {}
    assert found.slow == {
        "n5": ["matrix product TFLOP/s: 500.00, the median is 700.00"],
        "n2": ["pair GB/s: 10.00, the median is 40.00"],
    }
    assert left_out(found, HOSTS, nodes=6) == {}
    assert list(left_out(found, HOSTS, nodes=5)) == ["n5"]
    assert list(left_out(found, HOSTS, nodes=4)) == ["n5", "n2"]


def test_limits_are_read_or_refused() -> None:
    assert read_limits(["nofile=1024", "slow=0.5"]) == Limits(nofile=1024, slow=0.5)
    with pytest.raises(InputError, match=r"unknown limit 'nofiles'. Did you mean 'nofile'\? Allowed: disk_gib"):
        read_limits(["nofiles=1"])
    with pytest.raises(InputError, match="nofile: found 'many'; it must be a number"):
        read_limits(["nofile=many"])
