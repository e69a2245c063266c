"""A plain Megatron-Core program, with none of this project's code: loads a converted checkpoint and gives its logits.

It shows that what `mcore-swift convert` writes is an ordinary Megatron checkpoint. `logits` runs on one of tp × pp × ep
ranks; the environment variables of torchrun are expected. Written for CPU ranks of the tests; on GPUs the backend and
the layer spec (Transformer Engine's) would differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig


def experts(hf: dict[str, Any], ep: int) -> dict[str, Any]:
    """The fields of a qwen3_moe config.json."""
    layers = range(hf["num_hidden_layers"])
    return {
        "num_moe_experts": hf["num_local_experts"],
        "moe_router_topk": hf["num_experts_per_tok"],
        "moe_ffn_hidden_size": hf["moe_intermediate_size"],
        "moe_layer_freq": [int(i not in hf["mlp_only_layers"]) for i in layers],
        "moe_router_pre_softmax": not hf["norm_topk_prob"],
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": ep,
    }


def build(hf: dict[str, Any], tp: int, pp: int, ep: int) -> GPTModel:
    """The model of a Hugging Face config.json (llama, qwen2, qwen3 or qwen3_moe with plain rotary embeddings)."""
    config = TransformerConfig(
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        ffn_hidden_size=hf["intermediate_size"],
        num_attention_heads=hf["num_attention_heads"],
        num_query_groups=hf["num_key_value_heads"],
        kv_channels=hf.get("head_dim", hf["hidden_size"] // hf["num_attention_heads"]),
        layernorm_epsilon=hf["rms_norm_eps"],
        add_qkv_bias=hf["model_type"] == "qwen2",
        qk_layernorm=hf["model_type"].startswith("qwen3"),
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        params_dtype=torch.float32,
        use_cpu_initialization=True,
        attention_softmax_in_fp32=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        batch_p2p_comm=False,
        **(experts(hf, ep) if "num_local_experts" in hf else {}),
    )
    return GPTModel(
        config,
        get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm"),  # type: ignore[arg-type]
        vocab_size=-(-hf["vocab_size"] // tp) * tp,
        max_sequence_length=hf["max_position_embeddings"],
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=hf["tie_word_embeddings"],
        position_embedding_type="rope",
        rotary_base=int(hf["rope_parameters"]["rope_theta"]),
    )


def load(model: GPTModel, checkpoint: Path) -> None:
    """Fills this rank's model; any layout will do."""
    wanted: dict[str, Any] = model.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    for name, item in wanted.items():
        layer, norm, _ = name.partition(".pre_mlp_layernorm.")
        if norm and f"{layer}.mlp.router.weight" in wanted:
            # Megatron's two layer specs disagree on the name of the norm before experts. Checkpoints have Transformer
            # Engine's, which a program on GPUs asks for; the local spec takes a dense layer's.
            item.key = item.key.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
    model.load_state_dict(dist_checkpointing.load(wanted, str(checkpoint)))  # type: ignore[arg-type]


def logits(
    checkpoint: Path, hf: dict[str, Any], tokens: torch.Tensor, tp: int, pp: int, ep: int = 1
) -> torch.Tensor | None:
    """tokens int64 [b, s] → float32 logits [b, s, vocabulary] on the last stage's ranks, None elsewhere."""
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tp, pp, expert_model_parallel_size=ep)
    model_parallel_cuda_manual_seed(1)
    model = build(hf, tp, pp, ep).eval()
    load(model, checkpoint)
    positions = torch.arange(tokens.size(1)).expand_as(tokens)
    mask = torch.ones(tokens.size(1), tokens.size(1), dtype=torch.bool).triu(1)[None, None]

    def step(batches: Iterator[torch.Tensor], stage: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        return stage(next(batches), positions, mask), lambda output, **_: output

    with torch.no_grad():
        parts = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter([tokens]),
            model=model,
            num_microbatches=1,
            seq_length=tokens.size(1),
            micro_batch_size=tokens.size(0),
            forward_only=True,
            collect_non_loss_data=True,
        )
    if not parts:
        return None
    (part,) = parts
    shards = [torch.empty_like(part) for _ in range(tp)]
    dist.all_gather(shards, part.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(shards, dim=-1)[..., : hf["vocab_size"]]
