"""From a model folder and a layout to this rank's GPTModel chunks, still without weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_swift import parallel
from mcore_swift.errors import InputError
from mcore_swift.models import scored
from mcore_swift.models.context_rules import context_fields
from mcore_swift.models.experts import expert_fields
from mcore_swift.models.family import Family, HFConfig
from mcore_swift.models.layout_rules import MODEL_RULES, Fit
from mcore_swift.models.mla import softmax_fields
from mcore_swift.models.registry import family_of
from mcore_swift.models.rope import rope_frequencies, rope_layer_types
from mcore_swift.models.stages import megatron_layout
from mcore_swift.parallel import ParallelPlan
from mcore_swift.platform import Platform
from mcore_swift.recipe import MoeSection
from mcore_swift.recipe_checks.table import refuse
from mcore_swift.weights.rules import TensorRule
from mcore_swift.weights.safetensors_io import SafetensorsFolder

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer import TransformerConfig

    from mcore_swift.models.config import DecoderConfig
    from mcore_swift.models.layers import DecoderModel


@dataclass(frozen=True)
class ModelSource:
    """A Hugging Face config, read without executing anything from its folder."""

    folder: Path
    raw: dict[str, Any]  # config.json as it is
    config: HFConfig  # with transformers' defaults filled in
    family: Family
    tokenizer: Path  # the folder with the tokenizer; `folder` unless the recipe names another
    chat_template: Path | None = None  # a Jinja file in place of the tokenizer's own
    mtp_loss_scale: float = 0.0  # weight of the loss of multi-token prediction; 0: its layers are kept as they are

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def scored(self) -> bool:
        """Whether it gives a text a score, in place of its next token."""
        return scored.is_scored(self.raw)

    @property
    def num_outputs(self) -> int:
        """Rows of the last layer."""
        return 1 if self.scored else self.vocab_size

    @property
    def tied(self) -> bool:
        return bool(self.config.tie_word_embeddings) and not self.scored

    @property
    def mtp_layers(self) -> int:
        """Layers of multi-token prediction, after those of the decoder."""
        return getattr(self.config, "num_nextn_predict_layers", 0) if self.family.mtp and not self.scored else 0

    def fields(self) -> dict[str, object]:
        """TransformerConfig fields of the model. Layers of multi-token prediction are among them if they are trained.

        Raises InputError for a config that isn't supported.
        """
        fields = self.family.read_config(self.config)
        if self.mtp_loss_scale:
            fields |= {"mtp_num_layers": self.mtp_layers, "mtp_loss_scaling_factor": self.mtp_loss_scale}
        return fields


def read_source(
    folder: Path,
    *,
    overrides: dict[str, object] | None = None,
    tokenizer: Path | None = None,
    chat_template: Path | None = None,
    mtp_loss_scale: float = 0.0,
    as_scored: bool = False,
) -> ModelSource:
    """Reads `folder`/config.json. Raises InputError when it is missing, malformed, or of an unknown family.

    `as_scored`: of a language model, that with a score in place of its output layer.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"model.path: {folder} has no config.json; a Hugging Face model folder is needed")
    try:
        raw = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not valid JSON: line {error.lineno}: {error.msg}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: not a model's configuration: found a {type(raw).__name__}, needed is a JSON object")
    family = family_of(str(raw.get("model_type")), source=str(path))
    unknown = [key for key in overrides or {} if key not in raw]
    if unknown:
        raise InputError(f"model.overrides: {unknown[0]} is not in {path}; allowed: {', '.join(sorted(raw))}")
    raw |= overrides or {}
    if as_scored:
        raw = scored.scored_config(raw, path=path)

    from huggingface_hub.errors import StrictDataclassError  # what transformers' own checks raise

    try:
        config = _configuration_class(raw["model_type"]).from_dict(raw)
    except (TypeError, ValueError, KeyError, StrictDataclassError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from None
    if family.mtp and getattr(config, "num_nextn_predict_layers", 0):
        names = SafetensorsFolder.names(folder)
        if names and not any(name.startswith(f"model.layers.{config.num_hidden_layers}.") for name in names):
            # transformers writes 1 here by default, and leaves the layer's tensors out.
            raw["num_nextn_predict_layers"] = config.num_nextn_predict_layers = 0
    source = ModelSource(
        folder=folder,
        raw=raw,
        config=config,
        family=family,
        tokenizer=tokenizer or folder,
        chat_template=chat_template,
        mtp_loss_scale=mtp_loss_scale,
    )
    if mtp_loss_scale and not source.mtp_layers:
        raise InputError(
            f"model.mtp_loss_scale: {mtp_loss_scale}, but {folder} has no multi-token prediction layers; leave it out"
        )
    return source


def _configuration_class(model_type: str) -> type[HFConfig]:
    """transformers' class of a model type's config.json.

    Without the docstring that transformers gives it on import: for that it imports all its model code, for seconds.
    """
    import transformers
    from transformers import CONFIG_MAPPING

    utils: Any = transformers.utils
    write = utils.auto_docstring
    utils.auto_docstring = lambda described=None, **_: described or (lambda described: described)
    try:
        return CONFIG_MAPPING[model_type]
    finally:
        utils.auto_docstring = write


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """The vocabulary padded so that each TP rank has the same number of rows."""
    return -(-vocab_size // tp) * tp


def transformer_config(
    source: ModelSource,
    plan: ParallelPlan,
    platform: Platform,
    *,
    dtype: torch.dtype,
    extra: dict[str, object] | None = None,
) -> DecoderConfig:
    """The TransformerConfig of this model at this layout. `extra` are further fields (precision, recomputation)."""
    import torch

    from mcore_swift.models.config import DecoderConfig, LatentDecoderConfig

    fields = source.fields() | source.family.megatron_fields()
    fields |= {
        "tensor_model_parallel_size": plan.tp,
        "pipeline_model_parallel_size": plan.pp,
        "virtual_pipeline_model_parallel_size": plan.vpp if plan.vpp > 1 else None,
        "pipeline_model_parallel_layout": megatron_layout(source, plan),
        **context_fields(plan, fields),
        "sequence_parallel": plan.sequence_parallel,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "attention_softmax_in_fp32": True,
        "calculate_per_token_loss": True,  # gradients are divided by the global token count
        "moe_token_dispatcher_type": "alltoall",  # the default one is refused for micro-batches of differing lengths
    }
    if fields.get("num_moe_experts"):
        fields |= {
            "expert_model_parallel_size": plan.ep,
            "expert_tensor_parallel_size": plan.etp,
            **expert_fields(MoeSection(), fields, device=platform.name),
        }
    latent = fields.get("multi_latent_attention")
    if latent:
        fields |= softmax_fields(source.config)
    elif any(factor != 1 for _, factor in rotary_tables(source.config)):
        fields |= {"apply_rope_fusion": False}  # the fused kernel leaves YaRN's factor out of packed documents
    kind: Any = LatentDecoderConfig if latent else DecoderConfig
    # The family's fields come after the platform's: it switches a fusion off that doesn't know its activation.
    return kind(**(platform.transformer_config() | fields | (extra or {})))


def rotary_tables(config: HFConfig) -> list[tuple[torch.Tensor, float]]:
    """`rope_frequencies` of each kind of layer; the first is that of layers without a window."""
    return [rope_frequencies(config, kind) for kind in rope_layer_types(config)]


def check_layout(source: ModelSource, plan: ParallelPlan) -> None:
    """Raises InputError when the layout does not fit the model. Needs neither Megatron nor a process group."""
    fit = Fit(plan, source.fields(), family=source.family.name, folder=source.folder)
    refuse(MODEL_RULES, fit)


def build_chunks(
    source: ModelSource, config: DecoderConfig, plan: ParallelPlan, platform: Platform, *, lean: bool = False
) -> list[DecoderModel]:
    """This rank's model chunks (one, or vpp of them), on its device, in training mode, weights not loaded.

    `lean`: without memory for the weights of the decoder layers' linear layers, which are to be held in another form.
    """
    from mcore_swift.models.group_choice import rank_groups_by
    from mcore_swift.models.layers import DecoderModel, ahead_spec, decoder_spec
    from mcore_swift.models.lean import lean_layers
    from mcore_swift.models.marks import correct_marks
    from mcore_swift.models.quick_attention import quicken_attention
    from mcore_swift.models.shared_prompts import attend_whole_documents
    from mcore_swift.models.windowed_rotary import set_windowed_rotary

    rotary, *windowed_rotary = rotary_tables(source.config)
    ahead = ahead_spec(config, platform, count=source.mtp_layers) if source.mtp_layers else None
    chunks = []
    for chunk in range(plan.vpp) if plan.vpp > 1 else (None,):
        first, last = parallel.chunk_ends(chunk)
        spec: Any = decoder_spec(config, platform, chunk=chunk)
        model = DecoderModel(
            config,
            replace(spec, layer_specs=lean_layers(spec.layer_specs)) if lean else spec,
            vocab_size=padded_vocab_size(source.vocab_size, plan.tp),
            max_sequence_length=source.config.max_position_embeddings,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=source.tied,
            scored=source.scored,
            position_embedding_type="rope",
            vp_stage=chunk,
            ahead=ahead,
        )
        model.true_vocab_size = source.vocab_size
        model.tensor_rules = tensor_rules(source, config)
        model.set_rotary(*rotary)
        for table in windowed_rotary:
            set_windowed_rotary(model, *table)
        correct_marks(model)
        if source.family.group_rank is not None:
            rank_groups_by(model, source.family.group_rank)
        if config.share_prompts:
            attend_whole_documents(model)
        if platform.layers == "transformer_engine":
            quicken_attention(model)
        if platform.name == "cuda" and not config.init_model_with_meta_device:
            model.cuda()
        chunks.append(model.to(config.params_dtype))
    return chunks


def tensor_rules(source: ModelSource, config: TransformerConfig) -> dict[str, TensorRule]:
    """The model's weight rules written out: global key → TensorRule."""
    from mcore_swift.models.keys import expand_rules

    return expand_rules(source, config)
