"""A run is one recipe: a YAML file plus dotted command-line overrides, resolved into the frozen dataclasses below.

Each field's comment, on its own line, is its documentation: `mcore-swift train --help-recipe` prints it. A field that a
platform, model or other field makes impossible is an error, never ignored. `recipe_io` reads and writes the files.

Relative paths in model.path, model.tokenizer, adapter.path, the paths of adapter.several,
objective.reference_path, objective.teacher, data.train, data.validation and data.chat_template are looked for in the
current directory, then in the recipe file's folder; checkpoint.dir and data.cache_dir belong to the current directory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

DataFormat = Literal[
    "auto", "messages", "prompt_response", "text", "preference", "labelled", "chosen", "indexed", "synthetic"
]

# Transformer Engine's ways to exchange keys and values: a ring, all at once, Ulysses (heads for tokens), Ulysses in a
# ring. On the CPU all are one exact attention, but what a mode asks of the model is checked there too.
CpCommType = Literal["p2p", "all_gather", "a2a", "a2a+p2p"]

# adapter_off: the same model without its adapter; model: a frozen one beside it; precomputed: kept on disk.
Reference = Literal["adapter_off", "model", "precomputed", "none"]

# Which of them an objective has is in recipe_checks/objective.py.
LossName = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "aot",
    "aot_unpaired",
    "kto",
    "apo_zero_unpaired",
    "forward_kl",
    "reverse_kl",
    "js",
]


class _Strict:
    """What pydantic enforces when `recipe_io` builds the sections: no unknown keys, no silent conversions, no NaN."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


@dataclass(frozen=True, kw_only=True)
class ModelSection(_Strict):
    path: str  # Hugging Face folder, or a Megatron checkpoint folder written by this project
    init: Literal["pretrained", "random"] = "pretrained"  # random: only config.json is read (pretraining, benchmarks)
    overrides: dict[str, object] = field(default_factory=dict)  # config.json keys to change; needs init: random
    tokenizer: str | None = None  # folder with the tokenizer; default: model.path
    mtp_loss_scale: float = 0.0  # weight of multi-token prediction's loss (0.1 is usual); 0: its layers are only kept
    trainable: list[str] = field(default_factory=list)  # train these alone: Hugging Face names, globs; []: everything
    freeze: list[str] = field(default_factory=list)  # and leave these as they are: model.embed_tokens, model.layers.0.*

    @property
    def partly_frozen(self) -> bool:
        """Whether a part of the model stays as it is."""
        return bool(self.trainable or self.freeze)


@dataclass(frozen=True, kw_only=True)
class ParallelSection(_Strict):
    tp: int = 1  # tensor parallel size
    pp: int = 1  # pipeline stages
    vpp: int = 1  # model chunks a pipeline rank (interleaved schedule)
    cp: int = 1  # context parallel size: ranks that share out every sequence
    cp_comm_type: CpCommType | None = None  # exchange of keys and values; default: by the model; on CPU all do the same
    hierarchical_cp: list[int] | None = None  # a2a+p2p: [ranks of an all-to-all, of the ring], product cp
    ep: int = 1  # expert parallel size
    etp: int | None = None  # tensor parallel size inside experts; default: tp
    dp: int | None = None  # data parallel size; default: whatever the ranks leave
    sequence_parallel: bool | None = None  # default: on when tp > 1
    pipeline_layout: str | None = None  # what lies on each stage, as Megatron writes it: Et*3|(tt|)*2tttL
    first_stage_layers: int | None = None  # layers of the first pipeline rank; the others share the rest
    last_stage_layers: int | None = None  # layers of the last pipeline rank
    account_embedding: bool = False  # the embedding counts as a layer when layers are shared out over stages
    account_loss: bool = False  # the output layer with the loss does


@dataclass(frozen=True, kw_only=True)
class SourceSection(_Strict):
    path: str  # JSONL, JSON or Parquet file, folder of them, or an indexed data set's prefix
    weight: float = 1.0  # share of this source in the blend (indexed sources)


