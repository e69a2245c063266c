"""The weights of a running model: each rank reads its own shards from a Hugging Face folder, all ranks write one.

Everything speaks of Megatron's global tensors: `local_shards` asks the model which part of which global tensor this
rank holds, the rules say which Hugging Face tensors those rows are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mcore_swift import parallel
from mcore_swift.errors import InputError
from mcore_swift.weights import mxfp4
from mcore_swift.weights import safetensors_io as io
from mcore_swift.weights.coverage import Spec, hf_misfits
from mcore_swift.weights.rules import TensorRule

if TYPE_CHECKING:
    from torch.nn import Module

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
ADAPTERS = "adapters."  # how the global keys of adapters begin
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)  # buffers that old Hugging Face folders carry

# What fills a parameter: it calls the given function with the tensor that is to be written, of the parameter's shape,
# once, whatever that function raises (filling may be a collective call).
Write = Callable[[torch.Tensor], None]
Fill = Callable[[torch.Tensor, Write], None]


@dataclass(frozen=True)
class Shard:
    """This rank's part of one global tensor: `data` is a view whose first element sits at `offset`.

    Of a tensor that stacks experts, shape and offset are those within the slice of `expert`.
    """

    key: str
    expert: int | None
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    data: torch.Tensor
    main: bool  # False: the same part is held elsewhere too (tied embedding of the last stage)


def sharded_state(chunk: Module) -> dict[str, Any]:
    """Megatron's sharded state of one model chunk, with one key a layer: stacked layers would have other keys in an
    uneven pipeline."""
    # A new dict each time: Megatron keeps the data parallel group in it, and would use it in the next layout too.
    return chunk.sharded_state_dict(metadata={"non_homogeneous_layers": True})  # type: ignore[operator]


def global_tensors(chunks: Sequence[Module]) -> Iterator[Any]:
    """Megatron's descriptions of the model's tensors on this rank, in model order; `data` is parameter or buffer."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    for chunk in chunks:
        for item in sharded_state(chunk).values():
            if isinstance(item, ShardedTensor | ShardedTensorFactory) and not item.key.startswith(ADAPTERS):
                yield item  # not Transformer Engine's extra state, nor what is no part of the model itself


def shards_of(item: Any, data: torch.Tensor) -> list[Shard]:
    """The shards of one of the `global_tensors`, as views of `data`: one, or two where a gated fc1 is cut in halves."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    item = replace(item, data=data)
    parts = nested_values(item.build()) if isinstance(item, ShardedTensorFactory) else [item]
    return [_shard(part) for part in parts]


def local_shards(
    chunks: Sequence[Module], *, value: Callable[[torch.Tensor], torch.Tensor | None] = lambda parameter: parameter.data
) -> list[Shard]:
    """This rank's shards of the global tensors, in model order.

    `value` gives the tensor that stands for a parameter or buffer, of the same shape: its data, or its gradient; None
    leaves it out.
    """
    values = ((item, value(item.data)) for item in global_tensors(chunks))
    return [shard for item, data in values if data is not None for shard in shards_of(item, data)]


def _shard(item: Any) -> Shard:
    replica = item.replica_id if isinstance(item.replica_id, tuple) else (item.replica_id,)
    stacked: int = item.prepend_axis_num
    assert stacked in (0, 1), item.key
    return Shard(
        key=item.key,
        expert=item.global_offset[0] if stacked else None,
        global_shape=tuple(item.global_shape[stacked:]),
        offset=tuple(item.global_offset[stacked:]),
        data=item.data,
        main=replica[0] == 0,
    )


def rule_of(shard: Shard, rules: Mapping[str, TensorRule]) -> TensorRule:
    """The rule of a shard's tensor, or of its slice in a stack of experts."""
    rule = rules[shard.key]
    return rule if shard.expert is None else rule.of_expert(shard.expert)


# --- reading ----------------------------------------------------------------------------------------------------------


def decoded(folder: io.SafetensorsFolder) -> Mapping[str, Spec]:
    """The folder's tensors from its headers, MXFP4 as what it decodes to."""
    specs = mxfp4.decoded_specs(folder.entries, folder.folder)
    stored = {name + end for name in specs for end in (mxfp4.BLOCKS, mxfp4.SCALES)}
    return {name: entry for name, entry in folder.entries.items() if name not in stored} | specs


