"""Rules about checkpoints and logs."""

from __future__ import annotations

from mcore_swift.recipe import Recipe
from mcore_swift.recipe_checks.table import Row

OUTPUTS: list[Row[Recipe]] = [
    Row(
        "checkpoint.interval checkpoint.overwrite",
        "any, without checkpoint.dir",
        lambda r: r.checkpoint.dir is None and (r.checkpoint.interval or r.checkpoint.overwrite),
        "nothing is saved without checkpoint.dir",
        "set it",
    ),
    Row(
        "checkpoint.overwrite",
        "true, with checkpoint.resume: auto",
        lambda r: r.checkpoint.overwrite and r.checkpoint.resume != "never",
        "true starts over, but checkpoint.resume: auto continues what is there",
        "set checkpoint.resume: never",
    ),
    Row(
        "checkpoint.optimizer",
        "false, with checkpoint.resume: auto",
        lambda r: not r.checkpoint.optimizer and r.checkpoint.resume == "auto",
        "false leaves nothing to resume from",
        "set checkpoint.resume: never",
    ),
    Row(
        "logging.wandb_name",
        "any, without logging.wandb_project",
        lambda r: r.logging.wandb_name and not r.logging.wandb_project,
        "{r.logging.wandb_name} does nothing without logging.wandb_project",
        "set it, or leave the name out",
    ),
]
