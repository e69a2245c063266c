"""The shapes of large published models, from public facts alone: none of the project's rules or tables are used."""

from __future__ import annotations

from typing import Any

from mcore_swift.weights.safetensors_io import TensorSpec

Shapes = dict[str, tuple[int, ...]]

# From the models' public config.json files; `parameters` as published (the sum over the safetensors' headers).
MODELS: dict[str, dict[str, Any]] = {
    "Llama-3.1-405B": {
        "model_type": "llama",
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "parameters": 405_853_388_800,
    },
    "Qwen2.5-72B": {
        "model_type": "qwen2",
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "rope_theta": 1000000.0,
        "parameters": 72_706_203_648,
    },
    "Qwen3-32B": {
        "model_type": "qwen3",
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "rope_theta": 1000000.0,
        "parameters": 32_762_123_264,
    },
    "Mistral-Large-2407": {
        "model_type": "mistral",
        "hidden_size": 12288,
        "intermediate_size": 28672,
        "num_hidden_layers": 88,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 32768,
        "sliding_window": None,
        "rope_theta": 1000000.0,
        "parameters": 122_610_069_504,
    },
    "Mixtral-8x22B": {
        "model_type": "mixtral",
        "hidden_size": 6144,
        "intermediate_size": 16384,
        "num_hidden_layers": 56,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "rope_theta": 1000000.0,
        "parameters": 140_620_634_112,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "rope_theta": 1000000.0,
        "parameters": 30_532_122_624,
    },
    "Qwen3-235B-A22B": {
        "model_type": "qwen3_moe",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "rope_theta": 1000000.0,
        "parameters": 235_093_634_560,
    },
    "GLM-4.5": {
        "model_type": "glm4_moe",
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 92,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151552,
        "n_routed_experts": 160,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "attention_bias": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
        "num_nextn_predict_layers": 1,
        "rope_theta": 1000000.0,
        "parameters": 358_337_791_296,
    },
    "DeepSeek-V3": {
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "vocab_size": 129280,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "num_nextn_predict_layers": 1,
        "rope_theta": 10000.0,
        "parameters": 684_489_845_504,
    },
}


def _attention(c: dict[str, Any], layer: str) -> Shapes:
    hidden, heads, groups = (c[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    head = c.get("head_dim", hidden // heads)
    shapes: Shapes = {f"{layer}self_attn.o_proj.weight": (hidden, heads * head)}
    for name, rows in (("q", heads * head), ("k", groups * head), ("v", groups * head)):
        shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, hidden)
        if c["model_type"] in ("qwen2", "glm4_moe"):
            shapes[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
        if c["model_type"] in ("qwen3", "qwen3_moe", "glm4_moe") and name != "v":
            shapes[f"{layer}self_attn.{name}_norm.weight"] = (head,)
    return shapes


def _latent_attention(c: dict[str, Any], layer: str) -> Shapes:
    hidden, heads, queries, keys = (c[k] for k in ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank"))
    plain, rotated, values = (c[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    return {
        f"{layer}self_attn.q_a_proj.weight": (queries, hidden),
        f"{layer}self_attn.q_a_layernorm.weight": (queries,),
        f"{layer}self_attn.q_b_proj.weight": (heads * (plain + rotated), queries),
        f"{layer}self_attn.kv_a_proj_with_mqa.weight": (keys + rotated, hidden),
        f"{layer}self_attn.kv_a_layernorm.weight": (keys,),
        f"{layer}self_attn.kv_b_proj.weight": (heads * (plain + values), keys),
        f"{layer}self_attn.o_proj.weight": (hidden, heads * values),
    }


def _gated(
    place: str, hidden: int, ffn: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> Shapes:
    gate, up, down = (f"{place}.{name}.weight" for name in names)
    return {gate: (ffn, hidden), up: (ffn, hidden), down: (hidden, ffn)}


def _experts(c: dict[str, Any], layer: str) -> Shapes:
    hidden = c["hidden_size"]
    count = next(c[k] for k in ("num_experts", "num_local_experts", "n_routed_experts") if k in c)
    mixtral = c["model_type"] == "mixtral"
    place = f"{layer}block_sparse_moe" if mixtral else f"{layer}mlp"
    ffn = c["intermediate_size"] if mixtral else c["moe_intermediate_size"]
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    shapes: Shapes = {f"{place}.gate.weight": (count, hidden)}
    for expert in range(count):
        shapes |= _gated(f"{place}.experts.{expert}", hidden, ffn, names)
    if "n_shared_experts" in c:
        shapes[f"{place}.gate.e_score_correction_bias"] = (count,)
        shapes |= _gated(f"{place}.shared_experts", hidden, ffn * c["n_shared_experts"])
    return shapes


def model_tensors(c: dict[str, Any]) -> dict[str, TensorSpec]:
    """What the published folder holds, written down without the project's rules."""
    hidden, vocabulary, layers = c["hidden_size"], c["vocab_size"], c["num_hidden_layers"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    ahead = c.get("num_nextn_predict_layers", 0)
    dense = c.get("first_k_dense_replace", 0 if any("experts" in key for key in c) else layers)
    for i in range(layers + ahead):
        layer = f"model.layers.{i}."
        shapes |= (_latent_attention if "kv_lora_rank" in c else _attention)(c, layer)
        shapes |= _gated(f"{layer}mlp", hidden, c["intermediate_size"]) if i < dense else _experts(c, layer)
        shapes[f"{layer}input_layernorm.weight"] = shapes[f"{layer}post_attention_layernorm.weight"] = (hidden,)
    for i in range(layers, layers + ahead):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{name}.weight": (hidden,) for name in ("enorm", "hnorm", "shared_head.norm")}
        shapes[f"{layer}eh_proj.weight"] = (hidden, 2 * hidden)
        shapes |= {f"{layer}{name}.weight": (vocabulary, hidden) for name in ("embed_tokens", "shared_head.head")}
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocabulary, hidden)
    return {name: TensorSpec("BF16", shape) for name, shape in shapes.items()}
