"""A run is one recipe: a YAML file plus dotted command-line overrides, resolved into the frozen dataclasses below.

Each field's comment, on its own line, is its documentation: `mcore-swift train --help-recipe` prints it. A field that a
platform, model or other field makes impossible is an error, never ignored. `recipe_io` reads and writes the files.

Relative paths in model.path, model.tokenizer, data.train, data.validation and data.chat_template are looked for in the
current directory, then in the recipe file's folder; checkpoint.dir and data.cache_dir belong to the current directory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, ClassVar, Literal

from mcore_swift.errors import InputError

# Of TransformerConfig.recompute_modules (megatron-core 0.19.2), those that are tested here at every layout.
RECOMPUTE_MODULES = ("core_attn", "mlp")

DataFormat = Literal["auto", "messages", "prompt_response", "text", "indexed", "synthetic"]


class _Strict:
    """What pydantic enforces when `recipe_io` builds the sections: no unknown keys, no silent conversions, no NaN."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


@dataclass(frozen=True, kw_only=True)
class ModelSection(_Strict):
    path: str  # Hugging Face folder, or a Megatron checkpoint folder written by this project
    init: Literal["pretrained", "random"] = "pretrained"  # random: only config.json is read (pretraining, benchmarks)
    overrides: dict[str, object] = field(default_factory=dict)  # config.json keys to change; needs init: random
    tokenizer: str | None = None  # folder with the tokenizer; default: model.path


@dataclass(frozen=True, kw_only=True)
class ParallelSection(_Strict):
    tp: int = 1  # tensor parallel size
    pp: int = 1  # pipeline stages
    vpp: int = 1  # model chunks a pipeline rank (interleaved schedule)
    cp: int = 1  # context parallel size
    ep: int = 1  # expert parallel size
    etp: int | None = None  # tensor parallel size inside experts; default: tp
    dp: int | None = None  # data parallel size; default: whatever the ranks leave
    sequence_parallel: bool | None = None  # default: on when tp > 1


@dataclass(frozen=True, kw_only=True)
class SourceSection(_Strict):
    path: str  # JSONL, JSON or Parquet file, folder of them, or an indexed data set's prefix
    weight: float = 1.0  # share of this source in the blend (indexed sources)


@dataclass(frozen=True, kw_only=True)
class DataSection(_Strict):
    train: list[SourceSection]  # a plain path is a source of weight 1; for format synthetic: [synthetic]
    validation: list[SourceSection] = field(default_factory=list)  # sources of their own …
    validation_split: float = 0.0  # … or this fraction of the training rows (0 ≤ x < 1)
    format: DataFormat = "auto"  # auto: told from the data; indexed: by `data prepare`; synthetic: random tokens
    packing: bool = True  # documents packed into one THD sequence; they never attend to each other
    sequence_length: int = 2048  # tokens in a packed sequence, or the longest row
    too_long: Literal["truncate", "drop", "error"] = "truncate"  # rows longer than sequence_length; counted either way
    shuffle: bool = True  # another order each epoch, decided by runtime.seed
    streaming: bool = False  # for data larger than memory: never holds or caches the whole
    cache_dir: str | None = None  # tokenized cache; default: $MCORE_SWIFT_CACHE or ~/.cache/mcore_swift
    chat_template: str | None = None  # a Jinja file to use instead of the tokenizer's own


    @property
    def fixed_length(self) -> bool:
        """Whether all micro-batches have the same length; otherwise rows are padded to the longest of each."""
        return self.packing or self.format in ("indexed", "synthetic")


@dataclass(frozen=True, kw_only=True)
class ObjectiveSection(_Strict):
    name: Literal["sft"] = "sft"  # sft: next-token loss on the tokens that count


@dataclass(frozen=True, kw_only=True)
class OptimizerSection(_Strict):
    name: Literal["adam", "sgd"] = "adam"  # adam is AdamW (decoupled weight decay)
    weight_decay: float = 0.1  # not applied to biases and norms
    beta1: float = 0.9  # adam's decay of the mean gradient
    beta2: float = 0.95  # adam's decay of the mean squared gradient
    eps: float = 1.0e-8  # adam's guard against division by zero
    clip_grad: float = 1.0  # 0: no clipping
    distributed: bool = True  # optimizer states sharded over data parallel ranks


