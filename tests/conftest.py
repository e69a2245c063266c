"""Fixtures that several folders of tests use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Whatever imports Megatron first: its small fusions are not compiled, which would start a C++ compiler in forked ranks.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    return Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The Hugging Face folder of SmolLM2-135M-Instruct; converted once a machine (17 s), so for slow tests."""
    from ckpt_tools.smollm2 import smollm2_folder

    return smollm2_folder()
