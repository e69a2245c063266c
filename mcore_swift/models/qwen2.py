"""Qwen2 and Qwen2.5: biases on q, k and v; optional sliding window in the upper layers."""

from mcore_swift.models.family import DECODER_ROWS, SLIDING_WINDOW_BY_LAYER, ConfigRow, Family
from mcore_swift.weights.rules import ATTENTION, EMBEDDINGS, GATED_MLP

QKV_BIAS = ConfigRow(lambda config: {"add_qkv_bias": True}, lambda config: {})

QWEN2 = Family(
    name="qwen2",
    model_types=("qwen2",),
    architecture="Qwen2ForCausalLM",
    rows=(*DECODER_ROWS, QKV_BIAS, SLIDING_WINDOW_BY_LAYER),
    rules=EMBEDDINGS + ATTENTION + GATED_MLP,
    requires={"transformers": "4.37"},
)
