"""Rules about the data."""

from __future__ import annotations

from mcore_swift.recipe import Recipe
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
