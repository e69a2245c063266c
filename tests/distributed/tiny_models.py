"""Tiny random transformers models of every family and variant, for parity and layout tests.

Sizes are chosen so that no two that could be confused are equal. Weights are far from their usual initial values: with
those, attention is nearly uniform and every norm 1, and a wrong permutation or rotary frequency hardly shows.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from tests.distributed.tiny_mtp import add_mtp

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 112,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    "attn_implementation": "eager",
}


def _rope(kind: str, **values: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **values}}


# Multi-latent attention and experts as DeepSeek's models have them.
DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 40,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "n_routed_experts": 8,
    "moe_intermediate_size": 36,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
GEMMA: dict[str, Any] = {
    "head_dim": 24,
    "query_pre_attn_scalar": 20,
    "sliding_window": 5,
    "vocab_size": 101,
    "tie_word_embeddings": True,
    "pad_token_id": None,
}

# name → (model_type, what differs from COMMON)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-odd-vocabulary": ("llama", {"tie_word_embeddings": True, "vocab_size": 101}),
    "llama-rope-llama3": (
        "llama",
        {
            "vocab_size": 101,
            "tie_word_embeddings": True,
            **_rope(
                "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
            ),
        },
    ),
    "llama-rope-linear": ("llama", _rope("linear", factor=4.0)),
    "llama-rope-yarn": ("llama", _rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "vocab_size": 101}),
    "llama-9-heads": (
        "llama",  # SmolLM2's proportions
        {
            "hidden_size": 72,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
            "vocab_size": 101,
        },
    ),
    "mistral-head-dim": ("mistral", {"head_dim": 24, "sliding_window": None}),
    "mistral-window": ("mistral", {"head_dim": 24, "sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "vocab_size": 101}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"head_dim": 24, "vocab_size": 101}),
    "qwen3-tied": ("qwen3", {"head_dim": 24, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen3-moe": (
        "qwen3_moe",
        {
            "head_dim": 24,
            "vocab_size": 101,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "mixtral": (
        "mixtral",
        {"head_dim": 24, "vocab_size": 101, "num_local_experts": 8, "num_experts_per_tok": 3, "sliding_window": None},
    ),
    "mixtral-window": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5}),
    "qwen2-moe": (
        "qwen2_moe",
        {
            "vocab_size": 101,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 56,
            "mlp_only_layers": [2],
        },
    ),
    "qwen2-moe-every-second": (
        "qwen2_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 56,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "qkv_bias": False,
        },
    ),
    "glm4-moe": (
        "glm4_moe",
        {
            "head_dim": 24,
            "vocab_size": 101,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "n_shared_experts": 2,
            "routed_scaling_factor": 1.7,
            "first_k_dense_replace": 1,
            "use_qk_norm": True,
            "attention_bias": True,
            "num_mtp_layers": 0,
        },
    ),
    "glm4-moe-groups": (
        "glm4_moe",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "moe_intermediate_size": 40,
            "n_shared_experts": 1,
            "first_k_dense_replace": 2,
            "num_mtp_layers": 0,
        },
    ),
    "gpt-oss": (
        "gpt_oss",
        {
            "head_dim": 24,
            "vocab_size": 101,
            "intermediate_size": 40,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "sliding_window": 5,
            **_rope("yarn", factor=4.0, original_max_position_embeddings=16, truncate=False),
        },
    ),
    "deepseek-v2": (
        "deepseek_v2",  # V2's choice among groups, which Megatron makes otherwise
        {
            **DEEPSEEK,
            "num_experts_per_tok": 4,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 4.0,
            **_rope("yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.707, mscale_all_dim=0.707),
        },
    ),
    "deepseek-v2-lite": (
        "deepseek_v2",
        {**DEEPSEEK, "q_lora_rank": None, "num_experts_per_tok": 3, "vocab_size": 101},
    ),
    "deepseek-v3": (
        "deepseek_v3",
        {
            **DEEPSEEK,
            "vocab_size": 101,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "num_nextn_predict_layers": 2,
            **_rope("yarn", factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.8),
        },
    ),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2-uncapped": (
        "gemma2",
        GEMMA
        | {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "layer_types": ["full_attention"] * 4,
            "tie_word_embeddings": False,
        },
    ),
    "gemma3": (
        "gemma3_text",
        GEMMA
        | {
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
    "gemma3-capped": (
        "gemma3_text",
        GEMMA
        | {
            "final_logit_softcapping": 3.0,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"],
            "rope_parameters": None,  # Gemma's own two bases
        },
    ),
}
# How large the values of some tensors are, by the end of their names: large enough for gpt-oss' clamps at 7.
SCALES = {"gate_up_proj_bias": 4.0, "sinks": 1.0}
# One a family, with as many of its oddities as go together: what the layout tests run.
REPRESENTATIVES = ("llama-rope-llama3", "mistral-window", "qwen2-tied", "qwen3")


def tiny_config(variant: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    model_type, differences = VARIANTS[variant]
    values = deepcopy(COMMON | differences | changes)  # some configs change the mappings they are given
    return AutoConfig.for_model(model_type, **values)


def tiny_model(variant: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A transformers model in eval mode; the same weights each time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config(variant, **changes), dtype=torch.float32)
    generator = torch.Generator().manual_seed(7)
    unit = 0 if variant.startswith("gemma") else 1  # of a norm; Gemma's are zero-centred
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            scale = next((scale for part, scale in SCALES.items() if name.endswith(part)), 0.15)
            parameter.copy_(unit + 0.3 * values if "norm" in name else scale * values)
        for name, buffer in model.named_buffers():  # not a parameter, but a tensor of the folder
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model.to(dtype).eval()


def tiny_folder(folder: Path, variant: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Saves the tiny model in `folder`, which is returned; a folder that is already there is used as it is."""
    if not (folder / "config.json").exists():
        model = tiny_model(variant, dtype=dtype, **changes)
        model.save_pretrained(folder)
        if getattr(model.config, "num_nextn_predict_layers", 0):
            add_mtp(folder, model)
    return folder
