"""The sizes of a model that its FLOPs are counted from."""

from __future__ import annotations

from typing import Any

from mcore_swift.flops import DecoderShape, ExpertShape, LatentShape
from mcore_swift.weights.rules import is_moe_layer


def decoder_shape(config: Any, *, vocab_size: int) -> DecoderShape:
    """`config`: a TransformerConfig, or an object with the fields that a family's rows give (`keys.rule_config`)."""

    def field(name: str) -> Any:
        return getattr(config, name, None)

    experts = latent = None
    if config.num_moe_experts is not None:
        experts = ExpertShape(
            num_layers=sum(is_moe_layer(config, layer) for layer in range(config.num_layers)),
            num_experts=config.num_moe_experts,
            topk=config.moe_router_topk,
            ffn_hidden_size=config.moe_ffn_hidden_size,
            shared_ffn_hidden_size=field("moe_shared_expert_intermediate_size") or 0,
            shared_gate=bool(field("moe_shared_expert_gate")),
        )
    if field("multi_latent_attention"):
        latent = LatentShape(
            q_rank=config.q_lora_rank,
            kv_rank=config.kv_lora_rank,
            nope_dim=config.qk_head_dim,
            rope_dim=config.qk_pos_emb_head_dim,
            v_dim=config.v_head_dim,
        )
    return DecoderShape(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        vocab_size=vocab_size,
        gated=config.gated_linear_unit,
        experts=experts,
        latent=latent,
        mtp_layers=field("mtp_num_layers") or 0,
    )
