"""What a conversion will do, known before anything large is read: coverage, and which rows go where.

Coverage is proved from headers: every source tensor is consumed, every target tensor produced, all shapes agree. The
transfer is then a list of tasks, each a run of rows of one target tensor with the rows of source tensors it is made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ckpt_tools.source import HFSource, MegatronSource, as_rows, part_segments
from ckpt_tools.stored import Block, Files, Stored, read_rows, row_chunks
from ckpt_tools.torch_dist import CheckpointPlan, plan_checkpoint
from mcore_swift.errors import InputError
from mcore_swift.models.build import ModelSource
from mcore_swift.models.keys import global_shapes, weight_rules
from mcore_swift.weights import safetensors_io as st
from mcore_swift.weights.coverage import Misfits, hf_misfits, megatron_misfits
from mcore_swift.weights.rules import TensorRule

READABLE = ("F32", "BF16", "F16")
TASK_BYTES = 64 << 20  # of the target; the unit that an interrupted conversion repeats
COMPARE_BYTES = 8 << 20
HEADS = {"lm_head.weight": "model.embed_tokens.weight", "output_layer.weight": "embedding.word_embeddings.weight"}


@dataclass(frozen=True)
class Task:
    """Rows [first, last) of the target tensor `name`, all in block `block`."""

    name: str
    block: int
    first: int
    last: int


@dataclass(frozen=True)
class Transfer:
    """All of a conversion's bulk. `sources`, `targets`: tensors by their own side's names, as the rules speak of them
    (a stack of experts is its rows); `scales`: FP8 sources'."""

    rules: Mapping[str, TensorRule]
    to_megatron: bool
    sources: Mapping[str, Stored]
    scales: Mapping[str, Stored]
    targets: Mapping[str, Stored]
    tasks: list[Task]

    def segments(self, name: str, first: int, last: int) -> Iterator[tuple[str, int, int, int]]:
        """Where rows [first, last) of target `name` come from: (source, its first row, its last, row from `first`)."""
        if self.to_megatron:
            rule = self.rules[name]
            rows = rule.rows or (self.targets[name].shape[0],)
            for part, low, high, target in rule.segments(first, last, rows):
                yield rule.hf[part], low, high, target
        else:
            rule, part = self.parts[name]
            for low, high, target in part_segments(rule, part, first, last):
                yield rule.key, low, high, target

    @cached_property
    def parts(self) -> dict[str, tuple[TensorRule, int]]:
        """Hugging Face name → its rule, and which part of it."""
        return {name: (rule, part) for rule in self.rules.values() for part, name in rule.parts()}

    def packed(self, name: str) -> TensorRule | None:
        """The rule of a target whose experts, or whose source's, lie packed in one Hugging Face tensor."""
        rule = self.rules[name] if self.to_megatron else self.parts[name][0]
        return rule if rule.packed else None

    def expert_rows(self, name: str) -> int:
        """Rows of an expert's slice of a packed target; 1 for any other target."""
        rule = self.packed(name)
        return self.targets[name].shape[0] // rule.stack if rule else 1

    @property
    def nbytes(self) -> int:
        """Bytes of tensors that will be written."""
        return sum(target.nbytes for target in self.targets.values())

    @property
    def bytes_read(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.sources.values(), *self.scales.values()))


# --- coverage ---------------------------------------------------------------------------------------------------------


def misfits(
    model: ModelSource,
    specs: Mapping[str, st.TensorSpec],
    *,
    megatron: bool,
    dtypes: tuple[str, ...] = READABLE,
) -> Misfits:
    """What of a source's tensors (by its own side's names) does not fit the model's config. Reads nothing."""
    check = megatron_misfits if megatron else hf_misfits
    ignored = tuple(HEADS) if model.tied else ()
    return check(weight_rules(model), specs, dtypes=dtypes, shapes=global_shapes(model), ignored=ignored)


def check_coverage(source: HFSource | MegatronSource) -> None:
    """Raises InputError that lists every tensor that is missing, unexpected, mis-shaped or of a dtype not known.

    A head that tied embeddings make superfluous may be there when it has the embedding's values.
    """
    is_megatron = isinstance(source, MegatronSource)
    specs = {name: st.TensorSpec(item.dtype, item.shape) for name, item in source.stored.items()}
    specs |= {name: spec for name, spec in source.specs.items() if name in source.scales}
    found = misfits(source.model, specs, megatron=is_megatron)
    if is_megatron and source.state:
        found.missing.clear()
    if found:
        raise InputError(f"{source.path}: the tensors do not fit the config: {found.text()}")
    for head, embedding in HEADS.items():
        both = head in source.stored and embedding in source.stored
        if source.model.tied and both and not _same(source.stored[head], source.stored[embedding]):
            raise InputError(
                f"{source.path}: config.json says tie_word_embeddings, but {head} has other values than {embedding};"
                " set tie_word_embeddings: false in config.json to keep both, or remove the tensor"
            )
    copied = weight_rules(source.model).values() if isinstance(source, HFSource) else ()
    for name, (original, *_) in ((name, rule.hf) for rule in copied for name in rule.copies):
        if not _same(source.stored[name], source.stored[original]):
            raise InputError(
                f"{source.path}: {name} has other values than {original}; Megatron-Core holds one tensor for both"
            )


