"""A small real tokenizer, trained on the fixtures, and short ways to recipes and files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mcore_swift.data.loader import LoaderShape
from mcore_swift.recipe import DataSection, SourceSection

FIXTURES = Path(__file__).parent / "fixtures"
VOCABULARY = 600
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with ChatML tokens; nothing is downloaded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train([str(FIXTURES / "text.jsonl")], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|endoftext|>", additional_special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    tokenizer.chat_template = CHATML
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Any:
    from mcore_swift.data.tokenizer import load_tokenizer

    return load_tokenizer(tokenizer_folder)


@pytest.fixture
def fixtures() -> Path:
    return FIXTURES


@pytest.fixture
def section(tmp_path: Path) -> Callable[..., DataSection]:
    """DataSection of the named files (fixture names or paths), with a cache of the test's own."""

    def make(*train: str | Path, **settings: Any) -> DataSection:
        sources = [SourceSection(path=str(FIXTURES / path)) for path in train]
        return DataSection(train=sources, **({"cache_dir": str(tmp_path / "cache"), "sequence_length": 256} | settings))

    return make


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows (or raw lines) to a JSONL file."""

    def write(*rows: Any, name: str = "rows.jsonl") -> Path:
        file = tmp_path / name
        file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return file

    return write


@pytest.fixture
def make_shape() -> Callable[..., LoaderShape]:
    def make(**settings: int) -> LoaderShape:
        defaults = {
            "global_batch_size": 4,
            "micro_batch_size": 1,
            "sequence_length": 256,
            "dp_rank": 0,
            "dp_size": 1,
            "pad_multiple": 1,
        }
        return LoaderShape(**(defaults | settings))

    return make
