"""`mcore-swift verify`: are two models the same? Exact, under Hugging Face names, whatever they are stored in.

Tensors can't show everything: RoPE's base and scaling, the norms' epsilon, a sliding window live in config.json only,
so the configurations are compared too, and `--logits` runs both models. The exit code says it: 0 the same, 1 not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_tools.difference import Difference, check_dtypes, distance, explain, index_of
from mcore_swift.errors import EXIT_FAILED, InputError

if TYPE_CHECKING:
    from ckpt_tools.logits import LogitsReport
    from ckpt_tools.source import TensorSource

# config.json keys that don't change logits. Every other key counts, also one that is not known here.
# tie_word_embeddings does, but that shows in the tensors.
COSMETIC = {
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "_name_or_path",
    "initializer_range",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "max_position_embeddings",
    "pretraining_tp",
    "quantization_config",
    "tie_word_embeddings",
}
EXPLAINED = 40  # differences whose cause is looked for: each costs reading a few tensors again
SHOWN = 20  # lines of differences on the screen; JSON has them all


@dataclass(frozen=True)
class Report:
    """What `verify` found; equal when there are no differences and the logits, if compared, keep to their limits."""

    a: str
    b: str
    tensors: int  # compared
    elements: int
    differing_elements: int
    max_ulp: int
    worst: str  # the tensor with the largest difference in ulp
    differences: list[Difference] = field(default_factory=list)
    logits: LogitsReport | None = None

    @property
    def equal(self) -> bool:
        return not self.differences and (self.logits is None or not self.logits.failures)


def verify(
    *,
    a: Path,
    b: Path,
    any_dtype: bool = False,
    max_ulp: int = 0,
    config: Path | None = None,
    logits: bool = False,
    text: Path | None = None,
    windows: int = 4,
    window_length: int = 256,
    max_difference: float = 1e-5,
    min_top1: float = 1.0,
    max_kl: float = 1e-8,
    as_json: bool = False,
) -> int:
    """Compares two models, prints the result, and returns the exit code: 0 the same, 1 not.

    config: a Hugging Face folder with the configuration of a Megatron checkpoint that holds none.
    Raises InputError for what is no model, and for a text that is too short.
    """
    if logits != (text is not None):
        raise InputError("--logits and --text FILE go together: logits are compared on a text")
    source_a, source_b = _open(a, config), _open(b, config)
    tokens = None
    if text is not None:
        from ckpt_tools.logits import read_windows

        tokens = read_windows(text, source_a, source_b, windows=windows, length=window_length)
    report = compare(source_a, source_b, any_dtype=any_dtype, max_ulp=max_ulp)
    if tokens is not None:
        report = _with_logits(report, source_a, source_b, tokens, max_difference, min_top1, max_kl)
    if as_json:
        print(json.dumps(asdict(report) | {"equal": report.equal}, indent=1))
    else:
        print_report(report)
    return 0 if report.equal else EXIT_FAILED


def _open(path: Path, config: Path | None) -> TensorSource:
    from ckpt_tools.source import open_source
    from ckpt_tools.torch_dist import checkpoint_folder

    folder = checkpoint_folder(path) if path.is_dir() else path
    lacks_config = (folder / ".metadata").is_file() and not (folder / "hf" / "config.json").is_file()
    return open_source(path, config=config if lacks_config else None)


def _with_logits(
    report: Report, a: TensorSource, b: TensorSource, tokens: Any, max_difference: float, min_top1: float, max_kl: float
) -> Report:
    from ckpt_tools.logits import Limits, compare_logits

    unusable = [item for item in report.differences if item.kind in ("missing", "extra", "shape", "non-finite")]
    if unusable:
        print(f"mcore-swift: logits are not compared: {unusable[0]}", file=sys.stderr)
        return report
    return replace(report, logits=compare_logits(a, b, tokens, Limits(max_difference, min_top1, max_kl)))


# --- tensors ----------------------------------------------------------------------------------------------------------


def compare(a: TensorSource, b: TensorSource, *, any_dtype: bool = False, max_ulp: int = 0) -> Report:
    """Compares names, shapes, dtypes and values of all tensors, and the configurations. Holds one pair at a time.

    any_dtype: dtypes may differ, values are compared after rounding to the coarser. max_ulp: what is still the same.
    """
    found = [*compare_configs(a, b), *_compare_names(a, b), *_strangers(a, "A"), *_strangers(b, "B")]
    tensors = elements = differing = most = 0
    worst = ""
    for label, name_a, name_b in _pairs(a, b):
        items = list(_compare_pair(label, (a, name_a), (b, name_b), any_dtype=any_dtype, max_ulp=max_ulp))
        tensors += 1
        elements += _count(a, name_a)
        for item in items:
            differing += item.elements
            if item.ulp > most:
                most, worst = item.ulp, item.name
        found += [item for item in items if item.kind != "values" or item.ulp > max_ulp]
    fused = {name: rule.hf for rule in _rules(a).values() for name in rule.hf}
    differing_names = {item.name for item in found}
    explained = [
        explain(item, a, b, fused=fused, differing=differing_names) if item.kind in ("values", "shape") else item
        for item in found[:EXPLAINED]
    ]
    return Report(str(a.path), str(b.path), tensors, elements, differing, most, worst, explained + found[EXPLAINED:])


def _rules(source: TensorSource) -> Mapping[str, Any]:
    from mcore_swift.models.keys import weight_rules

    return weight_rules(source.model)


def _count(source: TensorSource, name: str) -> int:
    count = 1
    for size in source.specs[name].shape:
        count *= size
    return count


def _embedding(source: TensorSource) -> tuple[str, str]:
    """Hugging Face names of the embedding and of the output layer."""
    names = {rule.mcore: rule.hf for rule in source.model.family.rules}
    return str(names["embedding.weight"]), str(names["head.weight"])


def _head(source: TensorSource) -> str:
    """The tensor that is the output layer: the embedding's, when they are tied."""
    embedding, head = _embedding(source)
    return embedding if source.model.tied else head


