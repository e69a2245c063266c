"""Layouts of fused tensors: `segments` (reading) and the split (writing) against a plain torch reference."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch

from mcore_swift.models.build import read_source
from mcore_swift.models.keys import weight_rules
from mcore_swift.weights.live import _split
from mcore_swift.weights.rules import TensorRule
from tests.distributed.tiny_models import VARIANTS, tiny_config


def rule(groups: int, rows: tuple[int, ...]) -> TensorRule:
    return TensorRule("fused", tuple(f"part{i}" for i in range(len(rows))), groups, rows, False)


def parts_and_whole(groups: int, blocks: tuple[int, ...]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Parts of `groups` blocks each, and what they are fused to: group by group, one block of each part."""
    parts = [torch.randn(groups * block, 3) for block in blocks]
    chunks = [part.split(block) for part, block in zip(parts, blocks, strict=True)]
    return parts, torch.cat([chunks[part][group] for group in range(groups) for part in range(len(parts))])


# (groups, rows of a group's block of each part): plain, gated, and QKV with one to seven queries a group.
LAYOUTS = [(1, (5,)), (1, (6, 6)), (1, (8, 2, 2)), (2, (4, 2, 2)), (3, (9, 3, 3)), (4, (7, 1, 1)), (5, (2, 4, 6))]


@pytest.mark.parametrize(("groups", "blocks"), LAYOUTS)
def test_segments_of_every_range_of_rows(groups: int, blocks: tuple[int, ...]) -> None:
    parts, whole = parts_and_whole(groups, blocks)
    fused = rule(groups, tuple(len(part) for part in parts))
    for start, stop in itertools.combinations(range(len(whole) + 1), 2):
        rows = torch.full((stop - start, 3), float("nan"))
        for part, first, last, target in fused.segments(start, stop, fused.rows):
            rows[target : target + last - first] = parts[part][first:last]
        assert torch.equal(rows, whole[start:stop]), (start, stop)


@pytest.mark.parametrize(("groups", "blocks"), LAYOUTS)
def test_split_is_the_inverse(groups: int, blocks: tuple[int, ...]) -> None:
    parts, whole = parts_and_whole(groups, blocks)
    found = dict(_split(whole, rule(groups, tuple(len(part) for part in parts)), vocab_size=0))
    assert list(found) == [f"part{i}" for i in range(len(parts))]
    assert all(torch.equal(found[f"part{i}"], part) for i, part in enumerate(parts))


def test_a_vocabulary_is_cut_to_its_true_size() -> None:
    vocabulary = TensorRule("embedding", ("embed_tokens",), 1, (), True)
    (found,) = _split(torch.arange(12).reshape(6, 2), vocabulary, vocab_size=5)
    assert found[0] == "embed_tokens"
    assert torch.equal(found[1], torch.arange(10).reshape(5, 2))


def test_segments_of_one_shard_are_contiguous_in_each_part() -> None:
    """What `load` relies on to read each part of a shard in one piece: TP cuts between groups."""
    generator = random.Random(1)
    for _ in range(50):
        tp, groups_each = generator.choice([1, 2, 3, 4]), generator.randint(1, 4)
        blocks = tuple(generator.randint(1, 5) for _ in range(3))
        fused = rule(tp * groups_each, tuple(tp * groups_each * block for block in blocks))
        share = sum(fused.rows) // tp
        for rank in range(tp):
            for part in range(3):
                pieces = [s for s in fused.segments(rank * share, (rank + 1) * share, fused.rows) if s[0] == part]
                ends = [pieces[0][1]] + [last for _, _, last, _ in pieces]
                assert [first for _, first, _, _ in pieces] == ends[:-1]
                assert ends[-1] - ends[0] == fused.rows[part] // tp


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_tensor_has_two_rules(tmp_path: Path, variant: str) -> None:
    tiny_config(variant).save_pretrained(tmp_path)
    rules = weight_rules(read_source(tmp_path)).values()
    names = [name for rule in rules for name in dict.fromkeys(rule.hf)]
    assert names and len(set(names)) == len(names)
