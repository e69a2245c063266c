"""Rules about batches, steps and learning rates."""

from __future__ import annotations

from mcore_swift.recipe import Recipe
from mcore_swift.recipe_checks.table import Row

SCHEDULE: list[Row[Recipe]] = [
    Row(
        "schedule.steps schedule.epochs",
        "both, or neither",
        lambda r: (r.schedule.steps is None) == (r.schedule.epochs is None),
        "found steps {r.schedule.steps}, epochs {r.schedule.epochs}",
        "set exactly one of steps and epochs",
    ),
    Row(
        "schedule.global_batch_size",
        "not a multiple of schedule.micro_batch_size",
        lambda r: r.schedule.global_batch_size % r.schedule.micro_batch_size,
        "{r.schedule.global_batch_size} is not a multiple of schedule.micro_batch_size {r.schedule.micro_batch_size}",
        "change one of them",
    ),
    Row(
        "schedule.global_batch_size",
        "not a multiple of schedule.micro_batch_size x parallel.dp",
        lambda r: r.schedule.global_batch_size % (r.schedule.micro_batch_size * (r.parallel.dp or 1)),
        "{r.schedule.global_batch_size} is not a multiple of "
        "schedule.micro_batch_size {r.schedule.micro_batch_size} x parallel.dp {r.parallel.dp}",
        "change one of them",
    ),
    Row(
        "schedule.min_learning_rate",
        "greater than schedule.learning_rate",
        lambda r: r.schedule.min_learning_rate > r.schedule.learning_rate,
        "{r.schedule.min_learning_rate} is greater than schedule.learning_rate {r.schedule.learning_rate}",
        "it is where the decay ends: lower it",
    ),
    Row(
        "schedule.min_learning_rate",
        "greater than 0, with schedule.decay: constant",
        lambda r: r.schedule.min_learning_rate and r.schedule.decay == "constant",
        "{r.schedule.min_learning_rate} is never reached with schedule.decay: constant",
        "leave it out, or use cosine, linear or wsd",
    ),
    Row(
        "schedule.decay",
        "wsd, without schedule.decay_steps",
        lambda r: r.schedule.decay == "wsd" and r.schedule.decay_steps is None,
        "wsd needs schedule.decay_steps, the steps of its final decay",
        "set them",
    ),
    Row(
        "schedule.decay_steps",
        "any, with another schedule.decay than wsd",
        lambda r: r.schedule.decay != "wsd" and r.schedule.decay_steps is not None,
        "{r.schedule.decay_steps} is used by schedule.decay: wsd only, found decay: {r.schedule.decay}",
        "leave it out",
    ),
    Row(
        "schedule.warmup_steps",
        "not less than schedule.steps",
        lambda r: r.schedule.steps and r.schedule.warmup_steps >= r.schedule.steps,
        "{r.schedule.warmup_steps} must be less than schedule.steps {r.schedule.steps}",
        "change one of them",
    ),
    Row(
        "schedule.decay_steps",
        "more than the steps after the warm-up",
        lambda r: r.schedule.steps and r.schedule.warmup_steps + (r.schedule.decay_steps or 0) > r.schedule.steps,
        "{r.schedule.decay_steps} after {r.schedule.warmup_steps} warmup_steps "
        "do not fit in schedule.steps {r.schedule.steps}",
        "lower one of the two",
    ),
]