def check_coverage(
    rules: Mapping[str, TensorRule], folder: io.SafetensorsFolder, *, tied: bool, spare: Collection[str] = ()
) -> None:
    """Every tensor that the rules need is there, in the right shape, and nothing else is. Reads only headers.

    `spare`: tensors that may be there for nothing. Raises InputError that lists every tensor that is missing,
    unexpected or mis-shaped (up to ten of each).
    """
    ignored = [*spare, *(name for name in folder.entries if name.endswith(IGNORED_SUFFIXES))]
    misfits = hf_misfits(
        rules, decoded(folder), dtypes=DTYPES, ignored=[*ignored, "lm_head.weight"] if tied else ignored
    )
    if misfits:
        raise InputError(f"{folder.folder}: the tensors do not fit the config: {misfits.text(limit=10)}")


def in_place(parameter: torch.Tensor, write: Write) -> None:
    """The plain `Fill`: what is read goes into the parameter itself."""
    write(parameter.data)


def load(
    chunks: Sequence[Module],
    rules: Mapping[str, TensorRule],
    folder: io.SafetensorsFolder,
    *,
    tied: bool,
    fill: Fill = in_place,
    spare: Collection[str] = (),
    optional: Collection[str] = (),
) -> None:
    """Fills the model from a Hugging Face folder; this rank reads the byte ranges of its own shards only.

    Rows that pad the vocabulary become 0. `spare`: tensors of the folder that are left out; `optional`: global keys of
    tensors that stay what they are where the folder hasn't got them. Raises InputError for missing, extra, mis-shaped
    or non-finite tensors.
    """
    lacking = {key for key in optional if key in rules and rules[key].hf[0] not in folder.entries}
    rules = {key: rule for key, rule in rules.items() if key not in lacking}
    check_coverage(rules, folder, tied=tied, spare=spare)
    vocab_size: int = chunks[0].true_vocab_size  # type: ignore[assignment]
    specs = decoded(folder)
    packed = lru_cache(maxsize=1)(partial(_read_packed, folder))  # gate and up are two shards of one slice
    errors: list[InputError] = []

    def write(item: Any, data: torch.Tensor) -> None:
        for shard in () if errors else shards_of(item, data):
            rule = rule_of(shard, rules)
            if rule.packed:
                _check_packed(rules[shard.key], shard, specs, folder)
                inside = (slice(o, o + n) for o, n in zip(shard.offset, shard.data.shape, strict=True))
                shard.data.copy_(packed(rule)[tuple(inside)])
            else:
                load_shard(shard, rule, folder, vocab_size=vocab_size)

    with torch.no_grad():
        for item in (item for item in global_tensors(chunks) if item.key not in lacking):
            try:
                fill(item.data, partial(write, item))
            except InputError as problem:  # perhaps only this rank reads the tensor that is wrong: raise it together
                errors.append(problem)
    parallel.raise_together(errors[0] if errors else None)


def load_shard(shard: Shard, rule: TensorRule, folder: io.SafetensorsFolder, *, vocab_size: int) -> None:
    """Fills a shard from the folder's tensors that `rule` names; rows that pad the vocabulary become 0."""
    shapes = [folder.entries[name].shape for name in rule.hf]
    rows = sum(shape[0] for shape in shapes if shape)
    needed = (vocab_size if rule.vocabulary else shard.global_shape[0], *shard.global_shape[1:])
    if any((rows, *shape[1:]) != needed for shape in shapes):
        found = ", ".join(str(list(shape)) for shape in shapes)
        raise InputError(f"{folder.folder}: {' + '.join(rule.hf)}: shape {found} where the config needs {list(needed)}")
    start = min(shard.offset[0], rows)
    stop = min(shard.offset[0] + shard.data.size(0), rows)
    inner = tuple(slice(o, o + n) for o, n in zip(shard.offset[1:], shard.data.shape[1:], strict=True))
    shard.data[stop - start :] = 0
    segments: dict[int, list[tuple[int, int, int]]] = {}
    for part, first, last, target in rule.segments(start, stop, tuple(shape[0] for shape in shapes)):
        segments.setdefault(part, []).append((first, last, target))
    for part, pieces in segments.items():
        low, high = min(p[0] for p in pieces), max(p[1] for p in pieces)  # contiguous: whole groups of one part
        block = _read_finite(folder, rule.hf[part], slice(low, high), *inner)
        _check_copies(rule, block, folder, slice(low, high), *inner)
        for first, last, target in pieces:
            shard.data[target : target + last - first] = block[first - low : last - low]


