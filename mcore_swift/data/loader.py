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
from mcore_swift.data.judged_collate import collate_judged
from mcore_swift.data.judged_samples import JudgedSet, judged_samples, judged_settings, split_prompts
from mcore_swift.data.map_loader import EvalLoader, MapTrainLoader, TrainLoader
from mcore_swift.data.samples import SampleSet, make_samples, split_rows
from mcore_swift.data.shape import LoaderShape
from mcore_swift.data.sources import WrongColumns, find_files
from mcore_swift.data.tokenized import TokenizedRows, tokenize_files
from mcore_swift.data.tokenizer import check_vocabulary, pad_id_of
from mcore_swift.data.wanted import Form, Wanted
from mcore_swift.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from mcore_swift.recipe import DataSection, SourceSection

__all__ = ["EvalLoader", "LoaderShape", "TrainLoader", "Wanted", "build_loaders"]


def build_loaders(
    data: DataSection,
    *,
    shape: LoaderShape,
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
    vocab_size: int,
    wanted: Wanted = Wanted(),  # noqa: B008  (frozen)
    adapters: Sequence[str] = (),
) -> tuple[TrainLoader, EvalLoader | None]:
    """The training loader, and the validation loader where the recipe asks for one.

    Every rank calls it with its own `shape`. `tokenizer` may be None only for synthetic data. `vocab_size`: rows of
    the model's embedding. `wanted`: what the objective learns from; micro-batches say which answers they hold
    (`sequences`) where it isn't labels. `adapters`: the names that a row's data.adapter_field may have. Raises
    InputError for settings or data that can't be used.
    """
    _check(data, shape, wanted)
    if data.format == "synthetic":
        from mcore_swift.data.synthetic import build_synthetic

        return build_synthetic(data, shape=shape, seed=seed, vocab_size=vocab_size)
    if tokenizer is None:
        raise InputError("model.tokenizer: a tokenizer is needed for every data format but synthetic")
    check_vocabulary(tokenizer, vocab_size)
    if not wanted.judged and is_indexed(data):
        from mcore_swift.data.indexed import build_indexed

        return build_indexed(data, shape=shape, tokenizer=tokenizer, seed=seed, vocab_size=vocab_size)
    if weighted := [source.path for source in data.train + data.validation if source.weight != 1.0]:
        raise InputError(f"data.train: weight needs indexed data (`mcore-swift data prepare`), not {weighted[0]}")
    if data.streaming:
        from mcore_swift.data.streaming import build_streaming

        train = build_streaming(data, shape=shape, tokenizer=tokenizer, seed=seed, wanted=wanted)
        return train, _validation(_Maker(data, shape, tokenizer, wanted, adapters))
    return _build_map(_Maker(data, shape, tokenizer, wanted, adapters), seed=seed)


def _check(data: DataSection, shape: LoaderShape, wanted: Wanted) -> None:
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
    wanted.format(data.format)
    if wanted.probes and shape.global_batch_size < 2:
        raise InputError(
            f"schedule.global_batch_size: {shape.global_batch_size} with objective.name: {wanted.objective}, which "
            "estimates a divergence over the global batch; at least 2 are needed"
        )
    if wanted.judged and data.adapter_field is not None:
        raise InputError(f"data.adapter_field: adapters can't be chosen by row with objective.name: {wanted.objective}")
    if not wanted.judged and (data.truncate != "answer_end" or data.equal_pairs != "error"):
        key = "truncate" if data.truncate != "answer_end" else "equal_pairs"
        raise InputError(f"data.{key}: only for pairs and labelled answers, but {wanted}")


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
        batch = collate(documents, packing=self.packing, shape=self.shape, pad_id=self.pad_id, adapters=adapters)
        return replace(batch, weighted=self.samples.rows.weights is not None)

    def report(self) -> dict[str, Any]:
        return _report(self.samples, self.shape.sequence_length if self.packing else None)


