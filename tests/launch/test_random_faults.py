"""Fifty faults at random moments (random_faults.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.random_faults import inject


@pytest.mark.nightly
def test_faults_at_random_moments(tmp_path: Path) -> None:
    assert inject(tmp_path, faults=50, seed=1).total() >= 50
