"""What families need to tell their layers and Megatron-Core's TransformerConfig has no field for.

The fields are a mixin, so that each of Megatron's configuration classes can have them.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer import MLATransformerConfig, TransformerConfig


@dataclass
class DecoderFields:
    """Fields of our own; the defaults leave Megatron's model as it is."""

    attn_logit_softcapping: float | None = None  # scores are capped to ± this: cap · tanh(score / cap)
    final_logit_softcapping: float | None = None  # the same for the output layer's logits
    embedding_scale: float | None = None  # embeddings are multiplied by it, rounded to their dtype
    loss_chunk: int = 0  # positions that pass the output layer at once, and again in backward; 0: all of them
    share_prompts: bool = False  # prompts of pairs are computed once, see data.shared_prompts
    post_layernorm: bool = False  # a second norm after attention and after the MLP, before the residual is added


@dataclass
class DecoderConfig(DecoderFields, TransformerConfig):
    """TransformerConfig with the fields above."""


@dataclass
class LatentDecoderConfig(DecoderFields, MLATransformerConfig):
    """The same for multi-latent attention."""