@dataclass(frozen=True, kw_only=True)
class DataSection(_Strict):
    train: list[SourceSection]  # a plain path is a source of weight 1; for format synthetic: [synthetic]
    validation: list[SourceSection] = field(default_factory=list)  # sources of their own …
    validation_split: float = 0.0  # … or this fraction of the training rows (0 ≤ x < 1)
    format: DataFormat = "auto"  # auto: by the objective and the columns; chosen: of pairs, for sft; indexed: prepared
    packing: bool = True  # documents packed into one THD sequence; they never attend to each other
    sequence_length: int = 2048  # tokens in a packed sequence, or the longest row
    too_long: Literal["truncate", "drop", "error"] = "truncate"  # rows longer than sequence_length; counted either way
    truncate: Literal["answer_end", "prompt_start"] = "answer_end"  # what too long pairs and labelled answers lose
    equal_pairs: Literal["error", "drop"] = "error"  # pairs whose answers are the same; dropped ones are counted
    share_prompts: bool = False  # of packed pairs: compute a prompt once for both answers, with the same result
    shuffle: bool = True  # another order each epoch, decided by runtime.seed
    streaming: bool = False  # for data larger than memory: never holds or caches the whole
    cache_dir: str | None = None  # tokenized cache; default: $MCORE_SWIFT_CACHE or ~/.cache/mcore_swift
    chat_template: str | None = None  # a Jinja file to use instead of the tokenizer's own
    adapter_field: str | None = None  # the field of each row that names its adapter, one of adapter.several

    @property
    def fixed_length(self) -> bool:
        """Whether all micro-batches have the same length; otherwise rows are padded to the longest of each."""
        return self.packing or self.format in ("indexed", "synthetic")


@dataclass(frozen=True, kw_only=True)
class ObjectiveSection(_Strict):
    name: Literal["sft", "dpo", "kto", "cpo", "simpo", "orpo", "rm", "distill"] = "sft"  # sft: next-token loss
    loss: LossName | None = None  # dpo, cpo: sigmoid, hinge …; distill: forward_kl, reverse_kl, js; the first: default
    losses: dict[str, float] = field(default_factory=dict)  # dpo: several, with weights, in place of one
    beta: float | None = None  # how closely rewards follow log-probabilities; default 0.1, simpo 2.0; orpo's λ; js's β
    gamma: float | None = None  # simpo: by how much the preferred answer should win; default 1.0
    label_smoothing: float = 0.0  # share of pairs taken to be the wrong way round; sft: of probability for all tokens
    sft_weight: float | None = None  # weight of the preferred answers' likelihood (rpo_alpha); default 0, cpo 1
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"  # dpo: what β regularizes
    f_alpha: float = 0.5  # the α of f_divergence: alpha
    ld_alpha: float | None = None  # dpo: weight of labels beyond the shorter answer's length (0 ≤ x ≤ 1)
    discopop_tau: float = 0.05  # temperature of loss: discopop
    alphapo: float = 0.0  # cpo, simpo: rewards (1 − p^−α) / α in place of log p; 0: log p
    desirable_weight: float = 1.0  # kto: weight of good answers
    undesirable_weight: float = 1.0  # kto: of bad ones
    dft: bool = False  # sft: weigh each token by its own probability
    centering: float = 0.0  # rm: weight of (chosen + rejected score)², which keeps scores near 0; 0.01 is usual
    reference: Reference | None = None  # dpo, kto: whom to compare with; default: adapter_off, without lora: model
    reference_path: str | None = None  # folder of reference: model, precomputed; default: model.path, the run's start
    teacher: str | None = None  # distill: folder of the frozen model to learn from, at the same layout
    temperature: float = 1.0  # distill: both models' logits are divided by it
    top_k: int | None = None  # distill: compare only at the teacher's k most probable tokens; None: the vocabulary
    distill_weight: float = 1.0  # distill: weight of the divergence; the labels' cross entropy has the rest


@dataclass(frozen=True, kw_only=True)
class NamedAdapter(_Strict):
    """One of adapter.several. What it leaves out is the section's."""

    path: str | None = None  # a PEFT folder to go on from; it decides the others
    targets: list[str] | None = None
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    rslora: bool | None = None
    dora: bool | None = None


