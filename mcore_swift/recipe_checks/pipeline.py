"""Rules about which layers lie on which pipeline stage."""

from __future__ import annotations

import re

from mcore_swift.pipeline import GRAMMAR, parse
from mcore_swift.recipe import Recipe
from mcore_swift.recipe_checks.table import Row


def _chunks(recipe: Recipe) -> tuple[str, ...]:
    layout = recipe.parallel.pipeline_layout
    return (layout is not None and parse(layout)) or ()


def _by_count(recipe: Recipe) -> bool:
    return recipe.parallel.first_stage_layers is not None or recipe.parallel.last_stage_layers is not None


def _accounts(recipe: Recipe) -> bool:
    return recipe.parallel.account_embedding or recipe.parallel.account_loss


_STAGE_KEYS = "parallel.first_stage_layers parallel.last_stage_layers"
_ACCOUNT_KEYS = "parallel.account_embedding parallel.account_loss"

PIPELINE: list[Row[Recipe]] = [
    Row(
        f"parallel.pipeline_layout {_STAGE_KEYS} {_ACCOUNT_KEYS}",
        "any, with parallel.pp: 1",
        lambda r: r.parallel.pp == 1 and (r.parallel.pipeline_layout is not None or _by_count(r) or _accounts(r)),
        "there is one stage, found parallel.pp 1",
        "raise pp or leave them out",
    ),
    Row(
        f"parallel.pipeline_layout {_STAGE_KEYS} {_ACCOUNT_KEYS}",
        "parallel.pipeline_layout with any of the others",
        lambda r: r.parallel.pipeline_layout is not None and (_by_count(r) or _accounts(r)),
        "parallel.pipeline_layout says everything already",
        "leave the others out",
    ),
    Row(
        f"{_STAGE_KEYS} {_ACCOUNT_KEYS}",
        "one of the first two with one of the last two",
        lambda r: _by_count(r) and _accounts(r),
        "a stage's layers are either given or balanced with the embedding and the loss",
        "leave one of them out",
    ),
    Row(
        _STAGE_KEYS,
        "not a multiple of parallel.vpp",
        lambda r: any((n or 0) % r.parallel.vpp for n in (r.parallel.first_stage_layers, r.parallel.last_stage_layers)),
        "{r.parallel.first_stage_layers} and {r.parallel.last_stage_layers} layers can't be shared out over "
        "parallel.vpp {r.parallel.vpp} chunks of the stage",
        "use multiples of vpp, or parallel.pipeline_layout",
    ),
    Row(
        "parallel.pipeline_layout",
        "not in Megatron's notation",
        lambda r: r.parallel.pipeline_layout is not None and not _chunks(r),
        "found {r.parallel.pipeline_layout}",
        f"allowed: {GRAMMAR}",
    ),
    Row(
        "parallel.pipeline_layout",
        "chunks that are not parallel.pp × parallel.vpp",
        lambda r: _chunks(r) and len(_chunks(r)) != r.parallel.pp * r.parallel.vpp,
        "the chunks of {r.parallel.pipeline_layout} are not parallel.pp {r.parallel.pp} × vpp {r.parallel.vpp}",
        "add or remove chunks, or change vpp",
    ),
    Row(
        "parallel.pipeline_layout",
        "without one E at the start and one L at the end",
        lambda r: _chunks(r) and not re.fullmatch("E[tm]*L", "".join(_chunks(r))),
        "{r.parallel.pipeline_layout} needs one embedding at its start and one loss at its end",
        "write it as E…L",
    ),
    Row(
        "parallel.pipeline_layout",
        "multi-token prediction layers elsewhere than before the loss",
        lambda r: _chunks(r) and not re.fullmatch("[Et|]*m*L", "|".join(_chunks(r))),
        "{r.parallel.pipeline_layout} has multi-token prediction layers elsewhere than before the loss",
        "put them into the last chunk: …mL",
    ),
    Row(
        "parallel.pipeline_layout",
        "a chunk with nothing in it",
        lambda r: not all(_chunks(r)),
        "{r.parallel.pipeline_layout} has a chunk with nothing in it",
        "give each chunk a layer",
    ),
]