def _check_copies(rule: TensorRule, block: torch.Tensor, folder: io.SafetensorsFolder, *slices: slice) -> None:
    """What Megatron holds once must be the same wherever the folder has it: which one counts is nobody's guess."""
    for name in rule.copies:
        if not bool((folder.read(name, *slices) == block).all()):
            raise InputError(
                f"{folder.folder}: tensor {name} differs from {rule.hf[0]}; Megatron-Core shares it with the layers of"
                " multi-token prediction, so the two must be equal"
            )


def _read_finite(folder: io.SafetensorsFolder, name: str, *slices: slice) -> torch.Tensor:
    return _finite(folder.read(name, *slices), name, folder)


def _finite(block: torch.Tensor, name: str, folder: io.SafetensorsFolder) -> torch.Tensor:
    if not bool(torch.isfinite(block).all()):
        raise InputError(f"{folder.folder}: tensor {name} has NaN or infinite values")
    return block


def _check_packed(rule: TensorRule, shard: Shard, specs: Mapping[str, Spec], folder: io.SafetensorsFolder) -> None:
    found, (needed,) = specs[rule.hf[0]].shape, rule.hf_shapes((rule.stack, *shard.global_shape))
    if found != needed:
        raise InputError(f"{folder.folder}: {rule.hf[0]}: shape {list(found)} where the config needs {list(needed)}")


def _read_packed(folder: io.SafetensorsFolder, rule: TensorRule) -> torch.Tensor:
    """The slice of a stack's global tensor that `rule` is about, whole; MXFP4 decoded."""
    assert rule.expert is not None
    (name,), own = rule.hf, slice(rule.expert, rule.expert + 1)
    if name in folder.entries:
        return rule.unpack(_read_finite(folder, name, own)[0])
    blocks, scales = (folder.read(name + end, own)[0] for end in (mxfp4.BLOCKS, mxfp4.SCALES))
    return rule.unpack(_finite(mxfp4.decode_mxfp4(blocks, scales).T, name, folder))


# --- writing ----------------------------------------------------------------------------------------------------------


def hf_specs(
    rules: Mapping[str, TensorRule],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    vocab_size: int,
    dtype: Callable[[str], str],
) -> dict[str, io.TensorSpec]:
    """Shape and dtype of every Hugging Face tensor of the model, from Megatron's (as `global_shapes` gives them)."""
    specs = {}
    for key, rule in rules.items():
        shape = (vocab_size, *shapes[key][1:]) if rule.vocabulary else shapes[key]
        for name, own in zip(rule.hf, rule.hf_shapes((rule.stack, *shape) if rule.stack else shape), strict=True):
            specs[name] = io.TensorSpec(dtype(name), own)
        specs |= {name: io.TensorSpec(dtype(name), specs[rule.hf[0]].shape) for name in rule.copies}
    return specs


def global_shapes(chunks: Sequence[Module]) -> dict[str, tuple[int, ...]]:
    """Global shapes of all the model's tensors (of a stack of experts: one slice's), from all pipeline stages."""
    mine = {shard.key: shard.global_shape for shard in local_shards(chunks)}
    every: list[Any] = [None] * dist.get_world_size(parallel.pp_group())
    dist.all_gather_object(every, mine, group=parallel.pp_group())
    return {key: shape for part in every for key, shape in part.items()}


