"""The layer specs, and everything else that knows what GPTModel calls its parts.

Two specs: Transformer Engine's on CUDA, and a plain-torch one that gives the same mathematics on the CPU (with sequence
parallelism and packed sequences, which Megatron-Core's local spec refuses). Upstream is moving from GPTModel to
HybridModel: that change is this file's alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from typing import Any, cast

import torch
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_layer_local_spec,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset
from torch import Tensor, nn

from mcore_swift.models import mtp
from mcore_swift.models.attention import TorchAttention
from mcore_swift.models.config import DecoderConfig
from mcore_swift.models.expert_bias import with_bias
from mcore_swift.models.grouped_linear import in_one_call, with_groups
from mcore_swift.models.latent_attention import NORM_KEYS, LatentAttention, LatentRotary
from mcore_swift.models.post_norm import add_post_norms
from mcore_swift.models.router import with_router
from mcore_swift.models.score_head import ScoreHead
from mcore_swift.models.sinks import SinkAttention
from mcore_swift.models.smoothing import label_minus_mean
from mcore_swift.models.soft_cap import CappedAttention
from mcore_swift.platform import Platform
from mcore_swift.weights.rules import TensorRule, is_moe_layer


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm with the constructor Megatron-Core calls; marks its weight so that SP gradients are reduced.

    A zero-centred one multiplies by 1 + weight, in float32.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.zero_centered = config.layernorm_zero_centered_gamma
        if self.zero_centered:
            nn.init.zeros_(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if not self.zero_centered:
            return super().forward(x)
        return nn.functional.rms_norm(x.float(), self.normalized_shape, 1 + self.weight.float(), self.eps).to(x.dtype)


class FusedWgradLayer(TransformerLayer):
    """A layer whose linear layers add their weight gradients straight to the fp32 main gradients, inside the GEMM.

    Transformer Engine does that by itself, but Megatron's own output layer, which shares the config, would then ask for
    NVIDIA Apex: so only the layers get a config with the fusion on.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        fused = copy(config)
        fused.gradient_accumulation_fusion = True
        super().__init__(fused, *args, **kwargs)


def decoder_spec(
    config: DecoderConfig, platform: Platform, *, chunk: int | None
) -> ModuleSpec | TransformerBlockSubmodules:
    """The decoder's layers for this config on this platform. `chunk`: the number of this rank's chunk, if several."""
    if platform.layers == "transformer_engine":
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=chunk)
        return replace(spec, layer_specs=[_fused_layer(layer, config) for layer in spec.layer_specs or ()])
    kinds = [_torch_layer(config, moe=is_moe_layer(config, layer)) for layer in range(config.num_layers)]
    first = get_transformer_layer_offset(config, vp_stage=chunk)
    own = kinds[first : first + get_num_layers_to_build(config, vp_stage=chunk)]
    return TransformerBlockSubmodules(own, layer_norm=RMSNorm)


def ahead_spec(config: DecoderConfig, platform: Platform, *, count: int) -> MultiTokenPredictionBlockSubmodules:
    """`count` layers of multi-token prediction, which are inside like the decoder's last layer."""
    if platform.layers == "transformer_engine":
        layers = cast(list[ModuleSpec], get_gpt_decoder_layer_specs(config, use_transformer_engine=True))
        return mtp.block_spec(_fused_layer(layers[-1], config), count)
    last = _torch_layer(config, moe=is_moe_layer(config, config.num_layers - 1))
    return mtp.block_spec(last, count, norm=RMSNorm)


def _fused_layer(spec: ModuleSpec, config: DecoderConfig) -> ModuleSpec:
    """Transformer Engine's layer, with what the family has and Transformer Engine doesn't."""
    layer = cast(Any, spec.submodules)
    if layer.self_attention.module is MLASelfAttention:
        layer = replace(layer, self_attention=replace(layer.self_attention, module=LatentAttention))
    if config.attn_logit_softcapping is not None:
        attention = layer.self_attention
        attention = replace(attention, submodules=replace(attention.submodules, core_attention=CappedAttention))
        layer = replace(layer, self_attention=attention)
    spec = replace(spec, module=FusedWgradLayer, submodules=replace(layer, mlp=with_router(in_one_call(layer.mlp))))
    return add_post_norms(spec, config, cast(Any, TENorm)) if config.post_layernorm else spec


