"""What the tests against a real Slurm share: a cluster, and a tiny run that lasts a few seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
}
RECIPE = """\
model: {path: model, init: random}
data: {train: synthetic, format: synthetic, sequence_length: 16}
parallel: {pp: 2}
schedule: {steps: 6, global_batch_size: 4, learning_rate: 1.0e-3}
checkpoint: {interval: 2, keep: 0, export: false}
logging: {tensorboard: false}
runtime: {device: cpu, threads: 1}
"""
# The machine that these tests share gives a node whatever is left: only what is broken may count as bad.
LIMITS = "disk_gib=0 tmp_gib=0 inodes=0 shm_gib=0.03 shared_mb_s=0 nofile=256 memlock_gib=0 slow=0 seconds=240"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return make_place(tmp_path)


def make_place(folder: Path) -> Path:
    """A folder with a recipe for two nodes of one rank each, and a site's file."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(MODEL))
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "site.env").write_text(f'MCORE_SWIFT_PREFLIGHT="{LIMITS}"\nMCORE_SWIFT_RUNS={folder}/runs\n')
    return folder
