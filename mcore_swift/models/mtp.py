"""Layers of multi-token prediction (MTP): kept as they are, or trained with a loss of their own.

Layer d of D predicts, from the hidden state at token i and the embedding of token i + d, token i + d + 1. Its loss is
the sum over labels that count, weighted by mtp_loss_scale / D and divided, as the main loss is, by the global batch's
number of labels: Megatron 0.19.2 divides by each micro-batch's own number, so that its loss depends on what shares a
micro-batch. DeepSeek-V3's report, arXiv 2412.19437, section 2.2.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any, cast

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.multi_token_prediction import (
    MTPLossAutoScaler,
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    get_mtp_layer_spec,
    roll_tensor,
)
from torch import Tensor, nn


class AheadLayer(MultiTokenPredictionLayer):
    """Megatron's layer. What is padding stays where it is: position i is token i's whatever is predicted there."""

    def _get_embeddings(self, *args: Any, padding_mask: Tensor | None = None, **kwargs: Any) -> Any:
        tokens, positions, _, embedded, hidden = super()._get_embeddings(*args, **kwargs)
        return tokens, positions, padding_mask, embedded, hidden


def block_spec(
    layer: ModuleSpec, count: int, *, norm: type[nn.Module] | None = None
) -> MultiTokenPredictionBlockSubmodules:
    """`count` layers that are `layer` inside. norm: the class of their own norms; None: Transformer Engine's."""
    spec = get_mtp_layer_spec(layer, use_transformer_engine=norm is None)
    if norm is not None:
        norms = dict.fromkeys(("enorm", "hnorm", "layer_norm"), norm)
        spec = replace(spec, submodules=replace(cast(Any, spec.submodules), **norms))
    return MultiTokenPredictionBlockSubmodules(layer_specs=[replace(spec, module=AheadLayer)] * count)


def with_layers[Config: TransformerConfig](config: Config, count: int | None) -> Config:
    """A copy of the config that says there are `count` layers of multi-token prediction; None: there are none."""
    changed = copy(config)
    changed.mtp_num_layers = count
    return changed


def kept_block(
    config: TransformerConfig, spec: MultiTokenPredictionBlockSubmodules, *, chunk: int | None, groups: Any
) -> MultiTokenPredictionBlock:
    """Layers that only hold their weights, so that they are saved and exported: they are neither run nor trained."""
    config = with_layers(config, len(spec.layer_specs or ()))
    block = MultiTokenPredictionBlock(config, cast(Any, spec), vp_stage=chunk, pg_collection=groups)
    return block.requires_grad_(False)


def with_loss(
    model: Any,
    hidden_states: Tensor,
    *,
    input_ids: Tensor,
    position_ids: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    padding_mask: Tensor | None,
    rotary_pos_emb: Tensor | None,
    packed_seq_params: PackedSeqParams | None,
    output_weight: Tensor | None,
    **_: Any,
) -> Tensor:
    """The decoder's output `hidden_states` [s, b, h], whose backward pass also starts that of the layers' losses.

    labels, loss_mask [b, s]: those of token i + 1 at i. output_weight: the output layer's if it is the embedding's.
    """
    found = model.mtp(
        input_ids=input_ids,
        position_ids=position_ids,
        hidden_states=hidden_states,
        attention_mask=None,
        rotary_pos_emb=rotary_pos_emb,
        packed_seq_params=packed_seq_params,
        padding_mask=padding_mask,
        embedding=model.embedding,
    )
    hidden_states, *ahead = found.split(hidden_states.size(0))
    scale = model.mtp.mtp_loss_scaling_factor / len(ahead)
    for part in ahead:
        labels, loss_mask = (
            cast(Tensor, roll_tensor(each, cp_group=model.pg_collection.cp, packed_seq_params=packed_seq_params)[0])
            for each in (labels, loss_mask)
        )  # up by one, within each document
        logits, _ = model.output_layer(part, weight=output_weight)
        loss = (model.compute_language_model_loss(labels, logits) * loss_mask).sum()
        attached = MTPLossAutoScaler.apply(hidden_states, scale * loss)  # in backward scaled as the main loss is
        hidden_states = cast(Tensor, attached)
    return hidden_states
