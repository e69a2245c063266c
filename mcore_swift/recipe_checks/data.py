"""Rules about the data."""

from __future__ import annotations

from mcore_swift.recipe import Recipe
from mcore_swift.recipe_checks.objective import PAIRED
from mcore_swift.recipe_checks.table import Row


def _has_validation(recipe: Recipe) -> bool:
    return bool(recipe.data.validation or recipe.data.validation_split)


DATA: list[Row[Recipe]] = [
    Row(
        "data.train",
        "empty",
        lambda r: not r.data.train,
        "it is empty",
        "name at least one file, folder, or prefix of an indexed data set",
    ),
    Row(
        "data.format",
        "synthetic, with files or validation",
        lambda r: (
            r.data.format == "synthetic" and ([s.path for s in r.data.train] != ["synthetic"] or _has_validation(r))
        ),
        "synthetic makes its own tokens",
        "data.train is [synthetic], and there is no validation",
    ),
    Row(
        "data.train data.validation",
        "a source with an empty path",
        lambda r: any(not s.path for s in [*r.data.train, *r.data.validation]),
        "a source's path is empty",
        "name a file, a folder, or the prefix of an indexed data set",
    ),
    Row(
        "data.train data.validation",
        "a source's weight of 0 or less",
        lambda r: any(s.weight <= 0 for s in [*r.data.train, *r.data.validation]),
        "a source's weight must be greater than 0",
        "leave out what is not to be used",
    ),
    Row(
        "data.validation data.validation_split",
        "both",
        lambda r: r.data.validation and r.data.validation_split,
        "they exclude each other",
        "name rows of their own, or take a part of data.train",
    ),
    Row(
        "data.validation_split",
        "greater than 0, with data.streaming: true",
        lambda r: r.data.streaming and r.data.validation_split,
        "{r.data.validation_split} of how many rows is unknown with data.streaming: true",
        "use data.validation",
    ),
    Row(
        "schedule.eval_interval schedule.eval_batches",
        "any, without validation data",
        lambda r: (r.schedule.eval_interval or r.schedule.eval_batches) and not _has_validation(r),
        "nothing to evaluate on",
        "set data.validation or data.validation_split",
    ),
]

SHARE_PROMPTS: list[Row[Recipe]] = [
    Row(
        "data.share_prompts",
        "true, with another objective.name than " + ", ".join(PAIRED),
        lambda r: r.data.share_prompts and r.objective.name not in PAIRED,
        "{r.objective.name} has no pairs of answers to the same prompt",
        "leave it out, or use an objective of pairs: " + ", ".join(PAIRED),
    ),
    Row(
        "data.share_prompts",
        "true, with data.packing: false",
        lambda r: r.data.share_prompts and not r.data.packing,
        "without packing each answer is in a row of its own, beside its prompt",
        "leave one of them out",
    ),
    Row(
        "data.share_prompts",
        "true, with parallel.cp",
        lambda r: r.data.share_prompts and r.parallel.cp > 1,
        "context parallel ranks cut each document by itself",
        "leave it out, or use parallel.cp 1",
    ),
    Row(
        "data.share_prompts",
        "true, with adapter.name: reft",
        lambda r: r.data.share_prompts and r.adapter.name == "reft",
        "reft changes positions that it counts in each document",
        "leave one of them out",
    ),
    Row(
        "data.share_prompts",
        "true, with model.mtp_loss_scale",
        lambda r: r.data.share_prompts and r.model.mtp_loss_scale,
        "multi-token prediction looks for each position's next ones",
        "leave one of them out",
    ),
    Row(
        "data.share_prompts",
        "true, with runtime.tp_overlap, ep_overlap, offload_layers or offload_modules",
        lambda r: (
            r.data.share_prompts
            and (r.runtime.tp_overlap or r.runtime.ep_overlap or r.runtime.offload_layers or r.runtime.offload_modules)
        ),
        "it is not proved with runtime.tp_overlap, ep_overlap, offload_layers and offload_modules",
        "leave them or it out",
    ),
    Row(
        "data.share_prompts",
        "true, with moe.dispatcher: allgather",
        lambda r: r.data.share_prompts and r.moe.dispatcher == "allgather" and r.parallel.ep > 1,
        "allgather wants as many positions on all ranks, and their prompts have different lengths",
        "use moe.dispatcher: alltoall",
    ),
    Row(
        "data.share_prompts",
        "true, with moe.capacity_factor",
        lambda r: r.data.share_prompts and r.moe.capacity_factor is not None,
        "experts would drop other tokens than without it, since what they take depends on how many there are",
        "leave one of them out",
    ),
]