@dataclass(frozen=True, kw_only=True)
class ScheduleSection(_Strict):
    steps: int | None = None  # optimizer steps …
    epochs: float | None = None  # … or passes over the data; exactly one of the two
    global_batch_size: int = 8  # samples (packed sequences or rows) a step, over all ranks
    micro_batch_size: int = 1  # samples a forward pass of one rank; the rest is gradient accumulation
    learning_rate: float = 1.0e-5  # the peak, reached after the warm-up
    min_learning_rate: float = 0.0  # where the decay ends
    warmup_steps: int = 0  # steps of linear warm-up from 0
    decay: Literal["cosine", "linear", "wsd", "constant"] = "cosine"  # wsd: warm-up, stable, linear decay at the end
    decay_steps: int | None = None  # wsd: steps of its final decay, required; others: must be absent
    eval_interval: int = 0  # steps between evaluations on the validation data; 0: only at the end
    eval_batches: int | None = None  # global batches an evaluation; default: the whole validation set


@dataclass(frozen=True, kw_only=True)
class PrecisionSection(_Strict):
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 on CUDA, fp32 on CPU
    fp8: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] | None = None  # Transformer Engine recipe
    fp8_format: Literal["hybrid", "e4m3"] = "hybrid"  # hybrid: E4M3 forward, E5M2 gradients; only with fp8


@dataclass(frozen=True, kw_only=True)
class CheckpointSection(_Strict):
    dir: str | None = None  # the run's folder; None: nothing is saved
    interval: int = 0  # steps between checkpoints; 0: only the final one
    final: bool = True  # a checkpoint after the last step
    keep: int = 2  # checkpoints kept; 0: all
    asynchronous: bool = True  # write while training goes on
    optimizer: bool = True  # save the optimizer's state (needed to resume)
    resume: Literal["auto", "never"] = "auto"  # auto: continue from the newest complete checkpoint in dir
    export: bool = True  # write DIR/hf, a Hugging Face folder, at the end
    overwrite: bool = False  # allow dir to hold another run's results when resume is never


@dataclass(frozen=True, kw_only=True)
class LoggingSection(_Strict):
    interval: int = 1  # steps between log lines
    tensorboard: bool = True  # event files in DIR/tensorboard
    wandb_project: str | None = None  # Weights & Biases project; None: not used
    wandb_name: str | None = None  # the run's name there


@dataclass(frozen=True, kw_only=True)
class RuntimeSection(_Strict):
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where a GPU is visible, else CPU
    ranks: int | None = None  # local ranks to start; default: all GPUs, or what the layout needs on CPU
    seed: int = 1234  # of initial weights, dropout and data order
    threads: int | None = None  # CPU threads a rank (CPU platform); default: cores / ranks
    recompute: Literal["none", "selective", "full"] = "none"  # activations computed again in backward, to save memory
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])  # for selective
    recompute_layers: int = 1  # for full: layers a checkpointed block
    overlap: bool | None = None  # overlap DP communication with compute; default: on for CUDA
    profile_steps: list[int] = field(default_factory=list)  # steps traced with the torch profiler


@dataclass(frozen=True, kw_only=True)
class Recipe(_Strict):
    model: ModelSection  # what is trained
    data: DataSection  # on what
    parallel: ParallelSection = field(default_factory=ParallelSection)  # how ranks share the model
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)  # what is minimized
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)  # how parameters are updated
    schedule: ScheduleSection = field(default_factory=ScheduleSection)  # how long, in what batches, at which rate
    precision: PrecisionSection = field(default_factory=PrecisionSection)  # number formats
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)  # what is saved where
    logging: LoggingSection = field(default_factory=LoggingSection)  # what a person sees
    runtime: RuntimeSection = field(default_factory=RuntimeSection)  # devices, ranks, memory against time


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
    (lambda r: r.parallel.ep > 1, "parallel.ep: {r.parallel.ep} is not supported yet; allowed: 1"),
    (lambda r: r.parallel.etp is not None, "parallel.etp: {r.parallel.etp} is not supported yet; leave it out"),
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