@dataclass(frozen=True, kw_only=True)
class AdapterSection(_Strict):
    name: Literal["none", "lora", "bottleneck", "reft"] = "none"  # what is trained beside the frozen model
    path: str | None = None  # a PEFT folder to go on from; it decides rank, alpha, targets and the like
    targets: list[str] = field(default_factory=lambda: ["attention", "mlp"])  # also experts, all-linear, q_proj, globs
    rank: int = 16  # inner size of each pair of matrices
    alpha: float = 32.0  # what they add is multiplied by alpha / rank
    dropout: float = 0.0  # on their inputs (0 ≤ x < 1)
    rslora: bool = False  # multiply by alpha / √rank instead
    dora: bool = False  # train the length of the weights' rows apart from their direction
    share_a: bool = False  # one A for q, k and v, and one for gate and up: fewer parameters, less to compute
    modules_to_save: list[str] = field(default_factory=list)  # trained in full beside them: lm_head, norm, globs
    init: Literal["default", "pissa"] = "default"  # pissa: start with the weights' largest singular values
    quantization: Literal["none", "nf4", "fp4", "fp8"] = "none"  # frozen weights in 4 bits (QLoRA), or in FP8 only
    double_quantization: bool = True  # their scales in eight bits
    several: dict[str, NamedAdapter] = field(default_factory=dict)  # by name: {math: {rank: 8}, code: {path: DIR}, …}
    learning_rate_ratio: float = 1.0  # LoRA+: learning rate of the B matrices over that of the A matrices
    activation: Literal["gelu", "relu", "silu"] = "gelu"  # bottleneck: between its layers, the inner one of size rank
    layers: list[int] | None = None  # reft: numbers of the layers whose outputs are changed, from 0; None: all
    first_tokens: int = 4  # reft: at so many tokens at each document's beginning …
    last_tokens: int = 4  # … and at its end
    merge: bool | None = None  # DIR/hf holds the model with its adapters merged; default: with lora


@dataclass(frozen=True, kw_only=True)
class OptimizerSection(_Strict):
    name: Literal["adam", "sgd", "muon", "galore"] = "adam"  # adam is AdamW; muon, galore: matrices; the rest by adam
    weight_decay: float = 0.1  # not applied to biases and norms
    beta1: float = 0.9  # adam's decay of the mean gradient
    beta2: float = 0.95  # adam's decay of the mean squared gradient
    eps: float = 1.0e-8  # adam's guard against division by zero
    clip_grad: float = 1.0  # 0: no clipping
    distributed: bool = True  # optimizer states sharded over data parallel ranks
    fsdp: Literal["megatron", "torch"] | None = None  # shard parameters and gradients too; None: states only
    main_params: Literal["fp32", "remainder"] = "fp32"  # remainder: the 16 bits that bf16 parameters lack; exact
    exp_avg_dtype: Literal["fp32", "bf16"] = "fp32"  # adam's mean gradients
    exp_avg_sq_dtype: Literal["fp32", "bf16"] = "fp32"  # adam's mean squared gradients
    offload_fraction: float = 0.0  # share of adam's states that is held, and updated, by the CPU
    galore_rank: int = 128  # galore: size of the subspace of each matrix's gradient that adam works in
    galore_interval: int = 200  # galore: steps until it is chosen anew, by a singular value decomposition
    galore_scale: float = 0.25  # galore: an update's size, times the learning rate
    galore_targets: list[str] = field(default_factory=lambda: ["attention", "mlp"])  # galore: as adapter.targets
    lisa_layers: int | None = None  # LISA: train this many decoder layers at a time, and all outside of them; None: all
    lisa_interval: int = 20  # LISA: steps until other layers are drawn
    muon_momentum: float = 0.95  # muon's decay of the mean gradient
    muon_nesterov: bool = False  # muon: Nesterov's momentum
    muon_steps: int = 5  # Newton-Schulz iterations
    muon_coefficients: Literal["simple", "quintic", "polar_express", "aol"] = "quintic"  # of the iteration
    muon_scale: Literal["spectral", "unit_rms_norm", "shape_scaling"] = "spectral"  # an update's size, from its shape
    muon_extra_scale: float = 1.0  # times this (0.2: Adam's learning rates fit, with spectral)
    muon_precision: Literal["bf16", "tf32", "fp32"] = "bf16"  # of the iteration's matrix products


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
    skip_steps: list[int] = field(default_factory=list)  # steps, from 1, whose data is left out: nothing is trained
    eval_interval: int = 0  # steps between evaluations on the validation data; 0: only at the end
    eval_batches: int | None = None  # global batches an evaluation; default: the whole validation set


@dataclass(frozen=True, kw_only=True)
class PrecisionSection(_Strict):
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 on CUDA, fp32 on CPU
    fp8: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] | None = None  # Transformer Engine recipe
    fp8_format: Literal["hybrid", "e4m3"] = "hybrid"  # hybrid: E4M3 forward, E5M2 gradients; only with fp8
    fp8_param_gather: bool = False  # hold parameters in FP8 only, and exchange them so


