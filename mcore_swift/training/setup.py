"""From a recipe to the objects that train: Megatron's config, the model with its weights, DDP, the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mcore_swift.flops import DecoderShape
from mcore_swift.models import scored
from mcore_swift.models.build import ModelSource, build_chunks, tensor_rules, transformer_config
from mcore_swift.models.experts import expert_fields
from mcore_swift.models.sizes import decoder_shape
from mcore_swift.parallel import ParallelPlan
from mcore_swift.peft import freezing
from mcore_swift.platform import Platform
from mcore_swift.recipe import Recipe
from mcore_swift.training import adapters, checkpoint, levers
from mcore_swift.training.optimizer import build_optimizer, wrap_chunks
from mcore_swift.weights import live
from mcore_swift.weights.coverage import Spec
from mcore_swift.weights.hf_folder import dtype_of
from mcore_swift.weights.rules import TensorRule
from mcore_swift.weights.safetensors_io import SafetensorsFolder

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.transformer import TransformerConfig

    from mcore_swift.models.config import DecoderConfig
    from mcore_swift.models.layers import DecoderModel
    from mcore_swift.peft.quantized import QuantizedBase
    from mcore_swift.training.lisa import LayerSampling


@dataclass(frozen=True)
class TrainingModel:
    """The model of a run on this rank: `chunks` are the bare models, `models` the same ones wrapped in DDP."""

    source: ModelSource
    config: TransformerConfig
    rules: Mapping[str, TensorRule]
    chunks: list[DecoderModel]
    models: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    entries: Mapping[str, Spec] | None  # the source folder's tensors, when the weights came from one
    num_parameters: int
    sampling: LayerSampling | None = None  # LISA's
    quantized: str = ""  # how the frozen weights are held, if in four bits, and what that costs

    @property
    def shape(self) -> DecoderShape:
        """The sizes that FLOPs are counted from."""
        return decoder_shape(self.config, vocab_size=self.source.num_outputs)

    def export_dtype(self, name: str) -> str:
        """The safetensors dtype that tensor `name` is exported in."""
        return dtype_of(self.source, self.entries, "BF16" if self.config.bf16 else "F32")(name)

    def sync_parameters(self) -> None:
        """Completes an all-gather of updated parameters that would otherwise happen in the next forward pass."""
        for model in self.models:
            if model.ddp_config.overlap_param_gather:
                model.start_param_sync(force_sync=True)


def build(recipe: Recipe, source: ModelSource, plan: ParallelPlan, platform: Platform) -> TrainingModel:
    """Builds the model with its weights, wraps it, and makes its optimizer. Collective over the job."""
    overlap = platform.name == "cuda" if recipe.runtime.overlap is None else recipe.runtime.overlap
    config = model_config(recipe, source, plan, platform, overlap=overlap)
    levers.start_user_buffers(recipe, config)
    chunks = build_chunks(source, config, plan, platform, lean=recipe.adapter.quantization != "none")
    if recipe.objective.name == "sft":
        for chunk in chunks:
            chunk.label_smoothing = recipe.objective.label_smoothing
    rules = tensor_rules(source, config)
    base = adapters.quantized_base(recipe, chunks, rules)
    entries = load_weights(recipe, source, chunks, rules, base)
    num_parameters = _count(rules, chunks, source)
    if recipe.model.partly_frozen:
        frozen = freezing.frozen_tensors(rules, recipe.model)
        freezing.freeze(chunks, frozen, recomputed=recipe.runtime.recompute != "none")
    adapters.prepare(recipe, chunks, rules)
    # LISA: a bucket whose parameters don't all get a gradient can't be reduced before the end of the backward pass;
    # and LoRA's are so small that its layers rather sum up their gradients until then, unless asked not to.
    sums = recipe.adapter.name == "lora" and not recipe.runtime.overlap
    early = overlap and recipe.optimizer.lisa_layers is None and not sums
    models = wrap_chunks(chunks, config, recipe, plan, overlap=early)
    optimizer = build_optimizer(models, recipe, bf16=config.bf16)
    if recipe.optimizer.name == "galore":
        from mcore_swift.training import galore

        galore.install(optimizer, chunks, rules, recipe.optimizer)
    connect(config, models, optimizer)
    sampling = layer_sampling(recipe, chunks, optimizer)
    quantized = base.described() if base is not None else ""
    return TrainingModel(source, config, rules, chunks, models, optimizer, entries, num_parameters, sampling, quantized)


def layer_sampling(recipe: Recipe, chunks: list[DecoderModel], optimizer: MegatronOptimizer) -> LayerSampling | None:
    """What draws the layers that are trained, if the recipe wants LISA."""
    if recipe.optimizer.lisa_layers is None:
        return None
    from mcore_swift.training.lisa import LayerSampling

    return LayerSampling(
        chunks,
        optimizer,
        num_layers=chunks[0].config.num_layers,
        count=recipe.optimizer.lisa_layers,
        interval=recipe.optimizer.lisa_interval,
        seed=recipe.runtime.seed,
    )


def dtype_name(recipe: Recipe, platform: Platform) -> str:
    return platform.default_dtype if recipe.precision.dtype == "auto" else recipe.precision.dtype


def model_config(
    recipe: Recipe, source: ModelSource, plan: ParallelPlan, platform: Platform, *, overlap: bool
) -> DecoderConfig:
    """Megatron's config of the recipe's model, or of another one (`source`) at the same layout and precision."""
    import torch

    extra = {
        **levers.config_fields(recipe, overlap=overlap),
        **expert_fields(recipe.moe, source.family.read_config(source.config), device=platform.name),
        "loss_chunk": recipe.runtime.loss_chunk,
        "share_prompts": recipe.data.share_prompts,
        "variable_seq_lengths": plan.pp > 1 and not recipe.data.fixed_length,
    }
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype_name(recipe, platform)]
    return transformer_config(source, plan, platform, dtype=dtype, extra=extra)


def load_weights(
    recipe: Recipe,
    source: ModelSource,
    chunks: list[DecoderModel],
    rules: Mapping[str, TensorRule],
    base: QuantizedBase | None = None,
) -> Mapping[str, Spec] | None:
    """Loads the weights from where the recipe says; returns the Hugging Face folder's tensors if it was one."""
    path = Path(recipe.model.path)
    if source.scored:
        for chunk in chunks:
            chunk.initialize_score(seed=recipe.runtime.seed)
    if recipe.model.init == "random":
        if base is not None:
            base.fill_randomly(std=chunks[0].config.init_method_std, seed=recipe.runtime.seed)
        return None
    optional = (scored.KEY,)  # a language model has none
    if checkpoint.is_checkpoint(path):
        checkpoint.load_weights(path, models=chunks, fill=base.fill if base is not None else None, optional=optional)
        return {}
    folder = SafetensorsFolder(path)
    spare = scored.spare_tensors(folder.entries, num_layers=chunks[0].config.num_layers) if source.scored else []
    fill = base.fill if base is not None else live.in_place
    live.load(chunks, rules, folder, tied=source.tied, fill=fill, spare=spare, optional=optional)
    return live.decoded(folder)


def connect(config: TransformerConfig, models: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Tells Megatron's schedules how to scale the loss, and when gradients and parameters are exchanged."""
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads

    from mcore_swift.peft.adapters import CollectAndFinalize

    config.finalize_model_grads_func = CollectAndFinalize(finalize_model_grads)
    config.grad_scale_func = optimizer.scale_loss
    if models[0].ddp_config.overlap_grad_reduce:
        no_sync = [model.no_sync for model in models]
        config.no_sync_func = no_sync if len(models) > 1 else no_sync[0]  # type: ignore[assignment]


def _count(rules: Mapping[str, TensorRule], chunks: list[DecoderModel], source: ModelSource) -> int:
    """Parameters of the whole model, vocabulary padding left out."""
    specs = live.hf_specs(rules, live.global_shapes(chunks), vocab_size=source.vocab_size, dtype=lambda name: "U8")
    copies = {name for rule in rules.values() for name in rule.copies}
    return sum(spec.nbytes for name, spec in specs.items() if name not in copies)