def _compare_names(a: TensorSource, b: TensorSource) -> Iterator[Difference]:
    for kind, one, other, where in (("missing", a, b, "B"), ("extra", b, a, "A")):
        optional = {_embedding(one)[1]} if one.model.tied or other.model.tied else set()
        for name in one.specs:
            if name not in other.specs and name not in optional:
                yield Difference(name, kind, f"{kind}: it is not in {where}")


def _strangers(source: TensorSource, letter: str) -> Iterator[Difference]:
    """Tensors of a Megatron checkpoint that no rule knows: they have no Hugging Face name to be compared under."""
    known = _rules(source)
    for key in source.stored if source.kind == "megatron" else ():
        if key not in known:
            yield Difference(key, "extra", f"extra: the model that {letter}'s config describes has no such tensor")


def _pairs(a: TensorSource, b: TensorSource) -> Iterator[tuple[str, str, str]]:
    """What is to be the same: (label, name in A, name in B)."""
    heads = {_embedding(a)[1], _embedding(b)[1]}
    for name in a.specs:
        if name in b.specs and name not in heads:
            yield name, name, name
    label = _embedding(a)[1]
    if _head(a) in a.specs and _head(b) in b.specs and (_head(a) == label or _head(b) == label):
        yield label, _head(a), _head(b)


def _compare_pair(
    label: str, one: tuple[TensorSource, str], two: tuple[TensorSource, str], *, any_dtype: bool, max_ulp: int
) -> Iterator[Difference]:
    (a, name_a), (b, name_b) = one, two
    spec_a, spec_b = a.specs[name_a], b.specs[name_b]
    where = "" if name_a == name_b else f" ({name_a} of A, {name_b} of B)"
    if spec_a.shape != spec_b.shape:
        yield Difference(label, "shape", f"shape {list(spec_a.shape)} in A, {list(spec_b.shape)} in B{where}")
        return
    if spec_a.dtype != spec_b.dtype and not any_dtype:
        yield Difference(label, "dtype", f"{spec_a.dtype} in A, {spec_b.dtype} in B{where} (--any-dtype allows it)")
    check_dtypes(a, name_a)
    check_dtypes(b, name_b)
    apart = distance(a.read(name_a), b.read(name_b))
    for letter, bad in (("A", apart.bad_a), ("B", apart.bad_b)):
        if bad:
            yield Difference(label, "non-finite", f"{bad:,} NaN or infinite values in {letter}")
    if apart.elements:
        total = _count(a, name_a)
        worst = index_of(apart.worst, spec_a.shape)
        message = (
            f"{apart.elements:,} of {total:,} elements differ{where}, the worst by {apart.ulp:,} ulp at {list(worst)}"
        )
        yield Difference(label, "values", message, apart.elements, total, apart.ulp, worst)


# --- configuration ----------------------------------------------------------------------------------------------------


def compare_configs(a: TensorSource, b: TensorSource) -> Iterator[Difference]:
    """The keys of config.json that change the mathematics and differ, and tied embeddings that are saved twice."""
    ours, theirs = (dict(_flat(source.model.config.to_dict())) for source in (a, b))
    for key in dict.fromkeys([*ours, *theirs]):
        if key.split(".")[0] not in COSMETIC and ours.get(key) != theirs.get(key):
            message = f"{ours.get(key)!r} in A, {theirs.get(key)!r} in B: tensors don't show it, but logits differ"
            yield Difference(f"config.json: {key}", "config", message)
    for letter, source in (("A", a), ("B", b)):
        embedding, head = _embedding(source)
        if source.model.tied and head in source.specs and embedding in source.specs:
            for item in _compare_pair(head, (source, embedding), (source, head), any_dtype=True, max_ulp=0):
                message = f"{letter} ties its embeddings, but saved another {head} too: {item.message}"
                yield Difference(head, item.kind, message.replace(" of A", "").replace(" of B", ""), item.elements)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# --- what a person sees -----------------------------------------------------------------------------------------------


def print_report(report: Report) -> None:
    print(f"A: {report.a}\nB: {report.b}")
    for item in report.differences[:SHOWN]:
        print(f"  {item}")
    if len(report.differences) > SHOWN:
        print(f"  … and {len(report.differences) - SHOWN} more (--json lists them)")
    print(f"{report.tensors:,} tensors, {report.elements:,} elements compared: ", end="")
    if report.differing_elements:
        print(f"{report.differing_elements:,} elements differ, the worst by {report.max_ulp:,} ulp, in {report.worst}")
    else:
        print("all values are equal")
    if report.logits is not None:
        print(report.logits)
    print("the same" if report.equal else "NOT the same")
