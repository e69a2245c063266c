"""Names of hosts as Slurm writes them, and their order along the network's leaf switches."""

from __future__ import annotations

import re
from collections.abc import Sequence

_BRACKET = re.compile(r"\[([^\]]*)\]")


def expand(hostlist: str) -> list[str]:
    """`n[01-03,07]-x,login` → n01-x, n02-x, n03-x, n07-x, login; in the list's order."""
    return [host for part in re.split(r",(?![^\[]*\])", hostlist) if part for host in _expand(part)]


def _expand(part: str) -> list[str]:
    bracket = _BRACKET.search(part)
    if bracket is None:
        return [part]
    before, after = part[: bracket.start()], part[bracket.end() :]
    numbers = [number for piece in bracket[1].split(",") for number in _numbers(piece)]
    return [f"{before}{number}{rest}" for number in numbers for rest in _expand(after)]


def _numbers(piece: str) -> list[str]:
    first, _, last = piece.partition("-")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]


def in_leaf_order(hosts: Sequence[str], topology: str) -> list[str]:
    """The hosts leaf by leaf, neighbouring leaves next to one another; as given where `topology` doesn't know them.

    `topology` is what `scontrol show topology` prints for a tree: a line for each switch.
    """
    switches = [dict(re.findall(r"(\w+)=(\S+)", line)) for line in topology.splitlines() if "SwitchName=" in line]
    above = {child: row["SwitchName"] for row in switches for child in expand(row.get("Switches", ""))}
    leaf = {host: row["SwitchName"] for row in switches if row.get("Level") == "0" for host in expand(row["Nodes"])}

    def place(host: str) -> tuple[bool, list[list[str | int]]]:
        path, switch = [], leaf.get(host)
        while switch is not None and len(path) < len(switches):
            path.append(_natural(switch))
            switch = above.get(switch)
        return host not in leaf, path[::-1]

    return sorted(hosts, key=place)  # stable: within a leaf as given


def _natural(name: str) -> list[str | int]:
    """Sorts leaf2 before leaf10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
