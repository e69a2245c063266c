"""Rules about the model and how the ranks share it."""

from __future__ import annotations

from mcore_swift.recipe import Recipe
from mcore_swift.recipe_checks.table import Row


def _are_levels(sizes: list[int] | None, cp: int) -> bool:
    return sizes is not None and len(sizes) == 2 and min(sizes) > 1 and sizes[0] * sizes[1] == cp


LAYOUT: list[Row[Recipe]] = [
    Row(
        "model.overrides",
        "any, with model.init: pretrained",
        lambda r: r.model.overrides and r.model.init != "random",
        "they change the model's shape, so pretrained weights would not fit",
        "they need model.init: random",
    ),
    Row(
        "parallel.sequence_parallel",
        "true, with parallel.tp: 1",
        lambda r: r.parallel.sequence_parallel and r.parallel.tp == 1,
        "true needs parallel.tp > 1, found tp 1",
        "leave it out or raise tp",
    ),
    Row(
        "parallel.vpp",
        "greater than 1, with parallel.pp: 1",
        lambda r: r.parallel.vpp > 1 and r.parallel.pp == 1,
        "{r.parallel.vpp} model chunks a pipeline rank need parallel.pp > 1, found pp 1",
        "raise pp or leave vpp out",
    ),
    Row(
        "parallel.vpp",
        "greater than 1, with rows of differing lengths (data.packing: false)",
        lambda r: r.parallel.vpp > 1 and not r.data.fixed_length,
        "{r.parallel.vpp} with data.packing: false is not supported: the interleaved schedule needs micro-batches of "
        "one length",
        "set data.packing: true",
    ),
    Row(
        "parallel.cp_comm_type",
        "any, with parallel.cp: 1",
        lambda r: r.parallel.cp_comm_type and r.parallel.cp == 1,
        "{r.parallel.cp_comm_type} needs parallel.cp > 1, found cp 1",
        "leave it out or raise cp",
    ),
    Row(
        "parallel.hierarchical_cp",
        "any, with another parallel.cp_comm_type than a2a+p2p",
        lambda r: r.parallel.hierarchical_cp is not None and r.parallel.cp_comm_type != "a2a+p2p",
        "{r.parallel.hierarchical_cp} is used by parallel.cp_comm_type: a2a+p2p only, found {r.parallel.cp_comm_type}",
        "leave it out or set cp_comm_type",
    ),
    Row(
        "parallel.hierarchical_cp",
        "other than two sizes above 1 whose product is cp, with parallel.cp_comm_type: a2a+p2p",
        lambda r: r.parallel.cp_comm_type == "a2a+p2p" and not _are_levels(r.parallel.hierarchical_cp, r.parallel.cp),
        "found {r.parallel.hierarchical_cp} for parallel.cp_comm_type: a2a+p2p",
        "give two sizes above 1, of an all-to-all and of the ring, whose product is parallel.cp {r.parallel.cp}",
    ),
    Row(
        "runtime.ranks",
        "not a multiple of tp x pp x cp x dp",
        lambda r: (
            r.runtime.ranks and r.runtime.ranks % (r.parallel.tp * r.parallel.pp * r.parallel.cp * (r.parallel.dp or 1))
        ),
        "{r.runtime.ranks} is not a multiple of what the layout needs: "
        "parallel.tp {r.parallel.tp} x pp {r.parallel.pp} x cp {r.parallel.cp} x dp",
        "change runtime.ranks or the layout",
    ),
]
