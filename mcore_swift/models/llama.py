"""Llama 2, Llama 3.x (RoPE scaling "llama3"), SmolLM2 and everything else that calls itself `llama`."""

from mcore_swift.errors import InputError
from mcore_swift.models.family import DECODER_ROWS, ConfigRow, Family, HFConfig
from mcore_swift.weights.rules import ATTENTION, EMBEDDINGS, GATED_MLP


def _read_biases(config: HFConfig) -> dict[str, object]:
    attention, mlp = bool(getattr(config, "attention_bias", False)), bool(getattr(config, "mlp_bias", False))
    if attention != mlp:  # attention_bias puts one on o_proj too, which Megatron has only together with the MLP's
        raise InputError(
            f"config.json: attention_bias {attention} with mlp_bias {mlp} is not supported; set both or neither"
        )
    return {"add_bias_linear": attention}


BIASES = ConfigRow(_read_biases, lambda c: {"attention_bias": c.add_bias_linear, "mlp_bias": c.add_bias_linear})

LLAMA = Family(
    name="llama",
    model_types=("llama",),
    architecture="LlamaForCausalLM",
    rows=(*DECODER_ROWS, BIASES),
    rules=EMBEDDINGS + ATTENTION + GATED_MLP,
    requires={"transformers": "4.43"},  # llama3 RoPE scaling
)