def hf_tensors(
    chunks: Sequence[Module],
    rules: Mapping[str, TensorRule],
    *,
    vocab_size: int,
    value: Callable[[torch.Tensor], torch.Tensor | None] = lambda parameter: parameter.data,
) -> Iterator[tuple[str, torch.Tensor, int | None]]:
    """Whole tensors under their Hugging Face names, each yielded by one rank of the job, on the CPU.

    Of a tensor that packs all experts, each expert's slice comes by itself, with the expert's number as the third item.

    A collective call over each TP group, and each expert-TP group. A tensor is gathered to one rank of its stage;
    tensors go round the ranks that hold the same parts of it in turn, so that all of them share the work and no rank
    holds more than one tensor.
    """
    dense, experts = parallel.weight_groups(), parallel.expert_weight_groups()
    outlines = [(item, shards_of(item, item.data.detach())[0]) for item in global_tensors(chunks)]
    for number, (item, first) in enumerate((item, first) for item, first in outlines if first.main):
        group, replicas = dense if first.expert is None else experts
        copies = dist.get_world_size(replicas)
        if number % copies != dist.get_rank(replicas):
            continue
        data = value(item.data)  # only now: it may be made for the purpose, and as large as the layer
        if data is None:
            continue
        shards = shards_of(item, data)
        whole = gather(shards, (number // copies) % dist.get_world_size(group), group)
        if whole is not None:
            rule = rule_of(shards[0], rules)
            yield from ((name, tensor, rule.expert) for name, tensor in _split(whole, rule, vocab_size))


def gather(shards: list[Shard], owner: int, group: dist.ProcessGroup) -> torch.Tensor | None:
    """Puts a global tensor together on TP rank `owner`; None elsewhere."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    shape = shards[0].global_shape
    if shards[0].data.shape == shape:  # replicated, or TP 1
        return shards[0].data.cpu() if rank == owner else None
    offsets: list[Any] = [None] * size
    dist.all_gather_object(offsets, [shard.offset for shard in shards], group=group)
    whole = torch.empty(shape, dtype=shards[0].data.dtype) if rank == owner else None
    for index, shard in enumerate(shards):
        local = shard.data.contiguous()
        parts = [torch.empty_like(local) for _ in range(size)] if rank == owner else None
        dist.gather(local, parts, group=group, group_dst=owner)
        for place, part in zip(offsets, parts or (), strict=False):
            assert whole is not None
            whole[tuple(slice(o, o + n) for o, n in zip(place[index], part.shape, strict=True))] = part.cpu()
    return whole


def _split(whole: torch.Tensor, rule: TensorRule, vocab_size: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The inverse of the layout: one global tensor → its Hugging Face tensors."""
    if rule.packed:
        yield rule.hf[0], rule.pack(whole)
        return
    if not rule.rows:
        yield from ((name, whole[:vocab_size] if rule.vocabulary else whole) for _, name in rule.parts())
        return
    blocks = whole.reshape(rule.groups, -1, *whole.shape[1:]).split([rows // rule.groups for rows in rule.rows], dim=1)
    for name, block in zip(rule.hf, blocks, strict=True):
        yield name, block.reshape(-1, *whole.shape[1:])


def save(
    chunks: Sequence[Module],
    rules: Mapping[str, TensorRule],
    folder: Path,
    *,
    vocab_size: int,
    dtype: Callable[[str], str],
    max_shard_bytes: int = 5 * 10**9,
    value: Callable[[torch.Tensor], torch.Tensor] = lambda parameter: parameter.data,
) -> None:
    """Writes the model's weights as safetensors into `folder` (there, empty, shared by all ranks), all ranks together.

    `dtype` gives each Hugging Face tensor's dtype in safetensors' naming; `value` the tensor that stands for a
    parameter. A full disk raises OSError on all ranks.
    """
    specs = hf_specs(rules, global_shapes(chunks), vocab_size=vocab_size, dtype=dtype)
    plan = io.plan_output(specs, max_shard_bytes=max_shard_bytes)
    parallel.on_first_rank(lambda: io.create_files(folder, plan))
    error: OSError | None = None
    for name, tensor, expert in hf_tensors(chunks, rules, vocab_size=vocab_size, value=value):
        try:
            if error is None:
                io.write_tensor(folder, plan, name, tensor.to(DTYPES[specs[name].dtype]), index=expert)
        except OSError as problem:  # the others are waiting in the next gather: go on, and raise together
            error = problem
    parallel.raise_together(error)
