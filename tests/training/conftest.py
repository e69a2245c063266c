"""Fixtures of the training tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.harness import prepared
from tests.distributed.tiny_models import tiny_folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with tied embeddings and an odd vocabulary; beside it a file to copy and code not to copy."""
    prepared()
    folder = tiny_folder(tmp_path_factory.mktemp("model") / "tied", "qwen2-tied")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    return folder
