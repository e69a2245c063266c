"""Units of answers: probes, cutting, packing."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mcore_swift.data.judged_samples import JudgedSet, make_judged_samples, split_prompts
from mcore_swift.data.tokenized import SourceFile, TokenizedRows
from mcore_swift.errors import InputError

NAN = float("nan")


def make_rows(units: list[tuple[int, ...]], *, prompts: list[int] | None = None, equal: bool = False) -> TokenizedRows:
    """Rows from lengths: (prompt, chosen, rejected) or (prompt, answer). `prompts`: rows with one number share theirs.

    All tokens are different, but for equal prompts (and for equal answers, with `equal`); one that doesn't count ends
    each text, like ChatML's newline.
    """
    token = itertools.count(1000)
    known: dict[int, list[int]] = {}
    tokens, loss, offsets, judged = [], [], [0], []
    for row, (prompt, *answers) in enumerate(units):
        number = row if prompts is None else prompts[row]
        begin = known.setdefault(number, [next(token) for _ in range(prompt)])
        texts = [[next(token) for _ in range(answer)] for answer in answers]
        if equal:
            texts = [texts[0]] * len(texts)
        for text in texts:
            tokens += [*begin, *text, 7]
            loss += [0] * prompt + [1] * len(text) + [0]
        offsets.append(len(tokens))
        judged.append([prompt + answers[0] + 1, NAN, NAN, NAN if len(answers) == 2 else 1.0])
    return TokenizedRows(
        tokens=np.array(tokens, dtype=np.int32),
        loss=np.array(loss, dtype=np.uint8),
        offsets=np.array(offsets),
        files=[SourceFile(Path("rows.parquet"), len(units), "preference")],
        key="k",
        judged=np.array(judged),
    )


def make(rows: TokenizedRows, length: int, **settings: Any) -> JudgedSet:
    defaults: dict[str, Any] = {
        "too_long": "truncate",
        "truncate": "answer_end",
        "packing": False,
        "equal_pairs": "error",
    }
    defaults["probes"] = False
    return make_judged_samples(rows, sequence_length=length, **(defaults | settings))


def lengths(samples: JudgedSet) -> list[list[tuple[int, int]]]:
    """(prompt's, answer's tokens) of each document of each sample."""
    return [
        [(int((answer.loss == 0).sum()), int(answer.loss.sum())) for answer in samples.documents(i)]
        for i in range(len(samples))
    ]


@pytest.mark.parametrize(
    ("unit", "truncate", "packing", "expected"),
    [
        ((4, 3, 5), "answer_end", False, [(4, 3), (4, 5)]),  # fits
        ((4, 3, 9), "answer_end", False, [(4, 3), (4, 6)]),
        ((4, 9, 9), "prompt_start", False, [(1, 9), (1, 9)]),
        ((4, 3, 12), "prompt_start", False, [(1, 3), (1, 9)]),  # a token of the prompt stays, the end goes
        ((4, 3, 7), "prompt_start", False, [(3, 3), (3, 7)]),  # both prompts lose the same
        ((3, 1, 5), "answer_end", True, [(3, 1), (3, 3)]),  # they share the 10: the longer one gives way first
        ((2, 4, 7), "answer_end", True, [(2, 3), (2, 3)]),
        ((3, 1, 5), "prompt_start", True, [(2, 1), (2, 5)]),
        ((5, 1, 1), "answer_end", True, None),  # nothing is left of the answers
        ((12, 1, 1), "answer_end", False, None),
        ((12, 1, 1), "prompt_start", False, [(9, 1), (9, 1)]),
    ],
)
def test_what_is_cut(unit: tuple[int, ...], truncate: str, packing: bool, expected: list[tuple[int, int]] | None):
    rows = make_rows([(1, 1, 1), unit])
    samples = make(rows, 10, truncate=truncate, packing=packing)
    found = [pair for sample in lengths(samples) for pair in itertools.batched(sample, 2)]
    assert found[-1 if not packing else 0] == tuple(expected or [(1, 1), (1, 1)])
    counts = samples.counts
    assert (counts.rows, counts.without_loss) == (2, 0 if expected else 1)
    whole = [(unit[0], answer) for answer in unit[1:]]
    assert counts.truncated == (whole != expected)
    if expected:
        assert counts.prompts_cut == (expected[0][0] < unit[0])
        assert counts.answers_cut == ([n for _, n in expected] != [*unit[1:]])


def test_cut_prompts_lose_their_start_and_cut_answers_their_end():
    rows = make_rows([(4, 5, 8)])
    whole = [answer.tokens.tolist() for answer in make(rows, 20).documents(0)]
    assert [len(tokens) for tokens in whole] == [9, 12] and 7 not in whole[0]  # what follows the answer is left out
    start = [answer.tokens.tolist() for answer in make(rows, 10, truncate="prompt_start").documents(0)]
    assert start == [whole[0][2:], whole[1][2:]]
    end = [answer.tokens.tolist() for answer in make(rows, 10).documents(0)]
    assert end == [whole[0], whole[1][:10]]


def test_pairs_that_are_equal_once_cut_are_left_out():
    rows = make_rows([(2, 5, 9), (1, 1, 1)])
    rows.tokens[rows.offsets[0] + 8 + 2 : rows.offsets[0] + 8 + 7] = rows.tokens[2:7]  # the first five are the same
    assert make(rows, 9).counts.without_loss == 0
    samples = make(rows, 7)
    assert (samples.counts.truncated, samples.counts.without_loss, len(samples)) == (1, 1, 1)


def test_too_long_pairs_are_dropped_or_an_error_with_their_number():
    rows = make_rows([(2, 2, 2), (2, 2, 5), (3, 5, 5)])
    for packing, dropped in ((False, 1), (True, 2)):
        samples = make(rows, 7 if not packing else 10, too_long="drop", packing=packing)
        assert samples.counts.dropped == dropped and samples.counts.truncated == 0
    with pytest.raises(InputError, match=r"rows\.parquet:3: pair of 8 tokens, more than data\.sequence_length 7\n"):
        make(rows, 7, too_long="error")
    with pytest.raises(
        InputError, match=r"parquet:2: pair of 11 tokens.* shares a sequence\)\nrows\.parquet:3: pair of 16"
    ):
        make(rows, 10, too_long="error", packing=True)


def test_equal_pairs_are_an_error_or_dropped_and_counted():
    rows = make_rows([(2, 3, 3), (2, 2, 2)], equal=True)
    with pytest.raises(InputError, match=r"rows\.parquet:1: chosen and rejected are the same answer"):
        make(rows, 10)
    rows = make_rows([(2, 3, 3), (2, 2, 2), (1, 4, 4)])
    rows.tokens[8:11] = rows.tokens[2:5]  # row 1: prompt 2, answer 3, newline, and the same once more
    samples = make(rows, 10, equal_pairs="drop")
    assert samples.counts.equal == 1 and [a.row for i in range(2) for a in samples.documents(i)] == [1, 1, 2, 2]


def test_each_row_has_a_probe_from_a_row_with_another_prompt():
    prompts = [0, 0, 0, 1, 1, 2, 0, 3]
    rows = make_rows([(3, 2 + i) for i in range(8)], prompts=prompts)
    samples = make(rows, 99, probes=True)
    owners = {tuple(samples.documents(i)[0].tokens[3:].tolist()): i for i in range(8)}  # by their answers
    assert len(owners) == 8
    for i in range(8):
        own, probe = samples.documents(i)
        assert (own.row, probe.row, own.probe, probe.probe) == (i, i, False, True)
        assert probe.tokens[:3].tolist() == own.tokens[:3].tolist() and probe.loss.tolist()[:3] == [0, 0, 0]
        assert prompts[owners[tuple(probe.tokens[3:].tolist())]] != prompts[i]
    again = make(rows, 99, probes=True, packing=True)
    assert (again.pieces.answer_starts == samples.pieces.answer_starts).all()


def test_probes_need_a_second_prompt():
    samples = make(make_rows([(3, 2), (3, 4)], prompts=[0, 0]), 99, probes=True)
    assert len(samples) == 0 and samples.counts.without_partner == 2


def test_probes_of_a_part_are_of_that_part():
    rows = make_rows([(3, 2 + i) for i in range(6)])
    samples = make(rows, 99, probes=True, subset=np.array([1, 4, 5]))
    assert [samples.documents(i)[0].row for i in range(3)] == [1, 4, 5]
    assert {len(samples.documents(i)[1].tokens) - 3 for i in range(3)} == {3, 6, 7}


def test_packs_hold_whole_pairs_and_waste_little():
    """The lengths of GSM8K's preference pairs in SmolLM2's tokens."""
    text = (Path(__file__).parent / "fixtures" / "gsm8k_preference_lengths.json").read_text()
    rows = make_rows([tuple(unit) for unit in json.loads(text)])
    samples = make(rows, 2048, packing=True)
    report = samples.counts.report(sequence_length=2048)
    assert report["packing_efficiency"] > 0.97 and (report["rows"], report["documents"]) == (876, 1752)
    assert report["truncated"] == report["without_loss"] == 0
    seen = []
    for i in range(len(samples)):
        documents = samples.documents(i)
        assert sum(len(answer.tokens) for answer in documents) <= 2048
        chosen, rejected = documents[::2], documents[1::2]
        assert [answer.row for answer in chosen] == [answer.row for answer in rejected]
        seen += [answer.row for answer in chosen]
    assert sorted(seen) == list(range(876))
    assert make(rows, 1024, packing=True).counts.report(sequence_length=1024)["packing_efficiency"] > 0.95


def test_a_prompt_is_trained_on_or_held_out_but_not_both():
    prompts = [0, 1, 1, 2, 3, 3, 3, 4, 5, 5]
    rows = make_rows([(3, 2) for _ in prompts], prompts=prompts)
    train, validation = split_prompts(rows, fraction=0.4, seed=1)
    assert sorted([*train, *validation]) == list(range(10))
    held = {prompts[i] for i in validation}
    assert len(held) == 2 and not held & {prompts[i] for i in train}
