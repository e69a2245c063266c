"""The yardstick of perf/gpu_dpo.py: TRL's DPOTrainer with PEFT's LoRA and Liger's kernels, nothing of this project.

    python -m perf.trl_dpo CONFIG TOKENIZER ROWS [--steps 7] [--tries 4 3 2 1] [--checkpointing]

CONFIG: a folder with a config.json, whose model gets random weights. ROWS: JSONL with prompt, chosen and rejected,
plain texts; all of them together are a step. --tries: pairs in a forward pass; the first that fits into memory counts.
On a GPU in BF16 with Liger, where it can be imported; on a CPU in FP32 without. Prints one line: TRL and JSON.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def random_model(folder: Path) -> Any:
    """The config's model on the GPU, if there is one: drawn there, because a CPU takes minutes for 8B weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    on_gpu = torch.cuda.is_available()
    config = AutoConfig.from_pretrained(folder)
    with torch.device("cuda" if on_gpu else "cpu"):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if on_gpu else torch.float32, attn_implementation="sdpa"
        )


def stopwatch() -> Any:
    """A trainer's callback whose `ends` are the times, in seconds, of the start and of each step's end."""
    import torch
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def _now(self) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self._now()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self._now()
            print(f"step {len(self.ends) - 1}: {self.ends[-1] - self.ends[-2]:.2f} s", flush=True)

    return Stopwatch()


def build(options: argparse.Namespace, place: str, *, pairs: int, rows: list[dict[str, str]]) -> Any:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    on_gpu = torch.cuda.is_available()
    settings: dict[str, Any] = {
        "output_dir": place,
        "per_device_train_batch_size": pairs,
        "gradient_accumulation_steps": len(rows) // pairs,
        "max_steps": options.steps,
        "max_length": None,
        "gradient_checkpointing": options.checkpointing,
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "use_liger_kernel": on_gpu and importlib.util.find_spec("liger_kernel") is not None,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    return DPOTrainer(
        model=random_model(options.config),
        args=DPOConfig(**settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(options.tokenizer),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=PROJECTIONS, task_type="CAUSAL_LM"),
    )


def measure(options: argparse.Namespace, *, pairs: int, rows: list[dict[str, str]]) -> dict[str, Any]:
    """Trains for `options.steps` steps with `pairs` pairs in a forward pass."""
    import torch

    with tempfile.TemporaryDirectory() as place:
        trainer = build(options, place, pairs=pairs, rows=rows)
        watch, positions = stopwatch(), []
        trainer.add_callback(watch)
        collate = trainer.data_collator

        def counted(examples: list[Any]) -> Any:
            batch = collate(examples)
            positions.append(batch["input_ids"].numel())
            return batch

        trainer.data_collator = counted
        trainer.train()
    lengths = [[len(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")] for row in trainer.train_dataset]
    return {
        "seconds": [after - before for before, after in zip(watch.ends, watch.ends[1:], strict=False)],
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "tokens": sum(2 * prompt + chosen + rejected for prompt, chosen, rejected in lengths),
        "padding": 1 - sum(2 * p + c + r for p, c, r in lengths) * options.steps / max(1, sum(positions)),
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        "pairs_in_a_pass": pairs,
        "checkpointing": options.checkpointing,
        "liger": trainer.args.use_liger_kernel,
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--tries", type=int, nargs="+", default=[4, 3, 2, 1])
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args(words)
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    os.environ.setdefault(
        "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"
    )  # memory in pieces is no reason to fail
    import torch

    rows = [json.loads(line) for line in options.rows.read_text().splitlines()]
    too_large: list[int] = []
    for pairs in options.tries:
        if len(rows) % pairs:
            continue
        try:
            found = measure(options, pairs=pairs, rows=rows)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "ALLOC_FAILED" not in str(error):  # cuBLAS's own
                raise
            too_large.append(pairs)
            print(f"{pairs} pairs in a forward pass don't fit", flush=True)
        else:
            print("TRL " + json.dumps(found | {"too_large": too_large}), flush=True)
            return 0
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    print(f"none of {options.tries} pairs in a forward pass could be used with {len(rows)} rows")
    return 1


if __name__ == "__main__":
    sys.exit(main())
