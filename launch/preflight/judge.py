"""All nodes' reports together: which nodes are bad, and which only slow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from launch.preflight.limits import Limits

Report = Mapping[str, Any]  # what launch.preflight writes: node, problems, versions, skew, speeds, pairs
ENOUGH = 3  # nodes, for a median to say which one is the outlier


@dataclass
class Judgement:
    """Nodes with what is wrong with them. A slow node is better than none, a bad one is not."""

    bad: dict[str, list[str]] = field(default_factory=dict)
    slow: dict[str, list[str]] = field(default_factory=dict)

    def blame(self, node: str, text: str) -> None:
        self.bad.setdefault(node, []).append(text)


def judge(hosts: Sequence[str], reports: Mapping[str, Report], limits: Limits) -> Judgement:
    """Judges `hosts`; one without a report is bad."""
    found = Judgement()
    for host in hosts:
        if host not in reports:
            found.blame(host, f"no report within {limits.seconds:g} s")
        else:
            for problem in reports[host]["problems"]:
                found.blame(host, problem)
    _versions(found, reports)
    _clocks(found, reports, limits)
    _pairs(found, hosts, reports)
    _speeds(found, reports, limits)
    return found


def _versions(found: Judgement, reports: Mapping[str, Report]) -> None:
    """The most frequent version counts; where two are equally frequent, the first node's."""
    names = sorted({name for report in reports.values() for name in report["versions"]})
    for name in names:
        versions = {host: report["versions"].get(name, "absent") for host, report in reports.items()}
        usual = Counter(versions.values()).most_common(1)[0][0]
        for host, version in versions.items():
            if version != usual:
                found.blame(host, f"{name} {version}, the other nodes have {usual}")


def _clocks(found: Judgement, reports: Mapping[str, Report], limits: Limits) -> None:
    skews = {host: report["skew"] for host, report in reports.items() if report["skew"] is not None}
    middle = median(skews.values()) if skews else 0.0
    for host, skew in skews.items():
        if abs(skew - middle) > limits.clock_seconds:
            found.blame(host, f"the clock is {skew - middle:+.1f} s off the other nodes'")


def _pairs(found: Judgement, hosts: Sequence[str], reports: Mapping[str, Report]) -> None:
    """Failed pairs are explained by as few nodes as possible; those already known to be bad come first."""
    failed = {
        tuple(sorted((host, other))): result["error"]
        for host, report in reports.items()
        for other, result in report["pairs"].items()
        if "error" in result
    }
    good = Counter(host for host, report in reports.items() for r in report["pairs"].values() if "error" not in r)
    open_pairs = {pair: text for pair, text in failed.items() if not set(pair) & set(found.bad)}
    while open_pairs:
        counts = Counter(host for pair in open_pairs for host in pair)
        rank = {host: (count, -good[host]) for host, count in counts.items()}
        worst = [host for host in hosts if rank.get(host) == max(rank.values())]
        text = next(iter(text for pair, text in open_pairs.items() if worst[0] in pair))
        if len(worst) == 2 and tuple(sorted(worst)) in open_pairs:
            for host in worst:
                other = worst[1 - worst.index(host)]
                found.blame(
                    host, f"all-reduce with {other} failed, and nothing tells which of the two is at fault: {text}"
                )
        else:
            worst = worst[:1]
            partners = sorted(host for pair in open_pairs if worst[0] in pair for host in pair if host != worst[0])
            found.blame(worst[0], f"all-reduce with {', '.join(partners)} failed: {text}")
        open_pairs = {pair: text for pair, text in open_pairs.items() if not set(pair) & set(worst)}


def _speeds(found: Judgement, reports: Mapping[str, Report], limits: Limits) -> None:
    """Outliers against the median of the nodes; a node's speed towards others is that of its faster pair."""
    tables: dict[str, dict[str, float]] = {"matrix product TFLOP/s": {}, "all-reduce GB/s": {}, "pair GB/s": {}}
    for host, report in reports.items():
        pairs = [result["all_reduce"] for result in report["pairs"].values() if "error" not in result]
        values = (report["speeds"].get("gemm"), report["speeds"].get("all_reduce"), max(pairs, default=None))
        for table, value in zip(tables.values(), values, strict=True):
            if value is not None:
                table[host] = value
    for name, table in tables.items():
        if len(table) < ENOUGH:
            continue
        middle = median(table.values())
        for host, value in table.items():
            if value < limits.slow * middle:
                found.slow.setdefault(host, []).append(f"{name}: {value:.2f}, the median is {middle:.2f}")
