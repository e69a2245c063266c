"""Qwen3 (dense): RMSNorm on each head's queries and keys, no biases, head_dim given on its own."""

from mcore_swift.models.family import DECODER_ROWS, SLIDING_WINDOW_BY_LAYER, ConfigRow, Family, only
from mcore_swift.weights.rules import ATTENTION, EMBEDDINGS, GATED_MLP

QK_NORM = ConfigRow(lambda config: {"qk_layernorm": True}, lambda config: {})

QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3",),
    architecture="Qwen3ForCausalLM",
    rows=(*DECODER_ROWS, QK_NORM, only("attention_bias", False, default=False), SLIDING_WINDOW_BY_LAYER),
    rules=EMBEDDINGS + ATTENTION + GATED_MLP,
    requires={"transformers": "4.51"},
)
