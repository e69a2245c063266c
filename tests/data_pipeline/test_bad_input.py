"""What a person can get wrong with data: one clear message each, naming the file, row or key."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mcore_swift.data.loader import LoaderShape, build_loaders
from mcore_swift.data.tokenizer import load_tokenizer
from mcore_swift.data.validate import validate
from mcore_swift.errors import InputError
from mcore_swift.recipe import DataSection, SourceSection

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
STARTS_WRONG = {"messages": GOOD["messages"][::-1]}
NO_ANSWER = {"messages": GOOD["messages"][:1]}
LONG = {"messages": [GOOD["messages"][0], {"role": "assistant", "content": "word " * 400}]}


@pytest.fixture
def message(
    section: Callable[..., DataSection], make_shape: Callable[..., LoaderShape], tokenizer: Any
) -> Callable[..., str]:
    """The InputError's message for training on a source with the given settings."""

    def make(*sources: Any, vocab_size: int = 600, **settings: Any) -> str:
        with pytest.raises(InputError) as caught:
            build_loaders(
                section(*sources, **settings), shape=make_shape(), tokenizer=tokenizer, seed=1, vocab_size=vocab_size
            )
        return str(caught.value)

    return make


def test_files(message: Callable[..., str], jsonl: Callable[..., Path], tmp_path: Path):
    assert message("nowhere.jsonl").endswith("nowhere.jsonl: no such data file or folder")
    assert "rows.txt: unknown extension '.txt' (known: .jsonl, .json, .parquet)" in message(
        jsonl(GOOD, name="rows.txt")
    )
    assert message(jsonl()).endswith("rows.jsonl: no rows")
    (tmp_path / "empty").mkdir()
    assert "empty: no data file in this folder" in message(tmp_path / "empty")
    assert "data.train: no source given" in message()
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 this is no parquet")
    assert "broken.parquet: could not be read" in message(broken)


def test_malformed_json_line_is_named(message: Callable[..., str], jsonl: Callable[..., Path]):
    text = message(jsonl(GOOD, "", '{"messages": [', GOOD, "[1]"))
    assert "rows.jsonl:3: not valid JSON" in text
    assert "rows.jsonl:5: a JSON object is needed, found list" in text


def test_bad_rows_are_named_the_first_five_and_their_number(message: Callable[..., str], jsonl: Callable[..., Path]):
    text = message(jsonl(GOOD, STARTS_WRONG, *[NO_ANSWER] * 5))
    assert "rows.jsonl:2: the conversation starts with the assistant\n" in text
    assert "rows.jsonl:6: no assistant turn: nothing to learn\n… 6 bad rows in all" in text
    assert "rows.jsonl:7" not in text


def test_content_that_is_no_string(message: Callable[..., str], jsonl: Callable[..., Path]):
    odd = {"messages": [{"role": "user", "content": 5}, GOOD["messages"][1]]}
    assert "rows.jsonl:2: message 1: content is a int, not a string" in message(jsonl(GOOD, odd))
    assert "rows.jsonl:3: message 1: content is a int, not a string" in message(jsonl(GOOD, "", odd))


@pytest.mark.parametrize(("too_long", "counted"), [("truncate", "truncated"), ("drop", "dropped"), ("error", None)])
def test_row_longer_than_the_sequence(
    message: Callable[..., str],
    jsonl: Callable[..., Path],
    section: Callable[..., DataSection],
    make_shape: Callable[..., LoaderShape],
    tokenizer: Any,
    too_long: str,
    counted: str | None,
):
    file = jsonl(GOOD, LONG)
    if counted is None:
        assert "rows.jsonl:2: row of " in message(file, too_long=too_long)
        return
    data = section(file, too_long=too_long)
    train, _ = build_loaders(data, shape=make_shape(), tokenizer=tokenizer, seed=1, vocab_size=600)
    report = train.report()
    assert report[counted] == 1 and report["truncated"] + report["dropped"] == 1


def test_formats_that_do_not_fit(message: Callable[..., str], jsonl: Callable[..., Path]):
    odd = message(jsonl({"question": "a", "answer": "b"}))
    assert "rows.jsonl: no columns for data.format 'auto': found question, answer; needed messages or" in odd
    assert "no columns for data.format 'text': found messages; needed text" in message(jsonl(GOOD), format="text")


def test_settings(message: Callable[..., str]):
    for value in (-0.1, 1.0, 2.0):
        assert f"data.validation_split: {value} is not in 0 ≤ x < 1" in message("chat.jsonl", validation_split=value)
    assert "leaves none to train" in message("chat.jsonl", validation_split=0.99)
    assert "streaming doesn't know" in message("chat.jsonl", validation_split=0.5, streaming=True)
    assert "exclude each other" in message(
        "chat.jsonl", validation_split=0.5, validation=[SourceSection(path="chat.jsonl")]
    )
    assert "data.sequence_length: 1 is too short" in message("chat.jsonl", sequence_length=1)
    assert "data.train: with data.format synthetic" in message("chat.jsonl", format="synthetic")
    assert "data.cache_dir: /proc/none" in message("chat.jsonl", cache_dir="/proc/none")


