"""The yardstick: plain GPTModel + Transformer Engine from Megatron-Core, without any code of this project.

Random tokens, Qwen3-8B's shape, DDP with the distributed optimizer, Megatron's schedule. Prints one JSON line.
    torchrun --nproc_per_node=1 perf/plain_mcore.py --layers 8 --micro-batch-size 2 [--fp8 tensorwise]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any

HIDDEN, FFN, HEADS, GROUPS, HEAD_DIM, VOCABULARY = 4096, 12288, 32, 8, 128, 151936


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--fp8", help="a Transformer Engine recipe name")
    return parser.parse_args()


def flops(options: argparse.Namespace, tokens: int) -> float:
    """Model FLOPs of a step: matrix products forward and backward, causal attention counted half."""
    per_layer = HIDDEN * (HEADS + 2 * GROUPS) * HEAD_DIM + HEADS * HEAD_DIM * HIDDEN + 3 * HIDDEN * FFN
    linear = 6 * (options.layers * per_layer + VOCABULARY * HIDDEN) * tokens
    return linear + 6 * options.layers * HEADS * HEAD_DIM * options.sequence_length * tokens


def build(options: argparse.Namespace) -> tuple[Any, Any]:
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig

    fp8: dict[str, Any] = {"fp8": "hybrid", "fp8_recipe": options.fp8} if options.fp8 else {}
    config = TransformerConfig(
        num_layers=options.layers,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=HEAD_DIM,
        ffn_hidden_size=FFN,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        qk_layernorm=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        apply_rope_fusion=True,
        gradient_accumulation_fusion=False,
        cross_entropy_loss_fusion=True,
        cross_entropy_fusion_impl="te",
        **fp8,
    )
    model = GPTModel(
        config,
        get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True),
        vocab_size=VOCABULARY,
        max_sequence_length=options.sequence_length,
        position_embedding_type="rope",
        rotary_base=1000000,
    )
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True, grad_reduce_in_fp32=True
    )
    wrapped = DistributedDataParallel(config, ddp, model.cuda().bfloat16())
    optimizer = get_megatron_optimizer(
        OptimizerConfig(lr=1e-5, bf16=True, use_distributed_optimizer=True, clip_grad=1.0, overlap_param_gather=True),
        [wrapped],
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    config.no_sync_func = wrapped.no_sync
    return wrapped, optimizer


def main() -> None:
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    options = arguments()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    parallel_state.initialize_model_parallel(1, 1)
    model_parallel_cuda_manual_seed(1)
    model, optimizer = build(options)
    size, length = options.micro_batch_size, options.sequence_length
    positions = torch.arange(length, device="cuda").expand(size, -1)

    def forward(batches: Any, module: Any) -> Any:
        batch = next(batches)
        losses = module(batch[:, :-1], positions, None, labels=batch[:, 1:])
        return losses, lambda output: (output.float().mean(), {"loss": output.detach().float().mean()})

    seconds = []
    for _ in range(options.steps):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        model.zero_grad_buffer()
        optimizer.zero_grad()
        batches = [torch.randint(VOCABULARY, (size, length + 1), device="cuda") for _ in range(options.micro_batches)]
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(batches),
            model=model,
            num_microbatches=options.micro_batches,
            seq_length=length,
            micro_batch_size=size,
            forward_only=False,
        )
        optimizer.step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    median = statistics.median(seconds[2:])
    tokens = size * length * options.micro_batches
    row = {
        "fp8": options.fp8,
        "tflops_per_gpu": flops(options, tokens) / median / 1e12,
        "tokens_per_second_per_gpu": tokens / median,
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30,
    }
    if dist.get_rank() == 0:
        print("PLAIN", json.dumps(row), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
