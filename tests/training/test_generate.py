"""Generation through Megatron-Core's key-value cache gives the tokens that transformers gives, at any layout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mcore_swift import parallel
from mcore_swift.recipe import AdapterSection, DataSection, ModelSection, ParallelSection, Recipe
from mcore_swift.training.generate import Sampling
from tests.distributed.harness import prepared, run_ranks
from tests.distributed.tiny_models import tiny_folder

PROMPT = [3, 17, 42, 9, 88, 61, 5]
GREEDY = Sampling(max_new_tokens=24, temperature=0.0, top_p=1.0, seed=1)


def rank_tokens(
    folder: Path, layout: ParallelSection, sampling: Sampling, stop: set[int], adapter: AdapterSection | None = None
) -> list[int]:
    from mcore_swift.models.build import read_source
    from mcore_swift.training.generate import load_model, tokens

    platform = prepared()
    plan = parallel.resolve(layout, world_size=int(os.environ["WORLD_SIZE"]))
    parallel.initialize(plan, platform, seed=1)
    model, adapter = ModelSection(path=str(folder)), adapter or AdapterSection()
    recipe = Recipe(model=model, data=DataSection(train=[]), parallel=layout, adapter=adapter)
    chunk = load_model(recipe, read_source(folder), plan, platform)
    return list(tokens(chunk, PROMPT, sampling, stop=stop))


def run(
    folder: Path, layout: ParallelSection | None = None, *, sampling: Sampling = GREEDY, stop: set[int] | None = None
) -> list[int]:
    layout = layout or ParallelSection()
    found = run_ranks(rank_tokens, layout.tp * layout.pp, folder, layout, sampling, stop or set())
    assert all(tokens == found[0] for tokens in found)
    return found[0]


def transformers_tokens(folder: Path) -> list[int]:
    from transformers import AutoModelForCausalLM

    prepared()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.tensor([PROMPT])
    for _ in range(GREEDY.max_new_tokens):  # no cache; eager, as sdpa leaves out Gemma 2's cap
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(PROMPT) :].tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("generate") / "qwen3", "qwen3")


@pytest.mark.slow
def test_greedy_tokens_are_transformers_own(folder: Path) -> None:
    expected = transformers_tokens(folder)
    assert len(set(expected)) > 3  # not the same token again and again, or the cache would not matter
    for layout in (None, ParallelSection(tp=2, sequence_parallel=False), ParallelSection(pp=2)):
        assert run(folder, layout) == expected


def test_sliding_window_with_cached_keys(tmp_path: Path) -> None:
    sliding = tiny_folder(tmp_path / "mistral", "mistral-window")
    assert run(sliding) == transformers_tokens(sliding)


def test_stops_at_a_stop_token(folder: Path) -> None:
    expected = run(folder)
    stop = expected[4]
    assert run(folder, stop={stop}) == expected[: expected.index(stop)]


@pytest.mark.slow
def test_sampling_follows_its_seed(folder: Path) -> None:
    sampling = Sampling(max_new_tokens=12, temperature=5.0, top_p=0.9, seed=7)
    first = run(folder, sampling=sampling)
    assert run(folder, sampling=sampling) == first
    assert run(folder, ParallelSection(pp=2), sampling=sampling) == first
    assert run(folder, sampling=Sampling(max_new_tokens=12, temperature=5.0, top_p=0.9, seed=8)) != first
    # So little of the probability that only the likeliest token is left.
    assert run(folder, sampling=Sampling(max_new_tokens=24, temperature=5.0, top_p=1e-6, seed=7)) == run(folder)
