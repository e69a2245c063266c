"""Builds `tokenizer.json` and `tokenizer_config.json` from a GGUF file's vocabulary, merges and chat template.

GGUF names the pre-tokenizer (`tokenizer.ggml.pre`) instead of spelling it out; the table below does. transformers' own
GGUF reader ignores that name, and so loses for example SmolLM's split into single digits.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_swift.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ckpt_tools.gguf import GGUFFile


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type` (llama.h, llama_token_type); only the kinds that a BPE vocabulary has."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5  # padding of the embedding, no token


# The regular expression of Qwen2's tokenizer.json.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _smollm() -> tuple[Any, Any]:
    from tokenizers import pre_tokenizers as pre

    return None, pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])


def _qwen2() -> tuple[Any, Any]:
    from tokenizers import Regex, normalizers
    from tokenizers import pre_tokenizers as pre

    split = pre.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    return normalizers.NFC(), pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


# tokenizer.ggml.pre -> (normalizer, pre-tokenizer)
PRE_TOKENIZERS: dict[str, Callable[[], tuple[Any, Any]]] = {"smollm": _smollm, "qwen2": _qwen2}


@dataclass(frozen=True)
class Vocabulary:
    """The file's tokens by id, with the padding at the end left out."""

    tokens: list[str]
    types: list[int]
    merges: list[tuple[str, str]]


def write_tokenizer(file: GGUFFile, folder: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json` (chat template included) into `folder`.

    Raises InputError for a tokenizer that can't be rebuilt exactly: not byte-level BPE, or an unknown pre-tokenizer.
    """
    vocabulary = _read_vocabulary(file)
    build_tokenizer(file, vocabulary).save(str(folder / "tokenizer.json"))
    config = json.dumps(tokenizer_config(file, vocabulary), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")


def build_tokenizer(file: GGUFFile, vocabulary: Vocabulary) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders
    from tokenizers.models import BPE

    pre = file.get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        allowed = ", ".join(PRE_TOKENIZERS)
        raise InputError(f"{file.path}: tokenizer.ggml.pre {pre!r} is not supported; allowed: {allowed}")
    if file.find("tokenizer.ggml.add_bos_token", False):
        raise InputError(f"{file.path}: tokenizer.ggml.add_bos_token is true, which is not supported")
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    if len(ids) != len(vocabulary.tokens):
        raise InputError(f"{file.path}: tokenizer.ggml.tokens has {len(vocabulary.tokens) - len(ids)} duplicate tokens")
    tokenizer = Tokenizer(BPE(vocab=ids, merges=vocabulary.merges))
    tokenizer.normalizer, tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind == TokenType.CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == TokenType.USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
    return tokenizer


def tokenizer_config(file: GGUFFile, vocabulary: Vocabulary) -> dict[str, Any]:
    config: dict[str, Any] = {
        # The generic class: a model's own class would rebuild the pre-tokenizer and ignore the one in tokenizer.json.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": file.get("{arch}.context_length"),
        "clean_up_tokenization_spaces": False,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        token_id = file.find(f"tokenizer.ggml.{key}_token_id")
        if token_id is None:
            continue
        if not 0 <= token_id < len(vocabulary.tokens):
            limit = len(vocabulary.tokens)
            raise InputError(f"{file.path}: tokenizer.ggml.{key}_token_id is {token_id}, but there are {limit} tokens")
        config[f"{name}_token"] = vocabulary.tokens[token_id]
    template = file.find("tokenizer.chat_template")
    if template is not None:
        config["chat_template"] = template
    return config


def _read_vocabulary(file: GGUFFile) -> Vocabulary:
    model = file.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise InputError(f"{file.path}: tokenizer.ggml.model {model!r} is not supported; allowed: gpt2 (a BPE)")
    tokens, types = file.get("tokenizer.ggml.tokens"), file.get("tokenizer.ggml.token_type")
    if len(tokens) != len(types):
        raise InputError(f"{file.path}: {len(tokens)} tokens, but {len(types)} entries in tokenizer.ggml.token_type")
    unknown = set(types) - set(TokenType)
    if unknown:
        raise InputError(f"{file.path}: tokenizer.ggml.token_type has unknown kinds {sorted(unknown)}")
    size = len(tokens)
    while size and types[size - 1] == TokenType.UNUSED:
        size -= 1
    merges = []
    for merge in file.get("tokenizer.ggml.merges"):
        # Byte-level tokens hold no space, so the only one is the separator.
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    return Vocabulary(tokens[:size], types[:size], merges)
