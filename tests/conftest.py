"""Fixtures that several folders of tests use."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Whatever imports Megatron first: its small fusions are not compiled, which would start a C++ compiler in forked ranks.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    return Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The Hugging Face folder of a tiny model, by the name of its variant; made at its first use."""
    from tests.distributed.harness import prepared
    from tests.distributed.tiny_models import tiny_folder

    prepared()  # before transformers' first use, as in a run
    folder = tmp_path_factory.mktemp("models")
    return lambda variant: tiny_folder(folder / variant, variant)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The Hugging Face folder of SmolLM2-135M-Instruct; converted once a machine (17 s), so for slow tests."""
    from ckpt_tools.smollm2 import smollm2_folder

    return smollm2_folder()
