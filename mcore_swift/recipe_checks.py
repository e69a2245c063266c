"""What a recipe must not say: bounds of single values, and combinations that are impossible or unsafe.

Everything here is decided from the recipe alone, before a file is opened or a process group made.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from mcore_swift.errors import InputError
from mcore_swift.recipe import Recipe

# Of TransformerConfig.recompute_modules (megatron-core 0.19.2), those that are tested here at every layout.
RECOMPUTE_MODULES = ("core_attn", "mlp")

# What must hold for each value by itself; None is checked by its type. Read top to bottom: bound, test, keys.
_BOUNDS: list[tuple[str, Callable[[Any], bool], str]] = [
    (
        "at least 1",
        lambda x: x >= 1,
        "parallel.tp parallel.pp parallel.vpp parallel.cp parallel.ep parallel.etp parallel.dp "
        "schedule.steps schedule.global_batch_size schedule.micro_batch_size schedule.decay_steps "
        "schedule.eval_batches logging.interval runtime.ranks runtime.threads runtime.recompute_layers",
    ),
    (
        "at least 0",
        lambda x: x >= 0,
        "optimizer.weight_decay optimizer.clip_grad schedule.min_learning_rate schedule.warmup_steps "
        "schedule.eval_interval checkpoint.interval checkpoint.keep",
    ),
    ("at least 2", lambda x: x >= 2, "data.sequence_length"),
    ("greater than 0", lambda x: x > 0, "optimizer.eps schedule.epochs schedule.learning_rate"),
    ("at least 0 and less than 1", lambda x: 0 <= x < 1, "data.validation_split optimizer.beta1 optimizer.beta2"),
    ("between 0 and 2147483647", lambda x: 0 <= x < 2**31, "runtime.seed"),
    ("steps counted from 1", lambda x: min(x, default=1) >= 1, "runtime.profile_steps"),
    ("a path, not an empty text", bool, "model.path model.tokenizer data.chat_template data.cache_dir checkpoint.dir"),
]

# Contradictions between values that need neither the model nor the data to be seen: (what is wrong, what to say).
_CONTRADICTIONS: list[tuple[Callable[[Recipe], object], str]] = [
    # Not there yet.
    (lambda r: r.parallel.cp > 1, "parallel.cp: {r.parallel.cp} is not supported yet; allowed: 1"),
    # The model.
    (
        lambda r: r.model.overrides and r.model.init != "random",
        "model.overrides change the model's shape, so pretrained weights would not fit: they need model.init: random",
    ),
    # The layout.
    (
        lambda r: r.parallel.sequence_parallel and r.parallel.tp == 1,
        "parallel.sequence_parallel: true needs parallel.tp > 1, found tp 1; leave it out or raise tp",
    ),
    (
        lambda r: r.parallel.vpp > 1 and r.parallel.pp == 1,
        "parallel.vpp: {r.parallel.vpp} model chunks a pipeline rank need parallel.pp > 1, found pp 1",
    ),
    (
        lambda r: r.runtime.ranks and r.runtime.ranks % (r.parallel.tp * r.parallel.pp * (r.parallel.dp or 1)),
        "runtime.ranks: {r.runtime.ranks} is not a multiple of what the layout needs: "
        "parallel.tp {r.parallel.tp} x pp {r.parallel.pp} x dp",
    ),
    # The data.
    (
        lambda r: not r.data.train,
        "data.train is empty: name at least one file, folder, or prefix of an indexed data set",
    ),
    (
        lambda r: (
            r.data.format == "synthetic" and ([s.path for s in r.data.train] != ["synthetic"] or _has_validation(r))
        ),
        "data.format: synthetic makes its own tokens: data.train is [synthetic], and there is no validation",
    ),
    (
        lambda r: any(not s.path for s in [*r.data.train, *r.data.validation]),
        "data.train, data.validation: a source's path is empty",
    ),
    (
        lambda r: any(s.weight <= 0 for s in [*r.data.train, *r.data.validation]),
        "data.train, data.validation: a source's weight must be greater than 0",
    ),
    (
        lambda r: r.data.validation and r.data.validation_split,
        "data.validation and data.validation_split exclude each other: rows of their own, or a part of data.train",
    ),
    (
        lambda r: r.data.streaming and r.data.validation_split,
        "data.validation_split: {r.data.validation_split} of how many rows is unknown with data.streaming: true; "
        "use data.validation",
    ),
    (
        lambda r: (r.schedule.eval_interval or r.schedule.eval_batches) and not _has_validation(r),
        "schedule.eval_interval, schedule.eval_batches: nothing to evaluate on; "
        "set data.validation or data.validation_split",
    ),
    # The schedule.
    (
        lambda r: (r.schedule.steps is None) == (r.schedule.epochs is None),
        "schedule: set exactly one of steps and epochs; found steps {r.schedule.steps}, epochs {r.schedule.epochs}",
    ),
    (
        lambda r: r.schedule.global_batch_size % r.schedule.micro_batch_size,
        "schedule.global_batch_size: {r.schedule.global_batch_size} is not a multiple of "
        "schedule.micro_batch_size {r.schedule.micro_batch_size}",
    ),
    (
        lambda r: r.schedule.global_batch_size % (r.schedule.micro_batch_size * (r.parallel.dp or 1)),
        "schedule.global_batch_size: {r.schedule.global_batch_size} is not a multiple of "
        "schedule.micro_batch_size {r.schedule.micro_batch_size} x parallel.dp {r.parallel.dp}",
    ),
    (
        lambda r: r.schedule.min_learning_rate > r.schedule.learning_rate,
        "schedule.min_learning_rate: {r.schedule.min_learning_rate} is greater than "
        "schedule.learning_rate {r.schedule.learning_rate}",
    ),
    (
        lambda r: r.schedule.min_learning_rate and r.schedule.decay == "constant",
        "schedule.min_learning_rate: {r.schedule.min_learning_rate} is never reached with schedule.decay: constant; "
        "leave it out, or use cosine, linear or wsd",
    ),
    (
        lambda r: r.schedule.decay == "wsd" and r.schedule.decay_steps is None,
        "schedule.decay: wsd needs schedule.decay_steps, the steps of its final decay",
    ),
    (
        lambda r: r.schedule.decay != "wsd" and r.schedule.decay_steps is not None,
        "schedule.decay_steps: {r.schedule.decay_steps} is used by schedule.decay: wsd only, "
        "found decay: {r.schedule.decay}",
    ),
    (
        lambda r: r.schedule.steps and r.schedule.warmup_steps >= r.schedule.steps,
        "schedule.warmup_steps: {r.schedule.warmup_steps} must be less than schedule.steps {r.schedule.steps}",
    ),
    (
        lambda r: r.schedule.steps and r.schedule.warmup_steps + (r.schedule.decay_steps or 0) > r.schedule.steps,
        "schedule.decay_steps: {r.schedule.decay_steps} after {r.schedule.warmup_steps} warmup_steps "
        "do not fit in schedule.steps {r.schedule.steps}",
    ),
    (
        lambda r: r.optimizer.name == "sgd" and r.optimizer.distributed,
        "optimizer.name: sgd is not sharded by Megatron's distributed optimizer; set optimizer.distributed: false",
    ),
    (
        lambda r: r.runtime.profile_steps and r.checkpoint.dir is None,
        "runtime.profile_steps: traces are written into checkpoint.dir; set it",
    ),
    (
        lambda r: r.parallel.vpp > 1 and not r.data.fixed_length,
        "parallel.vpp: {r.parallel.vpp} with data.packing: false is not supported: the interleaved schedule needs "
        "micro-batches of one length; set data.packing: true",
    ),
    # Number formats.
    (
        lambda r: r.precision.fp8 and r.precision.dtype == "fp32",
        "precision.fp8: {r.precision.fp8} needs precision.dtype: bf16 or auto, found fp32",
    ),
    (
        lambda r: r.precision.fp8 and r.runtime.device == "cpu",
        "precision.fp8: {r.precision.fp8} needs a GPU, found runtime.device: cpu; leave precision.fp8 out",
    ),
    (
        lambda r: r.precision.fp8_format != "hybrid" and not r.precision.fp8,
        "precision.fp8_format: {r.precision.fp8_format} does nothing without precision.fp8",
    ),
    # Checkpoints and logs.
    (
        lambda r: r.checkpoint.dir is None and (r.checkpoint.interval or r.checkpoint.overwrite),
        "checkpoint.interval, checkpoint.overwrite: nothing is saved without checkpoint.dir; set it",
    ),
    (
        lambda r: r.checkpoint.overwrite and r.checkpoint.resume != "never",
        "checkpoint.overwrite: true starts over, but checkpoint.resume: auto continues what is there; "
        "set checkpoint.resume: never",
    ),
    (
        lambda r: not r.checkpoint.optimizer and r.checkpoint.resume == "auto",
        "checkpoint.optimizer: false leaves nothing to resume from; set checkpoint.resume: never",
    ),
    (
        lambda r: r.logging.wandb_name and not r.logging.wandb_project,
        "logging.wandb_name: {r.logging.wandb_name} does nothing without logging.wandb_project",
    ),
    # Memory against time.
    (
        lambda r: set(r.runtime.recompute_modules) - set(RECOMPUTE_MODULES),
        "runtime.recompute_modules: found {r.runtime.recompute_modules}; allowed: " + ", ".join(RECOMPUTE_MODULES),
    ),
    (
        lambda r: r.runtime.recompute == "selective" and not r.runtime.recompute_modules,
        "runtime.recompute_modules is empty, but runtime.recompute: selective needs one of "
        + ", ".join(RECOMPUTE_MODULES),
    ),
    (
        lambda r: r.runtime.recompute != "selective" and r.runtime.recompute_modules != ["core_attn"],
        "runtime.recompute_modules are used by runtime.recompute: selective only, found {r.runtime.recompute}",
    ),
    (
        lambda r: r.runtime.recompute != "full" and r.runtime.recompute_layers != 1,
        "runtime.recompute_layers is used by runtime.recompute: full only, found {r.runtime.recompute}",
    ),
]


def _has_validation(recipe: Recipe) -> bool:
    return bool(recipe.data.validation or recipe.data.validation_split)


def check_recipe(recipe: Recipe) -> None:
    """Raises InputError, naming the keys, for values out of bounds and for keys that contradict each other.

    Only what needs no file, model or hardware: those are checked by who opens them.
    """
    for bound, holds, keys in _BOUNDS:
        for key in keys.split():
            value = attrgetter(key)(recipe)
            if value is not None and not holds(value):
                raise InputError(f"{key}: found {value!r}; it must be {bound}")
    for is_wrong, message in _CONTRADICTIONS:
        if is_wrong(recipe):
            raise InputError(message.format(r=recipe))
