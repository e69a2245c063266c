"""A run is one recipe: a YAML file plus dotted command-line overrides, resolved into the frozen dataclasses below.

Each field's comment is its documentation (`mcore-swift train --help-recipe` prints it). A field that a platform, model
or other field makes impossible is an error, never ignored.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    path: str  # Hugging Face folder, or a Megatron checkpoint folder written by this project
    init: Literal["pretrained", "random"] = "pretrained"  # random: only config.json is read (pretraining, benchmarks)
    overrides: dict[str, object] = field(default_factory=dict)  # config.json keys to change; needs init: random
    tokenizer: str | None = None  # folder with the tokenizer; default: model.path


@dataclass(frozen=True, kw_only=True)
class ParallelSection:
    tp: int = 1  # tensor parallel size
    pp: int = 1  # pipeline stages
    vpp: int = 1  # model chunks a pipeline rank (interleaved schedule)
    cp: int = 1  # context parallel size
    ep: int = 1  # expert parallel size
    etp: int | None = None  # tensor parallel size inside experts; default: tp
    dp: int | None = None  # data parallel size; default: whatever the ranks leave
    sequence_parallel: bool | None = None  # default: on when tp > 1


@dataclass(frozen=True, kw_only=True)
class SourceSection:
    path: str  # JSONL, JSON or Parquet file, folder of them, or an indexed data set's prefix
    weight: float = 1.0  # share of this source in the blend (indexed sources)


@dataclass(frozen=True, kw_only=True)
class DataSection:
    train: list[SourceSection]  # a plain string is a source of weight 1
    validation: list[SourceSection] = field(default_factory=list)  # sources of their own …
    validation_split: float = 0.0  # … or this fraction of the training rows (0 ≤ x < 1)
    format: Literal["auto", "messages", "prompt_response", "text", "indexed", "synthetic"] = "auto"
    packing: bool = True  # documents packed into one THD sequence; they never attend to each other
    sequence_length: int = 2048  # tokens in a packed sequence, or the longest row
    too_long: Literal["truncate", "drop", "error"] = "truncate"  # rows longer than sequence_length; counted either way
    shuffle: bool = True
    streaming: bool = False  # for data larger than memory: never holds or caches the whole
    cache_dir: str | None = None  # tokenized cache; default: $MCORE_SWIFT_CACHE or ~/.cache/mcore_swift
    chat_template: str | None = None  # a Jinja file to use instead of the tokenizer's own


@dataclass(frozen=True, kw_only=True)
class ObjectiveSection:
    name: Literal["sft"] = "sft"


@dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    name: Literal["adam", "sgd"] = "adam"  # adam is AdamW (decoupled weight decay)
    weight_decay: float = 0.1  # not applied to biases and norms
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1.0e-8
    clip_grad: float = 1.0  # 0: no clipping
    distributed: bool = True  # optimizer states sharded over data parallel ranks


@dataclass(frozen=True, kw_only=True)
class ScheduleSection:
    steps: int | None = None  # optimizer steps …
    epochs: float | None = None  # … or passes over the data; exactly one of the two
    global_batch_size: int = 8  # samples (packed sequences or rows) a step, over all ranks
    micro_batch_size: int = 1
    learning_rate: float = 1.0e-5
    min_learning_rate: float = 0.0
    warmup_steps: int = 0
    decay: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    decay_steps: int | None = None  # wsd: steps of its final decay; others: must be absent
    eval_interval: int = 0  # steps between evaluations on the validation data; 0: only at the end
    eval_batches: int | None = None  # global batches an evaluation; default: the whole validation set


@dataclass(frozen=True, kw_only=True)
class PrecisionSection:
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 on CUDA, fp32 on CPU
    fp8: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] | None = None  # Transformer Engine recipe
    fp8_format: Literal["hybrid", "e4m3"] = "hybrid"


@dataclass(frozen=True, kw_only=True)
class CheckpointSection:
    dir: str | None = None  # the run's folder; None: nothing is saved
    interval: int = 0  # steps between checkpoints; 0: only the final one
    keep: int = 2  # checkpoints kept; 0: all
    asynchronous: bool = True
    optimizer: bool = True  # save the optimizer's state (needed to resume)
    resume: Literal["auto", "never"] = "auto"  # auto: continue from the newest complete checkpoint in dir
    export: bool = True  # write DIR/hf, a Hugging Face folder, at the end
    overwrite: bool = False  # allow dir to hold another run's results when resume is never


@dataclass(frozen=True, kw_only=True)
class LoggingSection:
    interval: int = 1  # steps between log lines
    tensorboard: bool = True
    wandb_project: str | None = None
    wandb_name: str | None = None


@dataclass(frozen=True, kw_only=True)
class RuntimeSection:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    ranks: int | None = None  # local ranks to start; default: all GPUs, or what the layout needs on CPU
    seed: int = 1234
    threads: int | None = None  # CPU threads a rank (CPU platform); default: cores / ranks
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])  # for selective
    recompute_layers: int = 1  # for full: layers a checkpointed block
    overlap: bool | None = None  # overlap DP communication with compute; default: on for CUDA
    profile_steps: list[int] = field(default_factory=list)  # steps traced with the torch profiler


@dataclass(frozen=True, kw_only=True)
class Recipe:
    model: ModelSection
    data: DataSection
    parallel: ParallelSection = field(default_factory=ParallelSection)
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    precision: PrecisionSection = field(default_factory=PrecisionSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    logging: LoggingSection = field(default_factory=LoggingSection)
    runtime: RuntimeSection = field(default_factory=RuntimeSection)