def test_weights_need_indexed_data(
    section: Callable[..., DataSection], make_shape: Callable[..., LoaderShape], tokenizer: Any, fixtures: Path
):
    data = section()
    data = replace(data, train=[SourceSection(path=str(fixtures / "chat.jsonl"), weight=2.0)])
    with pytest.raises(InputError, match=r"weight needs indexed data .* not .*chat\.jsonl"):
        build_loaders(data, shape=make_shape(), tokenizer=tokenizer, seed=1, vocab_size=600)


def test_every_row_dropped(message: Callable[..., str], jsonl: Callable[..., Path]):
    assert "data.train: none of its 2 rows can be used" in message(jsonl(LONG, LONG), too_long="drop")


def test_tokenizer_larger_than_the_embedding(message: Callable[..., str]):
    assert "its largest token id is 599, but the model's embedding has 599 rows" in message(
        "chat.jsonl", vocab_size=599
    )


def test_nothing_half_written_stays_in_the_cache(
    message: Callable[..., str], jsonl: Callable[..., Path], tmp_path: Path
):
    message(jsonl(GOOD, STARTS_WRONG))
    assert [path.suffix for path in (tmp_path / "cache" / "tokenized").iterdir()] == [".lock"]


def test_tokenizer_folders(tmp_path: Path, tokenizer_folder: Path):
    def refusal(folder: Path, **settings: Any) -> str:
        with pytest.raises(InputError) as caught:
            load_tokenizer(folder, **settings)
        return str(caught.value)

    assert "no such folder" in refusal(tmp_path / "none")
    assert "no tokenizer in this folder" in refusal(tmp_path)
    for file in tokenizer_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert "data.chat_template" in refusal(tmp_path, chat_template=tmp_path / "none.jinja")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"auto_map": {"AutoTokenizer": ["t.T", None]}}))
    assert "auto_map names code in the folder" in refusal(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json: not valid JSON" in refusal(tmp_path)


def test_chat_template_from_a_file(tmp_path: Path, tokenizer_folder: Path):
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    assert load_tokenizer(tokenizer_folder, chat_template=template).chat_template == template.read_text()


# --- validate ---------------------------------------------------------------------------------------------------------


def test_validate_reports_every_bad_row(jsonl: Callable[..., Path], tokenizer: Any):
    file = jsonl(
        GOOD, "{", STARTS_WRONG, "", NO_ANSWER, {"messages": []}, {"other": 1}, LONG,
        {"messages": [{"role": "bot", "content": "x"}]}, "3",
    )  # fmt: skip
    expected = [
        (2, "not valid JSON"),
        (3, "the conversation starts with the assistant"),
        (5, "no assistant turn"),
        (6, "messages is empty"),
        (7, "messages is empty"),
        (9, "unknown role 'bot'"),
        (10, "a JSON object is needed, found int"),
    ]
    for settings in ({}, {"tokenizer": tokenizer}):
        problems = validate([file], **settings)
        assert [problem.row for problem in problems] == [row for row, _ in expected]
        assert all(reason in problem.reason for problem, (_, reason) in zip(problems, expected, strict=True))
    assert str(problems[0]).startswith(f"{file}:2: not valid JSON")
    long = [p for p in validate([file], tokenizer=tokenizer, sequence_length=256) if p.row == 8]
    assert len(long) == 1 and "more than the sequence length 256" in long[0].reason


def test_validate_asks_the_template(jsonl: Callable[..., Path], tokenizer: Any):
    tokenizer.chat_template = "{{ raise_exception('no system role') if messages[0]['role'] == 'system' }}A:"
    rows = jsonl({"messages": [{"role": "system", "content": "s"}, *GOOD["messages"]]}, GOOD)
    problems = validate([rows], tokenizer=tokenizer)
    assert "the chat template refuses the conversation: no system role" in problems[0].reason


def test_validate_good_files_and_other_kinds(
    fixtures: Path, tokenizer: Any, jsonl: Callable[..., Path], tmp_path: Path
):
    files = [fixtures / name for name in ("chat.jsonl", "pairs.jsonl", "text.jsonl")]
    assert validate(files, tokenizer=tokenizer) == validate(files) == []
    (tmp_path / "rows.json").write_text(json.dumps([GOOD, NO_ANSWER, 3]))
    assert [problem.row for problem in validate([tmp_path / "rows.json"])] == [2, 3]
    (tmp_path / "rows.json").write_text("[{")
    assert str(validate([tmp_path / "rows.json"])[0]).startswith(f"{tmp_path / 'rows.json'}: not valid JSON")
    assert [str(p) for p in validate([jsonl({"a": 1})])] == [
        f"{tmp_path / 'rows.jsonl'}: no columns for data.format 'auto': found a; needed messages or conversations or "
        "prompt + response or prompt + completion or instruction + output or text"
    ]
    assert validate([jsonl({"text": "x"}, {"text": ""}, {"text": 3})])[1].reason == "text is no string"