class JudgedSamples:
    """Cached samples of answers as micro-batches."""

    def __init__(self, samples: JudgedSet, *, data: DataSection, shape: LoaderShape, pad_id: int, form: Form) -> None:
        self.samples, self.packing, self.shape, self.pad_id, self.form = samples, data.packing, shape, pad_id, form
        self.reference: dict[str, Any] = {}  # what a precomputed reference took, for the report

    def __len__(self) -> int:
        return len(self.samples)

    def micro_batch(self, numbers: Sequence[int | None]) -> MicroBatch:
        answers = [[] if number is None else self.samples.documents(number) for number in numbers]
        return collate_judged(answers, form=self.form, packing=self.packing, shape=self.shape, pad_id=self.pad_id)

    def use_ref_logps(self, ref_logps: np.ndarray, *, seconds: float = 0.0) -> None:
        """From now on the micro-batches hold these: float32 [units, answers], in the order of the units.

        `seconds`: how long they took to compute, 0 where they were there already.
        """
        self.samples = replace(self.samples, ref_logps=ref_logps)
        self.form = replace(self.form, ref_logps=True)
        self.reference = {"reference_reused": seconds == 0, "reference_seconds": round(seconds, 2)}

    def row_name(self, row: int) -> str:
        """Where a person finds the row of an answer (`Sequences.row`): FILE:LINE."""
        problem = self.samples.rows.problem(row, "")
        return f"{problem.file}:{problem.row}"

    def report(self) -> dict[str, Any]:
        report = _report(self.samples, self.shape.sequence_length if self.packing else None)
        return report | self.reference


def _report(samples: SampleSet | JudgedSet, sequence_length: int | None) -> dict[str, Any]:
    seconds = samples.rows.seconds
    counts = samples.counts.report(sequence_length=sequence_length)
    return counts | {"cache_reused": seconds == 0, "tokenize_seconds": seconds}


@dataclass(frozen=True)
class _Maker:
    """Samples of a data section: what training and validation rows have in common."""

    data: DataSection
    shape: LoaderShape
    tokenizer: PreTrainedTokenizerBase
    wanted: Wanted
    adapters: Sequence[str]

    def tokenize(self, sources: list[SourceSection]) -> TokenizedRows:
        files = find_files(source.path for source in sources)
        cache, format = default_cache_dir(self.data.cache_dir), self.wanted.format(self.data.format)
        try:
            rows = tokenize_files(files, tokenizer=self.tokenizer, format=format, cache_dir=cache)
        except WrongColumns as error:
            raise InputError(f"{error}; {self.wanted}") from error
        self.wanted.check_weights(rows.all_weights, ", ".join(map(str, files)))
        field = self.data.adapter_field
        return rows if field is None else replace(rows, adapter=read_adapters(files, field=field, names=self.adapters))

    def samples(
        self, rows: TokenizedRows, name: str, *, subset: np.ndarray | None = None
    ) -> TokenizedSamples | JudgedSamples:
        pad_id = pad_id_of(self.tokenizer)
        if self.wanted.judged:
            judged = judged_samples(rows, self.data, self.wanted, subset=subset)
            made = JudgedSamples(judged, data=self.data, shape=self.shape, pad_id=pad_id, form=self.wanted.form)
        else:
            plain = make_samples(
                rows,
                sequence_length=self.data.sequence_length,
                too_long=self.data.too_long,
                packing=self.data.packing,
                subset=subset,
            )
            made = TokenizedSamples(plain, data=self.data, shape=self.shape, pad_id=pad_id)
        if not len(made):
            counts = made.samples.counts
            raise InputError(f"data.{name}: none of its {counts.rows} rows can be used ({counts})")
        return made

    @property
    def settings(self) -> list[Any]:
        """What decides, beside the rows, what a sample is."""
        data = self.data
        plain = [data.sequence_length, data.packing, data.too_long, data.validation_split]
        return [*plain, *judged_settings(data, self.wanted)]


def _validation(maker: _Maker) -> EvalLoader | None:
    sources = maker.data.validation
    if not sources:
        return None
    return EvalLoader(maker.samples(maker.tokenize(sources), "validation"), shape=maker.shape)


def _build_map(maker: _Maker, *, seed: int) -> tuple[TrainLoader, EvalLoader | None]:
    data, shape = maker.data, maker.shape
    rows = maker.tokenize(data.train)
    train_rows, validation_rows = None, None
    if data.validation_split:
        train_rows, validation_rows = (
            split_prompts(rows, fraction=data.validation_split, seed=seed)
            if maker.wanted.judged
            else split_rows(len(rows), fraction=data.validation_split, seed=seed)
        )
        if not len(train_rows):
            raise InputError(f"data.validation_split: {data.validation_split} of {len(rows)} rows leaves none to train")
    train = MapTrainLoader(
        maker.samples(rows, "train", subset=train_rows),
        shape=shape,
        seed=seed,
        shuffle=data.shuffle,
        identity=[rows.key, *maker.settings],
    )
    if validation_rows is None:
        return train, _validation(maker)
    return train, EvalLoader(maker.samples(rows, "validation_split", subset=validation_rows), shape=shape)
