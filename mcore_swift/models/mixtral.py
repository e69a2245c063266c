"""Mixtral 8x7B and 8x22B: experts in every layer, Mistral's attention, and names of their own (w1, w3, w2).

transformers holds the experts as one tensor, but what it saves, and what hub folders hold, is a tensor an expert.
"""

from __future__ import annotations

from mcore_swift.models.family import DECODER_ROWS, SLIDING_WINDOW, ConfigRow, Family, only, same
from mcore_swift.weights.rules import ATTENTION, EMBEDDINGS, experts

# Softmax over the top k's logits: Megatron's default, and the same as softmax over all, renormalized.
ROUTING = ConfigRow(lambda config: {"moe_router_pre_softmax": False}, lambda config: {})

MIXTRAL = Family(
    name="mixtral",
    model_types=("mixtral",),
    architecture="MixtralForCausalLM",
    rows=(
        *DECODER_ROWS,
        SLIDING_WINDOW,
        same("num_local_experts", "num_moe_experts"),
        same("num_experts_per_tok", "moe_router_topk"),
        same("intermediate_size", "moe_ffn_hidden_size"),
        ROUTING,
        only("router_jitter_noise", 0.0, default=0.0),
    ),
    rules=EMBEDDINGS
    + ATTENTION
    + experts(prefix="model.layers.{i}.block_sparse_moe.", gate="w1", up="w3", down="w2", router="gate"),
    requires={"transformers": "4.36"},
)
