"""Mistral 7B and Mistral Nemo (whose head_dim is not hidden_size / heads); sliding-window attention in every layer."""

from mcore_swift.models.family import DECODER_ROWS, SLIDING_WINDOW, Family
from mcore_swift.weights.rules import ATTENTION, EMBEDDINGS, GATED_MLP

MISTRAL = Family(
    name="mistral",
    model_types=("mistral",),
    architecture="MistralForCausalLM",
    rows=(*DECODER_ROWS, SLIDING_WINDOW),
    rules=EMBEDDINGS + ATTENTION + GATED_MLP,
    requires={"transformers": "4.42"},  # head_dim
)