@dataclass(frozen=True, kw_only=True)
class CheckpointSection(_Strict):
    dir: str | None = None  # the run's folder; None: nothing is saved
    interval: int = 0  # steps between checkpoints; 0: only the final one
    final: bool = True  # a checkpoint after the last step
    keep: int = 2  # checkpoints kept; 0: all
    asynchronous: bool = True  # write while training goes on
    optimizer: bool = True  # save the optimizer's state (needed to resume)
    resume: Literal["auto", "never"] = "auto"  # auto: continue from the newest complete checkpoint in dir
    export: bool = True  # write DIR/hf, a Hugging Face folder, at the end; with adapters DIR/adapter, too
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
    recompute_method: Literal["uniform", "block"] = "uniform"  # for full: all layers, or only the first of each chunk
    recompute_layers: int = 1  # for full: layers a checkpointed unit (uniform), or layers recomputed (block)
    loss_chunk: int = 0  # positions of a rank whose logits exist at once, made again in backward; 0: all of them
    offload_layers: int = 0  # first layers whose activations wait in CPU memory for the backward pass
    offload_modules: list[str] = field(default_factory=list)  # parts of each layer whose inputs do
    overlap: bool | None = None  # overlap DP communication with compute; default: on for CUDA
    tp_overlap: bool = False  # overlap TP communication with the matrix products it feeds (user buffers)
    ep_overlap: bool = False  # overlap one micro-batch's expert exchange with another's compute (combined 1F1B)
    delay_wgrad: bool = False  # with ep_overlap: weight gradients later, to hide more of the exchange
    profile_steps: list[int] = field(default_factory=list)  # steps traced with torch's profiler, see perf/trace.py


@dataclass(frozen=True, kw_only=True)
class MoeSection(_Strict):
    """For models with experts; for others every key must keep its default, which is what transformers computes.

    A balance loss is added to the objective's for each layer: a mean over the global batch's real tokens, so padding
    and masked labels don't change its weight. The kinds differ in the tokens whose choices are counted: aux_loss in a
    micro-batch (it depends on its size), seq_aux_loss in a row, global_aux_loss over all data parallel ranks and the
    step's micro-batches so far (it depends on their number). A capacity counts on each rank for itself, so a run with
    one depends on its layout. Nothing else here does.
    """

    aux_loss: Literal["none", "aux_loss", "seq_aux_loss", "global_aux_loss"] = "none"  # keeps loads even
    aux_loss_coeff: float = 0.0  # its weight; 0.001 to 0.01 are usual
    z_loss_coeff: float = 0.0  # weight of mean logsumexp(router logits)², which keeps them small; 0.001 is usual
    expert_bias_update_rate: float = 0.0  # a step's change of the correction bias (deepseek_v3, glm4_moe); or 0.001
    router_dtype: Literal["fp32", "fp64"] = "fp32"  # of the router's logits
    capacity_factor: float | None = None  # tokens an expert takes, as a multiple of an even load; None: all
    drop_policy: Literal["probs", "position"] = "probs"  # beyond it: drop the least probable, or the last
    pad_to_capacity: bool = False  # compute exactly that many for each expert
    dispatcher: Literal["alltoall", "allgather", "flex"] = "alltoall"  # flex: DeepEP's kernels, on GPUs
    grouped: bool | None = None  # a rank's experts in one grouped matrix product; default: on for CUDA
    router_fusion: bool = False  # Transformer Engine's kernel chooses the experts: softmax, top k and weights in one
    permute_fusion: bool | None = None  # Transformer Engine's kernels sort the tokens; default: on for CUDA
    shared_expert_overlap: bool = False  # shared experts compute while tokens are exchanged (CUDA)


@dataclass(frozen=True, kw_only=True)
class Recipe(_Strict):
    model: ModelSection  # what is trained
    data: DataSection  # on what
    parallel: ParallelSection = field(default_factory=ParallelSection)  # how ranks share the model
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)  # what is minimized
    adapter: AdapterSection = field(default_factory=AdapterSection)  # what is trained beside the frozen model
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)  # how parameters are updated
    schedule: ScheduleSection = field(default_factory=ScheduleSection)  # how long, in what batches, at which rate
    precision: PrecisionSection = field(default_factory=PrecisionSection)  # number formats
    moe: MoeSection = field(default_factory=MoeSection)  # experts: balance, capacity, dispatch
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)  # what is saved where
    logging: LoggingSection = field(default_factory=LoggingSection)  # what a person sees
    runtime: RuntimeSection = field(default_factory=RuntimeSection)  # devices, ranks, memory against time
