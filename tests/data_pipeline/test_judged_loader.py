"""Loaders of pairs and labelled answers: what a micro-batch says of them, at every layout, resumed, streamed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_swift.data import streaming
from mcore_swift.data.batch import MicroBatch, Sequences
from mcore_swift.data.loader import LoaderShape, Wanted, build_loaders
from mcore_swift.data.probes import apart
from mcore_swift.data.validate import validate
from mcore_swift.errors import InputError
from mcore_swift.recipe import DataSection, SourceSection

PAIRS, PROBED = Wanted("dpo", "pairs"), Wanted("kto", "answers", probes=True)
FILES = {PAIRS: "gsm8k_preference.jsonl", PROBED: "gsm8k_labelled.jsonl"}
Build = Callable[..., Any]


@pytest.fixture
def build(tokenizer: Any, section: Callable[..., DataSection], make_shape: Callable[..., LoaderShape]) -> Build:
    def make(wanted: Wanted, *files: str | Path, shape: dict[str, int] | None = None, **settings: Any) -> Any:
        data = section(*(files or [FILES[wanted]]), **({"sequence_length": 1024} | settings))
        sizes = make_shape(**({"sequence_length": data.sequence_length} | (shape or {})))
        return build_loaders(data, shape=sizes, tokenizer=tokenizer, seed=1, vocab_size=600, wanted=wanted)

    return make


def sequences(batch: MicroBatch) -> Sequences:
    assert batch.sequences is not None
    return batch.sequences


def answers(batches: list[MicroBatch]) -> list[tuple[Any, ...]]:
    """Each answer by itself, in order: its row, what is said of it, its whole document and its labels."""
    found = []
    for batch in batches:
        said = sequences(batch)
        assert (said.index >= 0).equal(batch.loss_mask.bool())
        for number in range(said.n):
            row, position = (values.tolist() for values in (said.index == number).nonzero(as_tuple=True))
            assert len(set(row)) == 1 and position == list(range(position[0], position[-1] + 1))
            start = position[0] - int(batch.position_ids[row[0], position[0]])
            flags = [None if v is None else bool(v[number]) for v in (said.desirable, said.probe)]
            tokens = batch.tokens[row[0], start : position[-1] + 2].tolist()
            found.append((int(said.row[number]), *flags, tokens, batch.labels[row[0], position].tolist()))
    return found


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("wanted", [PAIRS, PROBED], ids=["pairs", "probes"])
def test_a_step_holds_the_same_answers_at_every_layout(build: Build, wanted: Wanted, packing: bool):
    def step(number: int, dp_size: int, micro_batch_size: int, streamed: bool = False) -> Any:
        found = []
        for rank in range(dp_size):
            shape = {"dp_size": dp_size, "dp_rank": rank, "micro_batch_size": micro_batch_size}
            loader = build(wanted, shape=shape, packing=packing, streaming=streamed)[0]
            batches = [loader.micro_batches(n) for n in range(number + 1)][-1]
            for batch in batches:
                assert batch.tokens.shape[0] == (1 if packing else 2 * micro_batch_size)
                rows = sequences(batch).row.tolist()
                assert rows[::2] == rows[1::2]  # a pair, or an answer and its probe, in one micro-batch
            found += answers(batches)
        return sorted(found)

    for number in (0, 1, 5):
        assert step(number, 1, 1) == step(number, 2, 1) == step(number, 1, 4)
    assert step(1, 1, 1, True) == step(1, 2, 2, True)


@pytest.mark.parametrize("packing", [True, False])
def test_probes_apart_are_the_same_documents(build: Build, packing: bool):
    shape = {"dp_size": 2, "dp_rank": 1, "micro_batch_size": 2, "global_batch_size": 16}
    held_out = [SourceSection(path=str(Path(__file__).parent / "fixtures" / FILES[PROBED]))]
    train, validation = build(PROBED, shape=shape, packing=packing, validation=held_out)
    assert sequences(list(validation.batches())[-1][-1]).n == 0  # padding only
    for step in (train.micro_batches(0), *validation.batches()):
        whole = answers(step)
        for found, probes in zip(apart(step, multiple=16), (False, True), strict=True):
            assert answers(found) == [each for each in whole if each[2] is probes]
            assert len({batch.tokens.shape[:1] if not packing else batch.tokens.shape for batch in found}) == 1
            for batch in found:
                assert batch.real is not None and not batch.real[batch.tokens == 0].any()
                if packing:
                    assert batch.cu_seqlens is not None and batch.cu_seqlens[-1] == batch.tokens.size(1)
                    assert batch.tokens.size(1) % 16 == 0 and batch.max_seqlen == batch.cu_seqlens.diff().max()
                else:
                    assert batch.tokens.size(0) == 2


def test_pairs_are_what_the_file_says(build: Build, tokenizer: Any, fixtures: Path):
    rows = [json.loads(line) for line in (fixtures / FILES[PAIRS]).open()]
    train, _ = build(PAIRS, shape={"global_batch_size": 10}, packing=False, shuffle=False)
    found = answers(train.micro_batches(0))
    assert [row for row, *_ in found] == [n // 2 for n in range(20)]
    for number, (row, _, _, tokens, labels) in enumerate(found):
        messages = rows[row]["rejected_messages" if number % 2 else "messages"]
        assert tokenizer.decode(tokens) + "\n" == tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer.decode(labels) == messages[-1]["content"] + "<|im_end|>"
    assert train.samples.row_name(3).endswith("gsm8k_preference.jsonl:4")
    batch = train.micro_batches(0)[0]
    said = sequences(batch)
    assert said.desirable is said.probe is said.margin is said.weight is said.ref_logps is None


def test_labelled_answers_and_their_probes(build: Build, tokenizer: Any, fixtures: Path):
    rows = [json.loads(line) for line in (fixtures / FILES[PROBED]).open()]
    train, _ = build(PROBED, shape={"global_batch_size": 12}, packing=False, shuffle=False)
    found = answers(train.micro_batches(0))
    contents = [row["messages"][-1]["content"] + "<|im_end|>" for row in rows]
    for number, (row, desirable, probe, tokens, labels) in enumerate(found):
        assert (row, desirable, probe) == (number // 2, rows[number // 2]["label"], number % 2 == 1)
        question, text = rows[row]["messages"][0]["content"], tokenizer.decode(labels)
        assert question in tokenizer.decode(tokens)
        if not probe:
            assert text == contents[row]
        else:
            partners = [rows[n]["messages"][0]["content"] for n, content in enumerate(contents) if content == text]
            assert partners and question not in partners
    alone, _ = build(replace(PROBED, probes=False), FILES[PROBED], shape={"global_batch_size": 12}, packing=False)
    batch = alone.micro_batches(0)[0]
    assert batch.tokens.shape[0] == sequences(batch).n == 1 and sequences(batch).probe is None


def test_margins_and_weights(build: Build, jsonl: Callable[..., Path]):
    row = {"prompt": "Two and two?", "chosen": "Four.", "rejected": "Five."}
    file = jsonl(row | {"margin": 1.5, "weight": 2}, row | {"prompt": "Again?", "margin": None, "weight": None})
    train, _ = build(PAIRS, file, shape={"global_batch_size": 1}, shuffle=False)
    said = sequences(train.micro_batches(0)[0])  # both pairs are in one pack, the longer one first
    margins = dict(zip(said.row[::2].tolist(), said.margin.tolist() if said.margin is not None else [], strict=True))
    weights = dict(zip(said.row.tolist(), said.weight.tolist() if said.weight is not None else [], strict=True))
    assert margins == {0: 1.5, 1: 0.0} and weights == {0: 2.0, 1: 1.0}
    assert said.n == 4 and said.margin is not None and said.margin.dtype == torch.float32


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("wanted", [PAIRS, PROBED], ids=["pairs", "probes"])
def test_a_resumed_run_sees_the_same_answers(
    build: Build, wanted: Wanted, streamed: bool, monkeypatch: pytest.MonkeyPatch
):
    real = streaming.StreamReader
    monkeypatch.setattr(streaming, "StreamReader", lambda *a, **k: real(*a, block_rows=5, **k))
    whole, _ = build(wanted, streaming=streamed, packing=False)
    states, steps = [], []
    for step in range(7):
        states.append(json.loads(json.dumps(whole.state_dict())))
        steps.append(answers(whole.micro_batches(step)))
    for start in (1, 4):
        resumed, _ = build(wanted, streaming=streamed, packing=False)
        resumed.load_state_dict(states[start])
        assert [answers(resumed.micro_batches(step)) for step in range(start, 7)] == steps[start:]
    for changed in ({"truncate": "prompt_start"}, {"equal_pairs": "drop"}):
        other, _ = build(wanted, streaming=streamed, packing=False, **changed)
        with pytest.raises(InputError, match="the training data, their tokenizer or the settings"):
            other.load_state_dict(states[1])


@pytest.mark.parametrize("packing", [True, False])
def test_filling_samples_hold_no_answers(build: Build, packing: bool):
    for wanted in (PAIRS, PROBED):
        _, validation = build(
            wanted,
            shape={"global_batch_size": 16, "micro_batch_size": 2},
            validation=[SourceSection(path=str(Path(__file__).parent / "fixtures" / FILES[wanted]))],
            packing=packing,
        )
        batches = [batch for batches in validation.batches() for batch in batches]
        assert len({batch.tokens.shape[0] for batch in batches}) == 1
        rows = [row for batch in batches for row in sequences(batch).row.tolist()]
        assert sorted(rows[::2]) == list(range(len(rows) // 2)) and len(rows) == (20 if wanted is PAIRS else 24)
        empty = sequences(batches[-1])
        assert empty.n == 0 and (empty.index == -1).all() and not batches[-1].loss_mask.any()
        assert (empty.desirable is None) == (empty.probe is None) == (wanted is PAIRS)


def test_a_split_holds_out_prompts(build: Build):
    train, validation = build(replace(PROBED, probes=False), FILES[PROBED], validation_split=0.34, packing=False)
    assert (len(train.samples), len(validation.samples)) == (8, 4)
    rows = {a[0] for batches in validation.batches() for a in answers(batches)}
    assert rows in ({0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9, 10, 11})  # one question's four answers


def test_counts(build: Build, jsonl: Callable[..., Path]):
    row = {"prompt": "Two and two?", "chosen": "Four.", "rejected": "Five."}
    file = jsonl(row, row | {"rejected": "Four."}, row | {"chosen": "Four. " * 40})
    report = build(PAIRS, file, equal_pairs="drop", packing=False, sequence_length=64)[0].report()
    assert (report["rows"], report["equal"], report["truncated"], report["answers_cut"]) == (3, 1, 1, 1)
    assert report["documents"] == 4
    streamed, _ = build(PAIRS, file, equal_pairs="drop", packing=False, sequence_length=64, streaming=True)
    streamed.micro_batches(0)
    assert streamed.report()["equal"] >= 1


def test_the_cache_is_reused_and_shared_by_both_answers(build: Build):
    first, second = build(PAIRS)[0], build(PAIRS, sequence_length=900)[0]
    assert not first.report()["cache_reused"] and second.report()["cache_reused"]
    assert answers(build(PAIRS)[0].micro_batches(0)) == answers(first.micro_batches(0))


def refusal(build: Build, *args: Any, **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        loader = build(*args, **settings)[0]
        loader.micro_batches(0)
    return str(caught.value)


@pytest.mark.parametrize("streamed", [False, True])
def test_objectives_and_data_that_do_not_fit(build: Build, streamed: bool):
    sft = Wanted()
    for file, format in (("gsm8k_preference.jsonl", "preference"), ("gsm8k_labelled.jsonl", "labelled")):
        text = refusal(build, sft, file, streaming=streamed)
        assert f"are those of data.format '{format}'; objective.name: sft learns from conversations and texts" in text
        assert f"data.format: {format}, but objective.name: sft learns" in refusal(build, sft, file, format=format)
    text = refusal(build, PAIRS, "gsm8k_labelled.jsonl", streaming=streamed)
    assert "no columns for data.format 'preference': found messages, label; needed" in text
    assert text.endswith("objective.name: dpo learns from pairs of a chosen and a rejected answer")
    text = refusal(build, PROBED, "chat.jsonl", streaming=streamed)
    assert text.endswith("objective.name: kto learns from answers labelled true or false")
    assert "data.format: messages, but objective.name: dpo" in refusal(build, PAIRS, "chat.jsonl", format="messages")


def test_sft_takes_pairs_when_asked(build: Build, tokenizer: Any):
    for format in ("chosen", "messages"):
        train, _ = build(Wanted(), "gsm8k_preference.jsonl", format=format, packing=False, shuffle=False)
        batch = train.micro_batches(0)[0]
        assert batch.sequences is None
        pair = build(PAIRS, packing=False, shuffle=False)[0].micro_batches(0)[0]
        labels = [labels[mask == 1].tolist() for labels, mask in zip(pair.labels, pair.loss_mask, strict=True)]
        assert batch.labels[0][batch.loss_mask[0] == 1].tolist() == labels[0]


def test_settings_and_sizes_that_are_refused(build: Build, jsonl: Callable[..., Path]):
    assert "schedule.global_batch_size: 1 with objective.name: kto" in refusal(
        build, PROBED, shape={"global_batch_size": 1}
    )
    assert "at least 2 are needed" in refusal(build, PROBED, shape={"global_batch_size": 1}, streaming=True)
    for setting in ({"truncate": "prompt_start"}, {"equal_pairs": "drop"}):
        key = next(iter(setting))
        assert f"data.{key}: only for pairs and labelled answers, but" in refusal(
            build, Wanted(), "chat.jsonl", **setting
        )
    row = {"prompt": "Two and two?", "chosen": "Four.", "rejected": "Four."}
    assert "rows.jsonl:1: chosen and rejected are the same answer" in refusal(build, PAIRS, jsonl(row))
    assert "none of its 1 rows can be used" in refusal(build, PAIRS, jsonl(row), equal_pairs="drop")
    alone = jsonl({"prompt": "Two and two?", "completion": "Four.", "label": True})
    assert "without_partner=1" in refusal(build, PROBED, alone)
    mixed = jsonl(
        '{"prompt": "a", "completion": "b", "label": true}', '{"prompt": "a", "completion": "b", "label": "x"}'
    )
    assert "rows.jsonl:2: label is 'x'; it must be true" in refusal(build, PROBED, mixed)
    assert [problem.row for problem in validate([mixed])] == [2]
