"""Opens a model folder's tokenizer without running anything from the folder, and checks that it fits the model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_swift.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "spiece.model")


def load_tokenizer(folder: Path, *, chat_template: Path | None = None) -> PreTrainedTokenizerBase:
    """The transformers tokenizer of a Hugging Face folder, with the chat template of a Jinja file if one is given.

    Raises InputError: no such folder, no tokenizer in it, a tokenizer that needs code from the folder, one without a
    fast (Rust) version (masks need its character offsets), an unreadable template.
    """
    _check_folder(folder)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"{folder}: the tokenizer could not be read: {error}") from error
    if not tokenizer.is_fast:
        raise InputError(f"{folder}: {type(tokenizer).__name__} is not a fast tokenizer (tokenizer.json is needed)")
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
    return tokenizer


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder (a Hugging Face folder with a tokenizer is needed)")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(f"{folder}: no tokenizer in this folder (looked for {', '.join(TOKENIZER_FILES)})")
    # tokenizer_config.json names a class of its own through auto_map; config.json through auto_map.AutoTokenizer.
    if "auto_map" in _read_json(folder / "tokenizer_config.json"):
        raise InputError(f"{folder}/tokenizer_config.json: auto_map names code in the folder, which is never executed")
    if "AutoTokenizer" in (_read_json(folder / "config.json").get("auto_map") or {}):
        raise InputError(f"{folder}/config.json: auto_map.AutoTokenizer names code in the folder, never executed")


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: a JSON object is needed, found {type(content).__name__}")
    return content


def _read_template(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data.chat_template: {file} could not be read: {error}") from error


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raises InputError when the tokenizer can produce an id that the model's embedding does not have."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise InputError(
            f"model.tokenizer: its largest token id is {largest}, but the model's embedding has {vocab_size} rows "
            f"(ids 0 to {vocab_size - 1}); use the model's own tokenizer"
        )


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides which tokens a text or chat becomes."""
    backend: Any = tokenizer.backend_tokenizer
    parts = [backend.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def eos_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The EOS token that ends plain texts. Raises InputError when there is none."""
    if not isinstance(tokenizer.eos_token_id, int):
        raise InputError("model.tokenizer: it has no EOS token, which plain texts end with")
    return tokenizer.eos_token_id


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills unused positions; any valid one will do, since nothing attends to it and its loss is 0."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((i for i in ids if isinstance(i, int)), 0)
