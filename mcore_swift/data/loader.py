"""The door to the data: from a recipe's data section to the loaders that training uses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mcore_swift.data.adapter_field import read_adapters
from mcore_swift.data.batch import MicroBatch
from mcore_swift.data.cache import default_cache_dir
from mcore_swift.data.collate import collate
from mcore_swift.data.map_loader import EvalLoader, MapTrainLoader, TrainLoader
from mcore_swift.data.samples import SampleSet, make_samples, split_rows
from mcore_swift.data.shape import LoaderShape
from mcore_swift.data.sources import find_files
from mcore_swift.data.tokenized import TokenizedRows, tokenize_files
from mcore_swift.data.tokenizer import check_vocabulary, pad_id_of
from mcore_swift.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from mcore_swift.recipe import DataSection, SourceSection

__all__ = ["EvalLoader", "LoaderShape", "TrainLoader", "build_loaders"]


def build_loaders(
    data: DataSection,
    *,
    shape: LoaderShape,
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
    vocab_size: int,
    adapters: Sequence[str] = (),
) -> tuple[TrainLoader, EvalLoader | None]:
    """The training loader, and the validation loader where the recipe asks for one.

    Every rank calls it with its own `shape`. `tokenizer` may be None only for synthetic data. `vocab_size`: rows of
    the model's embedding. `adapters`: the names that a row's data.adapter_field may have. Raises InputError for
    settings or data that can't be used.
    """
    _check(data)
    if data.format == "synthetic":
        from mcore_swift.data.synthetic import build_synthetic

        return build_synthetic(data, shape=shape, seed=seed, vocab_size=vocab_size)
    if tokenizer is None:
        raise InputError("model.tokenizer: a tokenizer is needed for every data format but synthetic")
    check_vocabulary(tokenizer, vocab_size)
    if is_indexed(data):
        from mcore_swift.data.indexed import build_indexed

        return build_indexed(data, shape=shape, tokenizer=tokenizer, seed=seed, vocab_size=vocab_size)
    if weighted := [source.path for source in data.train + data.validation if source.weight != 1.0]:
        raise InputError(f"data.train: weight needs indexed data (`mcore-swift data prepare`), not {weighted[0]}")
    if data.streaming:
        from mcore_swift.data.streaming import build_streaming

        train = build_streaming(data, shape=shape, tokenizer=tokenizer, seed=seed)
        return train, _validation(data, shape=shape, tokenizer=tokenizer, adapters=adapters)
    return _build_map(data, shape=shape, tokenizer=tokenizer, seed=seed, adapters=adapters)


def _check(data: DataSection) -> None:
    if not data.train:
        raise InputError("data.train: no source given (a file, a folder, or an indexed data set's prefix)")
    if data.sequence_length < 2:
        raise InputError(f"data.sequence_length: {data.sequence_length} is too short, at least 2 tokens are needed")
    if not 0 <= data.validation_split < 1:
        raise InputError(f"data.validation_split: {data.validation_split} is not in 0 ≤ x < 1")
    if data.validation and data.validation_split:
        raise InputError("data: validation and validation_split exclude each other, give one of them")
    if data.streaming and data.validation_split:
        raise InputError("data.validation_split: streaming doesn't know the number of rows; use data.validation")


def is_indexed(data: DataSection) -> bool:
    """Whether the sources are prefixes of Megatron's .bin and .idx files."""
    return data.format == "indexed" or (
        data.format == "auto" and all(Path(source.path + ".idx").is_file() for source in data.train)
    )


class TokenizedSamples:
    """Cached samples as micro-batches."""

    def __init__(self, samples: SampleSet, *, data: DataSection, shape: LoaderShape, pad_id: int) -> None:
        self.samples, self.packing, self.shape, self.pad_id = samples, data.packing, shape, pad_id

    def __len__(self) -> int:
        return len(self.samples)

    def micro_batch(self, numbers: Sequence[int | None]) -> MicroBatch:
        documents = [[] if number is None else self.samples.documents(number) for number in numbers]
        adapters = None
        if self.samples.rows.adapter is not None:
            adapters = [[] if number is None else self.samples.adapters(number) for number in numbers]
        return collate(documents, packing=self.packing, shape=self.shape, pad_id=self.pad_id, adapters=adapters)

    def report(self) -> dict[str, Any]:
        rows = self.samples.rows
        counts = self.samples.counts.report(sequence_length=self.shape.sequence_length if self.packing else None)
        return counts | {"cache_reused": rows.seconds == 0, "tokenize_seconds": rows.seconds}


@dataclass(frozen=True)
class _Maker:
    """Samples of a data section: what training and validation rows have in common."""

    data: DataSection
    shape: LoaderShape
    tokenizer: PreTrainedTokenizerBase
    adapters: Sequence[str]

    def tokenize(self, sources: list[SourceSection]) -> TokenizedRows:
        files = find_files(source.path for source in sources)
        cache = default_cache_dir(self.data.cache_dir)
        rows = tokenize_files(files, tokenizer=self.tokenizer, format=self.data.format, cache_dir=cache)
        field = self.data.adapter_field
        return rows if field is None else replace(rows, adapter=read_adapters(files, field=field, names=self.adapters))

    def samples(self, rows: TokenizedRows, name: str, *, subset: np.ndarray | None = None) -> TokenizedSamples:
        data = self.data
        samples = make_samples(
            rows,
            sequence_length=data.sequence_length,
            too_long=data.too_long,
            packing=data.packing,
            subset=subset,
        )
        if not len(samples):
            raise InputError(f"data.{name}: none of its {samples.counts.rows} rows can be used ({samples.counts})")
        return TokenizedSamples(samples, data=data, shape=self.shape, pad_id=pad_id_of(self.tokenizer))


def _validation(
    data: DataSection, *, shape: LoaderShape, tokenizer: PreTrainedTokenizerBase, adapters: Sequence[str]
) -> EvalLoader | None:
    if not data.validation:
        return None
    maker = _Maker(data, shape, tokenizer, adapters)
    return EvalLoader(maker.samples(maker.tokenize(data.validation), "validation"), shape=shape)


def _build_map(
    data: DataSection,
    *,
    shape: LoaderShape,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    adapters: Sequence[str],
) -> tuple[TrainLoader, EvalLoader | None]:
    maker = _Maker(data, shape, tokenizer, adapters)
    rows = maker.tokenize(data.train)
    train_rows, validation_rows = None, None
    if data.validation_split:
        train_rows, validation_rows = split_rows(len(rows), fraction=data.validation_split, seed=seed)
        if not len(train_rows):
            raise InputError(f"data.validation_split: {data.validation_split} of {len(rows)} rows leaves none to train")
    train = MapTrainLoader(
        maker.samples(rows, "train", subset=train_rows),
        shape=shape,
        seed=seed,
        shuffle=data.shuffle,
        identity=[rows.key, data.sequence_length, data.packing, data.too_long, data.validation_split],
    )
    if validation_rows is None:
        return train, _validation(data, shape=shape, tokenizer=tokenizer, adapters=adapters)
    return train, EvalLoader(maker.samples(rows, "validation_split", subset=validation_rows), shape=shape)
