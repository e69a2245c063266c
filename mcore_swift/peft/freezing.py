"""Training a part of the model: which tensors stay as they are, told in Hugging Face names.

What is frozen needs no gradient: Megatron computes none, holds no buffer for one, and its optimizer keeps no state.
Everything is decided from the weight rules of the whole model, so all ranks agree. Megatron fuses some of Hugging
Face's tensors (q, k and v; gate and up): these are trained, or frozen, together.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mcore_swift import parallel
from mcore_swift.errors import InputError, nearest
from mcore_swift.recipe import ModelSection
from mcore_swift.weights.rules import TensorRule

# A tensor of the model: its global key, and the expert's number in a stack of experts.
TensorKey = tuple[str, int | None]


def frozen_tensors(rules: Mapping[str, TensorRule], section: ModelSection) -> set[TensorKey]:
    """What is left as it is: all that `trainable` doesn't name (if it names anything), and all that `freeze` names.

    Each names tensors as `matches` says; layers of multi-token prediction that are only kept are no choice. Raises
    InputError for a glob that matches nothing, for tensors that are one in Megatron and are not treated alike, and if
    nothing is left to train.
    """
    kept = "mtp." if not section.mtp_loss_scale else " "
    tensors = {key: rule.hf for key, rule in _tensors(rules) if not key[0].startswith(kept)}
    every = [name for names in tensors.values() for name in names]
    named = _chosen(section.trainable, every, "trainable") if section.trainable else set(every)
    trained = named - _chosen(section.freeze, every, "freeze")
    if not trained:
        raise InputError("model.trainable, model.freeze: together they leave nothing to train")
    for key, names in tensors.items():
        own = [name for name in names if name in trained]
        if own and len(own) < len(names):
            others = [name for name in names if name not in trained]
            raise InputError(
                f"model.trainable, model.freeze: {own[0]} would be trained and {others[0]} not, but Megatron holds"
                f" them as one tensor ({key[0]}); name both, or none"
            )
    frozen = {key for key, names in tensors.items() if names[0] not in trained}
    _check_biases(tensors, frozen)
    return frozen


def _check_biases(tensors: Mapping[TensorKey, tuple[str, ...]], frozen: set[TensorKey]) -> None:
    """A bias's gradient is a by-product of its weight's: Megatron 0.19.2 and Transformer Engine 2.20 give none to a
    bias inside a linear layer whose weight is frozen, and say nothing."""
    for (key, expert), names in tensors.items():
        weight = (f"{key.removesuffix('bias')}weight", expert)
        if key.endswith(".bias") and (key, expert) not in frozen and weight in frozen:
            raise InputError(
                f"model.trainable, model.freeze: {names[0]} would be trained and {tensors[weight][0]} not, but a bias"
                " gets no gradient without its weight's; train both, or neither"
            )


def _tensors(rules: Mapping[str, TensorRule]) -> Iterator[tuple[TensorKey, TensorRule]]:
    """The model's tensors; of a stack of experts, each expert's by itself unless Hugging Face packs them in one."""
    for key, rule in rules.items():
        if rule.stack and not rule.packed:
            yield from (((key, expert), rule.of_expert(expert)) for expert in range(rule.stack))
        else:
            yield (key, None), rule


def _chosen(globs: Sequence[str], names: Sequence[str], field: str) -> set[str]:
    chosen: set[str] = set()
    for glob in globs:
        found = {name for name in names if matches(glob, name)}
        if not found:
            modules = list(dict.fromkeys(name.rsplit(".", 1)[0] for name in names))
            words = [*dict.fromkeys(name.rsplit(".", 1)[-1] for name in modules), *modules, *names]
            raise InputError(
                f"model.{field}: {glob!r} matches no tensor of this model;{nearest(glob, words)} allowed: a tensor's"
                f" name ({names[0]}), its module's, the last word of that, or a glob such as model.layers.2*.mlp.*"
            )
        chosen |= found
    return chosen


def matches(glob: str, name: str) -> bool:
    """Whether `glob` names the tensor: by its whole name or its module's, as a glob, or by its module's last word."""
    module = name.rsplit(".", 1)[0]
    return glob == module.rsplit(".", 1)[-1] or any(fnmatch.fnmatchcase(text, glob) for text in (name, module))


def freeze(chunks: Sequence[Any], frozen: set[TensorKey], *, recomputed: bool) -> None:
    """Freezes these tensors of a running model, before Megatron's DDP wraps it. Called by all ranks.

    `recomputed`: activations are, so that the first layers' inputs must ask for a gradient. Raises InputError, on all
    ranks, for experts that share a grouped matrix product and are not treated alike.
    """
    from mcore_swift.peft.adapters import make_first_activation_differentiable

    error: InputError | None = None
    for chunk in chunks:
        for key, parameter in _parameters(chunk):
            if key in frozen or (key[0], None) in frozen:
                parameter.requires_grad_(False)
        # Ranks without a trained expert take part in the others' exchanges in the backward pass.
        if recomputed or chunk.config.expert_model_parallel_size > 1:
            make_first_activation_differentiable(chunk)
        error = error or _mixed_groups(chunk)
    parallel.raise_together(error)


def _parameters(chunk: Any) -> Iterator[tuple[TensorKey, Any]]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    from mcore_swift.weights.live import sharded_state

    for item in sharded_state(chunk).values():
        if isinstance(item, ShardedTensor | ShardedTensorFactory):
            shard: Any = next(iter(nested_values(item.build()))) if isinstance(item, ShardedTensorFactory) else item
            yield (item.key, shard.global_offset[0] if shard.prepend_axis_num else None), item.data


def _mixed_groups(chunk: Any) -> InputError | None:
    """Transformer Engine asks the first expert of a grouped product whether the weights need gradients."""
    for name, module in chunk.named_modules():
        if hasattr(module, "num_gemms"):
            wanted = {parameter.requires_grad for parameter in module.parameters(recurse=False)}
            if len(wanted) > 1:
                return InputError(
                    f"model.trainable, model.freeze: some experts of {name} would be trained and others not, but they"
                    " share one grouped matrix product; name all of a layer, or set moe.grouped: false"
                )
    return None