def _torch_layer(config: DecoderConfig, *, moe: bool) -> ModuleSpec:
    """Megatron's own plain-torch layer, with the norms and the attention above."""
    latent = config.multi_latent_attention
    spec = get_gpt_layer_local_spec(
        normalization="LayerNorm",
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=latent,
        num_experts=config.num_moe_experts if moe else None,
    )
    layer = cast(Any, spec.submodules)
    attention = layer.self_attention
    core = TorchAttention if config.softmax_type == "vanilla" else SinkAttention
    core = core if config.attn_logit_softcapping is None else CappedAttention
    names = ("q_layernorm", "kv_layernorm" if latent else "k_layernorm")
    norms = dict.fromkeys(names, RMSNorm) if config.qk_layernorm else {}
    attention = replace(attention, submodules=replace(attention.submodules, core_attention=core, **norms))
    keys = layer.sharded_state_dict_keys_map
    if latent:
        attention = replace(attention, module=LatentAttention)
        keys = {**NORM_KEYS, "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    if moe:  # Transformer Engine has the norm before experts as a module of its own: so have the global keys
        keys = {name: key for name, key in keys.items() if name != "pre_mlp_layernorm."}
    if moe and config.moe_grouped_gemm:
        layer = replace(layer, mlp=with_groups(layer.mlp))
    elif moe and config.add_bias_linear:
        layer = replace(layer, mlp=with_bias(layer.mlp))
    layer = replace(
        layer,
        input_layernorm=RMSNorm,
        self_attention=attention,
        pre_mlp_layernorm=RMSNorm,
        mlp=with_router(layer.mlp),
        sharded_state_dict_keys_map=keys,
    )
    spec = replace(spec, submodules=layer)
    return add_post_norms(spec, config, RMSNorm) if config.post_layernorm else spec


class _MaskPadding(torch.autograd.Function):
    """Sets the logits of vocabulary padding to −inf in place: padding must not take part in the softmax."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, first: int) -> Tensor:
        logits[..., first:] = torch.finfo(logits.dtype).min
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None  # the softmax there is exactly 0, and so is its gradient


class DecoderModel(GPTModel):
    """GPTModel whose loss leaves out vocabulary padding, with the family's own rotary frequencies.

    `true_vocab_size`: rows of the vocabulary that are real; the rest pads it to a multiple of the TP size.
    `ahead`: layers of multi-token prediction, trained if the config has them, or else only kept on the last stage.
    `scored`: it has a score in place of its output layer, and gives each position's, negated as log-probabilities are.
    `tensor_rules`: what its tensors are made of under Hugging Face names.
    `label_smoothing`: share of a label's probability that is given to the whole vocabulary alike.
    """

    config: DecoderConfig
    true_vocab_size: int
    tensor_rules: Mapping[str, TensorRule]
    label_smoothing: float = 0.0

    def __init__(
        self,
        config: DecoderConfig,
        *args: Any,
        ahead: MultiTokenPredictionBlockSubmodules | None = None,
        vp_stage: int | None = None,
        scored: bool = False,
        **kwargs: Any,
    ) -> None:
        trained = cast(Any, ahead if config.mtp_num_layers else None)
        super().__init__(config, *args, vp_stage=vp_stage, mtp_block_spec=trained, **kwargs)
        self.config = mtp.with_layers(config, None)  # their loss is not left to GPTModel, see `_postprocess`
        if ahead is not None and trained is None and self.post_process:
            self.mtp = mtp.kept_block(config, ahead, chunk=vp_stage, groups=self.pg_collection)
        self.score: ScoreHead | None = None
        if scored and self.post_process:
            del self.output_layer
            self.score = ScoreHead(config, tp_group=self.pg_collection.tp)
        if config.embedding_scale is not None and hasattr(self, "embedding"):
            # transformers rounds the factor to the model's dtype first: √5376 becomes 73.5 in bf16.
            factor = torch.tensor(config.embedding_scale, dtype=config.params_dtype, device="cpu").item()
            self.embedding.register_forward_hook(lambda module, args, output: cast(Tensor, output) * factor)

    def initialize_score(self, *, seed: int) -> None:
        """Fills the score, if this chunk has it, as transformers does."""
        if self.score is not None:
            self.score.initialize(std=self.config.init_method_std, seed=seed)

    def set_rotary(self, frequencies: Tensor, factor: float) -> None:
        """Replaces the rotary frequencies; `factor` multiplies cos and sin (YaRN's attention factor)."""
        ahead = [layer.mtp_model_layer for layer in self.mtp.layers] if self.mtp_process else []
        attentions = [cast(Any, layer).self_attention for layer in (*self.decoder.layers, *ahead)]
        if self.config.multi_latent_attention:
            rotary = LatentRotary(frequencies, factor, self.pg_collection.cp)
            for attention in attentions:
                attention.rotary_pos_emb = rotary
            return
        self.rotary_pos_emb.inv_freq = frequencies.to(self.rotary_pos_emb.inv_freq.device)
        for attention in attentions:
            # Megatron derives this from YaRN-only config fields; transformers gives the number itself.
            attention._yarn_concentration_factor = factor

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        if self.score is None:
            return super().sharded_state_dict(*args, **kwargs)
        self.post_process = False  # where it is set, Megatron 0.19.2 marks the output layer's tensor, which isn't there
        try:
            return super().sharded_state_dict(*args, **kwargs)
        finally:
            self.post_process = True

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """GPTModel's, with `padding_mask` (bool [b, s], true for padding) of the whole sequence at any stage."""
        padding = kwargs.get("padding_mask")
        if padding is not None and self.config.sequence_parallel and not self.pre_process:
            # Megatron 0.19.2 takes a tensor parallel rank's part of it on the first stage only.
            group = self.pg_collection.tp
            kwargs["padding_mask"] = padding.chunk(group.size(), dim=1)[group.rank()]
        return super().forward(input_ids, position_ids, attention_mask, *args, **kwargs)  # type: ignore[arg-type]

    def _postprocess(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        if self.score is not None:
            return -self.score(hidden_states)
        if self.mtp_process and self.training and kwargs["labels"] is not None:
            weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
            hidden_states = mtp.with_loss(self, hidden_states, output_weight=weight, **kwargs)
        return super()._postprocess(hidden_states, **kwargs | {"mtp_in_postprocess": False})

    def _scale_logits(self, logits: Tensor) -> Tensor:
        """Where Megatron scales logits for µP, just after the output layer: soft-capping. [s, b, vocabulary / tp]."""
        cap = self.config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def mask_padding(self, logits: Tensor) -> Tensor:
        """Masks this rank's share of vocabulary padding. logits: [..., vocabulary / tp], changed in place."""
        width = logits.size(-1)
        first = self.true_vocab_size - self.pg_collection.tp.rank() * width
        return _MaskPadding.apply(logits, max(first, 0)) if first < width else logits  # type: ignore[return-value]

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [b, s], logits [s, b, vocabulary / tp] → −log p of the labels, smoothed if asked, float32 [b, s]."""
        if not self.label_smoothing:
            return super().compute_language_model_loss(labels, self.mask_padding(logits))
        group = self.pg_collection.tp
        added = label_minus_mean(logits, labels, vocab_size=self.true_vocab_size, group=group)
        return super().compute_language_model_loss(labels, self.mask_padding(logits)) + self.label_smoothing * added
