"""Pretraining corpora in Megatron's indexed format, blended by Megatron's own data sets."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mcore_swift.data.batch import MicroBatch
from mcore_swift.data.cache import default_cache_dir, locked
from mcore_swift.data.map_loader import EvalLoader, MapTrainLoader, TrainLoader
from mcore_swift.data.prepare import index_paths, prepare
from mcore_swift.data.shape import LoaderShape
from mcore_swift.data.tokenizer import eos_id_of
from mcore_swift.errors import InputError

if TYPE_CHECKING:
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from transformers import PreTrainedTokenizerBase

    from mcore_swift.recipe import DataSection, SourceSection

__all__ = ["build_indexed", "prepare"]


class _Tokenizer:
    """What Megatron's data sets ask of a tokenizer."""

    vocab_size = None  # the type of the tokens is read from the index
    pad = -1  # an id that no data hold: the filling of the last validation sample

    def __init__(self, eod: int) -> None:
        self.eod = eod
        self.unique_identifiers = {"eod": eod}


class IndexedSamples:
    """A Megatron data set as micro-batches.

    Packed: documents are told apart at their EOD (cu_seqlens, positions restart, the EOD predicts nothing). Unpacked:
    Megatron's plain GPT samples [b, s], where text runs on over document ends.
    """

    def __init__(self, dataset: Any, *, shape: LoaderShape, packing: bool, vocab_size: int) -> None:
        self.dataset, self.shape, self.packing = dataset, shape, packing
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return len(self.dataset)

    def micro_batch(self, numbers: Sequence[int | None]) -> MicroBatch:
        samples = [self._sample(number) for number in numbers]
        tokens, labels, mask, positions = (
            torch.stack([sample[name] for sample in samples])
            for name in ("tokens", "labels", "loss_mask", "position_ids")
        )
        if int(tokens.max()) >= self.vocab_size or int(labels.max()) >= self.vocab_size:
            raise InputError(
                f"data.train: token id {max(int(tokens.max()), int(labels.max()))} in the indexed data, but the "
                f"model's embedding has {self.vocab_size} rows: they were prepared with another tokenizer"
            )
        labels = torch.where(mask > 0, labels, 0)
        if not self.packing:
            return MicroBatch(tokens=tokens, labels=labels, loss_mask=mask, position_ids=positions)
        segments = _merge([sample["cu_seqlens"] for sample in samples], self.shape.sequence_length)
        return MicroBatch(
            tokens=tokens.reshape(1, -1),
            labels=labels.reshape(1, -1),
            loss_mask=mask.reshape(1, -1),
            position_ids=positions.reshape(1, -1),
            cu_seqlens=segments,
            max_seqlen=int(segments.diff().max()),
        )

    def _sample(self, number: int | None) -> dict[str, torch.Tensor]:
        sample = self.dataset[0 if number is None else number]
        return sample if number is not None else sample | {"loss_mask": torch.zeros_like(sample["loss_mask"])}

    def report(self) -> dict[str, Any]:
        return {"samples": len(self), "tokens": len(self) * self.shape.sequence_length}


def _merge(cu_seqlens: list[torch.Tensor], length: int) -> torch.Tensor:
    """One cu_seqlens for samples of `length` that follow each other; each comes filled up with `length`."""
    ends = [torch.unique(c[c > 0]) + i * length for i, c in enumerate(cu_seqlens)]
    return torch.cat([torch.zeros(1, dtype=torch.int32), *ends]).to(torch.int32)


def build_indexed(
    data: DataSection, *, shape: LoaderShape, tokenizer: PreTrainedTokenizerBase, seed: int, vocab_size: int
) -> tuple[TrainLoader, EvalLoader | None]:
    """Loaders over a weighted blend of indexed corpora.

    An epoch is over when every source has been seen at least once at the given weights; sources that are then ahead
    repeat. `validation_split` takes that share of each source's last documents (Megatron's way: not by seed).
    Every rank must call it: rank 0 builds the indices, the others wait for it and map them, so `data.cache_dir` must
    be on a file system that all nodes share.
    """
    if data.streaming:
        raise InputError("data.streaming: indexed data are memory-mapped already, streaming doesn't apply")
    if data.too_long != "truncate":
        raise InputError(f"data.too_long: {data.too_long} doesn't apply to indexed data, whose texts are split")
    if shape.sequence_length % shape.pad_multiple:
        raise InputError(
            f"data.sequence_length: {shape.sequence_length} is not a multiple of {shape.pad_multiple}, which the "
            "layout needs of indexed data"
        )
    builder = _BlendBuilder(data, shape=shape, eod=eos_id_of(tokenizer), seed=seed)

    def samples(dataset: Any) -> IndexedSamples:
        return IndexedSamples(dataset, shape=shape, packing=data.packing, vocab_size=vocab_size)

    train_range = (0.0, 1.0 - data.validation_split)
    dataset = builder.build(data.train, train_range, training=True)
    # Megatron has shuffled documents and samples already; only a second pass needs another order.
    identity = [builder.keys(data.train), data.sequence_length, data.packing, data.validation_split, weights(data)]
    train = MapTrainLoader(samples(dataset), shape=shape, seed=seed, shuffle=data.shuffle, identity=identity)
    if data.validation:
        return train, EvalLoader(samples(builder.build(data.validation, (0.0, 1.0), training=False)), shape=shape)
    if data.validation_split:
        held_out = builder.build(data.train, (1.0 - data.validation_split, 1.0), training=False)
        return train, EvalLoader(samples(held_out), shape=shape)
    return train, None


