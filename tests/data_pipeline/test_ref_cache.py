"""The reference's log-probabilities beside the data: computed once, never mistaken for others."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mcore_swift.data.batch import MicroBatch
from mcore_swift.data.loader import LoaderShape, Wanted, build_loaders
from mcore_swift.data.ref_cache import add_ref_logps, model_key
from mcore_swift.errors import InputError
from mcore_swift.recipe import DataSection

PAIRS, PROBED = Wanted("dpo", "pairs"), Wanted("kto", "answers", probes=True)
FILES = {PAIRS: "gsm8k_preference.jsonl", PROBED: "gsm8k_labelled.jsonl"}
Build = Callable[..., Any]


@dataclass
class Policy:
    """An answer's log-probability is −Σ its labels / 1000: it tells answers apart, and nothing else."""

    calls: int = 0

    def __call__(self, batches: list[MicroBatch]) -> list[torch.Tensor]:
        self.calls += 1
        return [expected(batch) for batch in batches]


def expected(batch: MicroBatch) -> torch.Tensor:
    assert batch.sequences is not None
    labels = [batch.labels[batch.sequences.index == number].sum() for number in range(batch.sequences.n)]
    return -torch.tensor(labels, dtype=torch.float32) / 1000


@pytest.fixture
def build(tokenizer: Any, section: Callable[..., DataSection], make_shape: Callable[..., LoaderShape]) -> Build:
    def make(wanted: Wanted, *files: Path, shape: dict[str, int] | None = None, **settings: Any) -> Any:
        data = section(*(files or [FILES[wanted]]), **({"sequence_length": 1024} | settings))
        sizes = make_shape(**({"sequence_length": 1024} | (shape or {})))
        return build_loaders(data, shape=sizes, tokenizer=tokenizer, seed=1, vocab_size=600, wanted=wanted)[0]

    return make


def add(loader: Any, folder: Path, policy: Any, model: str = "m", merge: Any = lambda values: values) -> bool:
    return add_ref_logps(loader.samples, model=model, compute=policy, merge=merge, cache_dir=folder)


def check(loader: Any) -> None:
    for step in range(4):
        for batch in loader.micro_batches(step):
            assert batch.sequences.ref_logps.equal(expected(batch)) and batch.sequences.ref_logps.dtype == torch.float32


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("wanted", [PAIRS, PROBED], ids=["pairs", "probes"])
def test_each_answer_gets_its_own_and_later_runs_reuse_them(
    build: Build, tmp_path: Path, wanted: Wanted, packing: bool
):
    policy = Policy()
    first = build(wanted, packing=packing)
    assert not add(first, tmp_path, policy) and policy.calls
    check(first)
    assert not first.report()["reference_reused"] and first.report()["reference_seconds"] >= 0
    policy.calls = 0
    for changed in ({"packing": not packing}, {"shuffle": False}, {"shape": {"micro_batch_size": 2}}):
        again = build(wanted, **({"packing": packing} | changed))
        assert add(again, tmp_path, policy) and not policy.calls
        check(again)
        assert again.report()["reference_reused"]
    assert sorted(path.suffix for path in (tmp_path / "reference").iterdir()) == ["", ".lock"]


def test_another_policy_or_other_answers_are_computed_anew(
    build: Build, tmp_path: Path, fixtures: Path, jsonl: Callable[..., Path], tokenizer: Any
):
    policy = Policy()
    assert not add(build(PAIRS), tmp_path, policy)
    assert not add(build(PAIRS), tmp_path, policy, model="other")
    rows = [json.loads(line) for line in (fixtures / FILES[PAIRS]).open()]
    rows[-1]["rejected_messages"][-1]["content"] = "I don't know."
    loader = build(PAIRS, jsonl(*rows))
    assert not add(loader, tmp_path, policy)
    check(loader)
    assert not add(build(PAIRS, packing=False, sequence_length=100), tmp_path, policy)  # the answers are cut
    tokenizer.chat_template = tokenizer.chat_template.replace("Be brief.", "Be kind.")
    assert not add(build(PAIRS), tmp_path, policy)
    assert add(build(PAIRS), tmp_path, policy)


def test_ranks_share_the_work(build: Build, tmp_path: Path):
    """Two data parallel ranks, one after the other: what each computes, merged, is what one rank computes."""
    parts: list[np.ndarray] = []

    def remember(values: np.ndarray) -> np.ndarray:
        parts.append(values)
        return np.zeros_like(values) if values.ndim == 2 else values

    for rank in range(2):
        loader = build(PAIRS, shape={"dp_size": 2, "dp_rank": rank})
        add(loader, tmp_path / str(rank), Policy(), merge=remember)
    found = [part for part in parts if part.ndim == 2]
    assert all(np.isinf(part).any() and not np.isinf(part).all() for part in found)
    assert ((found[0] == -np.inf) == (found[1] != -np.inf)).all()
    whole = build(PAIRS)
    add(whole, tmp_path / "whole", Policy())
    assert np.array_equal(np.maximum(*found).astype(np.float32), whole.samples.samples.ref_logps)


def test_one_rank_without_the_entry_makes_all_compute(build: Build, tmp_path: Path):
    add(build(PAIRS), tmp_path, Policy())
    policy = Policy()
    assert not add(build(PAIRS), tmp_path, policy, merge=lambda values: np.ones(1) if values.ndim == 1 else values)
    assert policy.calls


def test_what_is_not_finite_or_broken_is_named(build: Build, tmp_path: Path):
    loader = build(PAIRS)
    with pytest.raises(InputError, match=r"gsm8k_preference\.jsonl:1, .*not finite \(10 such rows\)"):
        add(loader, tmp_path, lambda batches: [expected(batch) * float("nan") for batch in batches])
    assert [path.suffix for path in (tmp_path / "reference").glob("*")] == []
    add(loader, tmp_path, Policy())
    [file] = (tmp_path / "reference").glob("*/ref_logps.npy")
    for content in (b"no array", None):
        np.save(file, np.zeros(3, dtype=np.float32)) if content is None else file.write_bytes(content)
        with pytest.raises(InputError, match=r"ref_logps\.npy: this entry of the cache .* remove its folder"):
            add(build(PAIRS), tmp_path, Policy())


def test_a_policy_is_known_by_its_content(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    key = model_key(tmp_path, "fp32")
    (tmp_path / "model.safetensors").touch()
    assert model_key(tmp_path, "fp32") == key != model_key(tmp_path, "bf16")
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    assert model_key(tmp_path, "fp32") != key
