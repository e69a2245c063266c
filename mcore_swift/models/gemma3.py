"""Gemma 3, text: Gemma 2 without capped scores, with norms on each head's queries and keys, and RoPE by layer type.

Layers with a sliding window have another RoPE base than the others, and no scaling.

A folder of model_type `gemma3` has a vision tower as well, which would be lost: only `gemma3_text` is served. The
language model alone:

    whole = transformers.Gemma3ForConditionalGeneration.from_pretrained(FOLDER, dtype="auto")
    text = transformers.Gemma3ForCausalLM(whole.config.text_config).to(whole.dtype)
    text.model = whole.model.language_model
    text.tie_weights()
    text.save_pretrained(TEXT_FOLDER)
"""

from mcore_swift.models.family import Family, only
from mcore_swift.models.gemma2 import GEMMA_ROWS, GEMMA_RULES, gemma_fields
from mcore_swift.models.qwen3 import QK_NORM

GEMMA3 = Family(
    name="gemma3",
    model_types=("gemma3_text",),
    architecture="Gemma3ForCausalLM",
    rows=(*GEMMA_ROWS, QK_NORM, only("attn_logit_softcapping", None)),  # transformers' layers don't cap
    rules=GEMMA_RULES,
    fields=gemma_fields,
    requires={"transformers": "5.0"},  # rope_parameters by layer type
)
