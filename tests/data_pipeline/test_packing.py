from __future__ import annotations

import time

import numpy as np
import pytest

from mcore_swift.data.packing import best_fit_decreasing


def plain_best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """The textbook algorithm, in quadratic time."""
    packs: list[list[int]] = []
    rooms: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [p for p, room in enumerate(rooms) if room >= lengths[item]]
        if fitting:
            pack = min(fitting, key=lambda p: rooms[p])
        else:
            pack = len(packs)
            packs.append([])
            rooms.append(capacity)
        packs[pack].append(item)
        rooms[pack] -= lengths[item]
    return packs


@pytest.mark.parametrize("seed", range(5))
def test_fills_packs_as_the_textbook_does(seed: int):
    lengths = np.random.default_rng(seed).integers(1, 101, size=300)
    offsets, items = best_fit_decreasing(lengths, 100)
    assert sorted(items.tolist()) == list(range(300))
    sums = np.add.reduceat(lengths[items], offsets[:-1])
    assert sums.max() <= 100
    expected = [sum(lengths[i] for i in pack) for pack in plain_best_fit_decreasing(lengths.tolist(), 100)]
    assert sorted(sums.tolist()) == sorted(expected)


def test_packing_is_nearly_full_and_fast_for_many_documents():
    lengths = np.random.default_rng(0).geometric(1 / 300, size=200_000).clip(2, 4096)
    start = time.perf_counter()
    offsets, _ = best_fit_decreasing(lengths, 4096)
    assert time.perf_counter() - start < 10
    assert lengths.sum() / ((len(offsets) - 1) * 4096) > 0.999


def test_one_document_and_none():
    assert [a.tolist() for a in best_fit_decreasing(np.array([7]), 7)] == [[0, 1], [0]]
    assert [a.tolist() for a in best_fit_decreasing(np.array([], dtype=np.int64), 7)] == [[0], []]