def _same(a: Stored, b: Stored) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    files = Files()
    try:
        for first, last in row_chunks(0, a.shape[0], a.row_bytes, budget=COMPARE_BYTES):
            ours, theirs = (np.empty((last - first) * a.row_bytes, np.uint8) for _ in range(2))
            read_rows(a, first, last, ours, files)
            read_rows(b, first, last, theirs, files)
            if not np.array_equal(ours, theirs):
                return False
        return True
    finally:
        files.close()


# --- where everything goes --------------------------------------------------------------------------------------------


def plan_transfer(
    source: HFSource | MegatronSource, folder: Path, *, dtype: str | None, max_shard_bytes: int
) -> tuple[Transfer, CheckpointPlan]:
    """Plans the conversion of `source` into files in `folder`. dtype: safetensors' name, None keeps the source's.

    Raises InputError as `check_coverage` does, and when tensors that Megatron fuses differ in dtype.
    """
    check_coverage(source)
    rules = weight_rules(source.model)
    if isinstance(source, HFSource):
        specs = megatron_specs(rules, source.specs, dtype=dtype)
        stacks = [key for key, rule in rules.items() if rule.stack]
        layout = plan_checkpoint(specs, folder, stacks=stacks, max_shard_bytes=max_shard_bytes)
        sources = {name: source.stored[name] for rule in rules.values() for name in rule.hf}
        targets = {key: as_rows(rules[key], target) for key, target in layout.tensors.items()}
    else:
        specs = {name: st.TensorSpec(dtype or spec.dtype, spec.shape) for name, spec in source.specs.items()}
        layout = _safetensors_plan(specs, folder, max_shard_bytes=max_shard_bytes)
        whole = {name for rule in rules.values() if rule.packed for name in rule.hf}
        sources = source.rows
        targets = {name: target.merged() if name in whole else target for name, target in layout.tensors.items()}
    transfer = Transfer(rules, isinstance(source, HFSource), sources, source.scales, targets, [])
    transfer.tasks.extend(
        task for name, target in targets.items() for task in _tasks(name, target, unit=transfer.expert_rows(name))
    )
    return transfer, layout


def megatron_specs(
    rules: Mapping[str, TensorRule], specs: Mapping[str, st.TensorSpec], *, dtype: str | None
) -> dict[str, st.TensorSpec]:
    """The global tensors that Hugging Face's make. Raises InputError when fused ones differ in dtype or width."""
    fused = {}
    for key, rule in rules.items():
        parts = [specs[name] for name in rule.hf]
        kinds = {dtype or part.dtype for part in parts}
        if len(kinds) > 1:
            found = {part.dtype: f"{name} {part.dtype}" for name, part in zip(rule.hf, parts, strict=True)}
            raise InputError(
                f"{', '.join(found.values())}: Megatron fuses these, so they need one dtype; choose one with --dtype"
            )
        fused[key] = st.TensorSpec(kinds.pop(), rule.global_shape([part.shape for part in parts]))
    return fused


def _tasks(name: str, target: Stored, *, unit: int) -> Iterator[Task]:
    """unit: rows that are read together, and so should not be cut."""
    for number, block in enumerate(target.blocks):
        start = block.offset[0]
        step = max(1, TASK_BYTES // (unit * target.row_bytes or 1)) * unit
        for first in range(start, start + block.shape[0], step):
            yield Task(name, number, first, min(first + step, start + block.shape[0]))


def _safetensors_plan(specs: Mapping[str, st.TensorSpec], folder: Path, *, max_shard_bytes: int) -> CheckpointPlan:
    output = st.plan_output(specs, max_shard_bytes=max_shard_bytes)
    plan = CheckpointPlan(sizes=dict(output.sizes), fixed=[(name, 0, head) for name, head in output.files.items()])
    for name, spec in specs.items():
        file, start = output.places[name]
        shape = spec.shape or (1,)
        plan.tensors[name] = Stored(spec.dtype, shape, (Block(folder / file, start, (0,) * len(shape), shape),))
    if output.index is not None:
        plan.small[st.INDEX] = st.index_text(output.index).encode()
    return plan
