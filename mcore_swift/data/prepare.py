"""Writes pretraining corpora in Megatron's indexed format: one stream of tokens and an index of its documents."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mcore_swift.data.sources import Problem, find_layout, raise_problems, row_number
from mcore_swift.data.tokenized import batched, readable_rows
from mcore_swift.data.tokenizer import eos_id_of
from mcore_swift.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_TEXTS = 256  # texts a worker tokenizes at a time


def prepare(
    inputs: list[Path],
    prefix: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    append_eod: bool = True,
    workers: int = 1,
) -> dict[str, int | float]:
    """Tokenizes the `text` column of data files into PREFIX.bin and PREFIX.idx, one document a row, in order.

    `append_eod` ends each document with the tokenizer's EOS. `workers` processes share the work; with one, the
    tokenizer's own threads do. Returns counts (documents, tokens, seconds). Nothing is left behind on failure.
    Raises InputError: unreadable data, rows without text, a tokenizer without EOS, an output that exists.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    eod = eos_id_of(tokenizer) if append_eod else None
    bin_path, idx_path = index_paths(prefix)
    if found := [path for path in (bin_path, idx_path) if path.exists()]:
        raise InputError(f"{found[0]}: exists already; remove it or choose another prefix")
    temporary = [path.with_name(f"{path.name}.tmp{os.getpid()}") for path in (bin_path, idx_path)]
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        start, tokens, documents = time.perf_counter(), 0, 0
        dtype = DType.optimal_dtype(max(tokenizer.get_vocab().values()) + 1)
        builder = IndexedDatasetBuilder(str(temporary[0]), dtype=dtype)
        for ids, lengths in _tokenized(_texts(inputs), tokenizer, eod=eod, workers=workers):
            for document in np.split(ids, np.cumsum(lengths)[:-1]):
                builder.add_document(document, [len(document)])  # pyright: ignore[reportArgumentType]
            tokens, documents = tokens + len(ids), documents + len(lengths)
        if not documents:
            raise InputError(f"{', '.join(map(str, inputs))}: no rows")
        builder.finalize(str(temporary[1]))
        os.replace(temporary[0], bin_path)
        os.replace(temporary[1], idx_path)
    except OSError as error:
        raise InputError(f"{prefix}: can't be written: {error}") from error
    finally:
        for path in temporary:
            with contextlib.suppress(OSError):
                path.unlink()
    return {"documents": documents, "tokens": tokens, "seconds": time.perf_counter() - start}


def index_paths(prefix: Path) -> tuple[Path, Path]:
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


def _texts(files: list[Path]) -> Iterator[str]:
    for file in files:
        for index, row in enumerate(readable_rows(file)):
            if not index:
                find_layout(row, format="text", file=file)
            text = row.get("text")
            if not isinstance(text, str) or not text:
                reason = f"text is {'empty' if text == '' else type(text).__name__}, not a string with content"
                raise_problems([Problem(file, row_number(file, index), reason)])
            yield str(text)


_worker_state: tuple[Any, int | None] | None = None  # tokenizer and EOD of a worker process


def _start_worker(tokenizer: Any, eod: int | None) -> None:
    global _worker_state
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a worker
    _worker_state = (tokenizer, eod)


def _encode_in_worker(texts: list[str]) -> tuple[np.ndarray, list[int]]:
    assert _worker_state is not None
    return _encode(texts, *_worker_state)


def _encode(texts: list[str], tokenizer: Any, eod: int | None) -> tuple[np.ndarray, list[int]]:
    """(tokens int32 of all texts, tokens of each)."""
    encoded = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    if eod is not None:
        encoded = [ids if ids and ids[-1] == eod else [*ids, eod] for ids in encoded]
    return np.concatenate([np.array(ids, dtype=np.int32) for ids in encoded]), [len(ids) for ids in encoded]


def _tokenized(
    texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, *, eod: int | None, workers: int
) -> Iterator[tuple[np.ndarray, list[int]]]:
    if workers <= 1:
        yield from (_encode(chunk, tokenizer, eod) for chunk in batched(texts, CHUNK_TEXTS))
        return
    # Forked, not spawned: a fresh Python would import transformers for seconds in every worker.
    with multiprocessing.get_context("fork").Pool(workers, _start_worker, (tokenizer, eod)) as pool:
        yield from pool.imap(_encode_in_worker, batched(texts, CHUNK_TEXTS))
