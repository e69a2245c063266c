"""Coverage of the real shapes of large models, both ways, from headers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckpt_tools.plan import megatron_specs, misfits
from ckpt_tools.source import part_segments
from ckpt_tools.torch_dist import plan_checkpoint
from mcore_swift.models.build import read_source
from mcore_swift.models.keys import global_shapes, weight_rules
from mcore_swift.weights.safetensors_io import TensorSpec
from tests.ckpt_tools.real_shapes import MODELS, model_tensors

# Tens of thousands of experts' tensors take seconds.
LARGEST = dict.fromkeys(("Qwen3-235B-A22B", "GLM-4.5"), pytest.mark.nightly) | {"DeepSeek-V3": pytest.mark.slow}


@pytest.fixture(params=[pytest.param(name, marks=LARGEST.get(name, ())) for name in MODELS])
def large(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, dict[str, TensorSpec]]:
    config = MODELS[request.param] | {"tie_word_embeddings": False, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
    parameters = config.pop("parameters")
    (tmp_path / "config.json").write_text(json.dumps(config))
    specs = model_tensors(config)
    assert sum(spec.nbytes // 2 for spec in specs.values()) == parameters
    return read_source(tmp_path), specs


def test_every_tensor_is_consumed_and_produced_both_ways(large: tuple[Any, dict[str, TensorSpec]]) -> None:
    source, specs = large
    rules = weight_rules(source)
    assert not misfits(source, specs, megatron=False)
    fused = megatron_specs(rules, specs, dtype=None)
    assert {key: spec.shape for key, spec in fused.items()} == global_shapes(source)
    assert not misfits(source, fused, megatron=True)
    copies = sum(specs[name].nbytes for rule in rules.values() for name in rule.copies)  # Megatron holds one for all
    assert sum(spec.nbytes for spec in fused.values()) == sum(spec.nbytes for spec in specs.values()) - copies
    stacks = [key for key, rule in rules.items() if rule.stack]
    layout = plan_checkpoint(fused, Path("there"), stacks=stacks)
    assert layout.tensors.keys() == fused.keys()
    for key, stored in layout.tensors.items():
        stored.check(key)
    assert max(layout.sizes.values()) <= 5 * 10**9


def test_rows_go_there_and_back(large: tuple[Any, dict[str, TensorSpec]]) -> None:
    """Each row of the last layer's fused tensors: where it comes from, and that the way back finds it again."""
    source, specs = large
    last = f".{source.config.num_hidden_layers - 1}."
    for key, rule in weight_rules(source).items():
        if last not in key or not rule.rows:
            continue
        total = sum(rule.rows)
        parts, rows_of = np.full(total, -1), np.full(total, -1)
        for start in range(0, total, 1000):  # pieces that don't end where groups do
            for part, first, stop, target in rule.segments(start, min(start + 1000, total), rule.rows):
                place = slice(start + target, start + target + stop - first)
                parts[place], rows_of[place] = part, np.arange(first, stop)
        assert (parts >= 0).all() and len(np.unique(parts * total + rows_of)) == total
        for part, name in enumerate(rule.hf):
            rows = specs[name].shape[0]
            back = np.full(rows, -1)
            for start in range(0, rows, 777):
                for first, stop, target in part_segments(rule, part, start, min(start + 777, rows)):
                    back[start + target : start + target + stop - first] = range(first, stop)
            assert (parts[back] == part).all() and (rows_of[back] == np.arange(rows)).all()


def test_misfits_are_listed_whole(large: tuple[Any, dict[str, TensorSpec]]) -> None:
    source, specs = large
    layers = sum(name.endswith("self_attn.o_proj.weight") for name in specs)
    wrong = {name: spec for name, spec in specs.items() if not name.endswith("self_attn.o_proj.weight")}
    wrong |= {f"extra.{i}": TensorSpec("BF16", (1,)) for i in range(30)}
    wrong["model.norm.weight"] = TensorSpec("I64", (7,))
    found = misfits(source, wrong, megatron=False)
    assert (len(found.missing), len(found.unexpected), len(found.wrong)) == (layers, 30, 2)
    assert all(name in found.text() for name in (*found.missing, *found.unexpected, *found.wrong))