def weights(data: DataSection) -> list[float]:
    return [source.weight for source in data.train]


class _BlendBuilder:
    """Calls Megatron's builder, with its index files in our cache under a key of the corpora's content."""

    def __init__(self, data: DataSection, *, shape: LoaderShape, eod: int, seed: int) -> None:
        self.data, self.shape, self.eod, self.seed = data, shape, eod, seed

    def keys(self, sources: list[SourceSection]) -> list[str]:
        return [_content_key(Path(source.path)) for source in sources]

    def build(self, sources: list[SourceSection], documents: tuple[float, float], *, training: bool) -> Any:
        """A data set of the given range of each source's documents: weighted, or (validation) each sample once."""
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset

        for source in sources:
            _check_source(source)
        size = self._epoch_size(sources, documents) if training else None
        split = 0 if training else 1
        config = self._config(sources, weighted=training)
        ranges: list[Any] = [None, None, None]
        ranges[split] = documents
        config.split_matrix = ranges  # the same documents in every run: not through rounded "split" strings
        sizes: list[Any] = [0, 0, 0]
        sizes[split] = size
        builder = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config)
        first_rank = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        assert config.path_to_cache is not None
        with locked(Path(config.path_to_cache)) if first_rank else contextlib.nullcontext():
            try:
                return builder.build()[split]
            except FileNotFoundError as error:
                raise InputError(
                    f"data.cache_dir: {error.filename}, written by rank 0, isn't visible here; "
                    "with indexed data the cache must be on a file system that all nodes share"
                ) from error

    def _config(self, sources: list[SourceSection], *, weighted: bool) -> GPTDatasetConfig:
        from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

        paths = [source.path for source in sources]
        key = hashlib.sha256("".join(self.keys(sources)).encode()).hexdigest()[:32]
        return GPTDatasetConfig(
            random_seed=self.seed,
            sequence_length=self.shape.sequence_length,
            blend=(paths, [source.weight for source in sources] if weighted and len(paths) > 1 else None),
            split="1,0,0",
            path_to_cache=str(default_cache_dir(self.data.cache_dir) / "indexed" / key),
            tokenizer=_Tokenizer(self.eod),  # pyright: ignore[reportArgumentType]
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=self.data.packing,
            create_attention_mask=False,
            drop_last_partial_validation_sequence=False,
            inter_document_masking=self.data.packing,
        )

    def _epoch_size(self, sources: list[SourceSection], documents: tuple[float, float]) -> int:
        """Samples until the source that lasts longest has been seen once."""
        total = sum(source.weight for source in sources)
        sizes = [_num_samples(source.path, documents, self.shape.sequence_length) for source in sources]
        for source, size in zip(sources, sizes, strict=True):
            if not size:
                raise InputError(f"{source.path}: fewer tokens than data.sequence_length {self.shape.sequence_length}")
        return max(round(size * total / source.weight) for source, size in zip(sources, sizes, strict=True))


def _check_source(source: SourceSection) -> None:
    for path in index_paths(Path(source.path)):
        if not path.is_file():
            raise InputError(f"{path}: no such file (an indexed data set is a prefix with PREFIX.bin and PREFIX.idx)")
    if not source.weight > 0:
        raise InputError(f"{source.path}: weight {source.weight} is not positive")


def _num_samples(prefix: str, documents: tuple[float, float], sequence_length: int) -> int:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)  # must outlive its arrays: it closes the mapped file under them
    lengths = dataset.sequence_lengths
    first, last = (round(share * len(lengths)) for share in documents)
    return (int(lengths[first:last].sum(dtype=np.int64)) - 1) // sequence_length


def _content_key(prefix: Path) -> str:
    """Changes when the corpus does: a hash of the index, which holds every document's length, and the data's size."""
    bin_path, idx_path = index_paths(prefix)
    if not idx_path.is_file() or not bin_path.is_file():
        return ""
    with idx_path.open("rb") as index:
        return hashlib.file_digest(index, "sha256").hexdigest() + f"-{bin_path.stat().st_size}"
