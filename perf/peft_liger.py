"""LoRA by transformers, PEFT and Liger Kernel: what a user would run instead on one GPU. Random weights and tokens.

    python -m perf.peft_liger MODEL [--rank 16] [--length 4096] [--micro-batches 8] [--steps 7] [--checkpointing]

MODEL: a folder with a config.json of Qwen3. BF16 (on a CPU FP32, without Liger), fused AdamW,
scaled_dot_product_attention; a micro-batch is one sequence. Prints one line of JSON after the word PEFT.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perf.trl_dpo import PROJECTIONS, random_model


def adapted_model(folder: Path, *, rank: int, checkpointing: bool) -> Any:
    """The model with random weights and its adapters, in training mode."""
    import torch
    from peft import LoraConfig, get_peft_model

    if torch.cuda.is_available():
        importlib.import_module("liger_kernel.transformers").apply_liger_kernel_to_qwen3()
    model = random_model(folder)
    model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=PROJECTIONS)).train()


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args(words)
    import torch

    model = adapted_model(options.model, rank=options.rank, checkpointing=options.checkpointing)
    device = model.device
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    seconds, loss = [], float("nan")
    for _ in range(options.steps):
        begin = time.perf_counter()
        for _ in range(options.micro_batches):
            tokens = torch.randint(0, model.config.vocab_size, (1, options.length), device=device)
            output = model(input_ids=tokens, labels=tokens)
            (output.loss / options.micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = output.loss.item()  # waits for the GPU
        seconds.append(time.perf_counter() - begin)
    step = statistics.median(seconds[2:])
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    found = {
        "tokens_per_second": options.micro_batches * options.length / step,
        "peak_gib": memory,
        "loss": loss,
        "seconds": seconds,
    }
    print("PEFT", json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
