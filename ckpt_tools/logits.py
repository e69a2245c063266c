"""Two models' logits on real text: what no comparison of tensors can show.

A Megatron checkpoint runs through Megatron-Core, a Hugging Face folder through transformers. When both are Hugging
Face folders, B runs through Megatron-Core: so `verify X X --logits` proves that the layers built for X's family are
transformers' own. Everything is float32 on the CPU, one window at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_swift.errors import InputError

if TYPE_CHECKING:
    import torch

    from ckpt_tools.source import TensorSource

# The logits of one window: int64 [length] → float32 [length, vocabulary].
Forward = Callable[["torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True)
class Limits:
    """max_difference: relative to the largest |logit| of A; min_top1: a share; max_kl: nats, at the worst position."""

    max_difference: float
    min_top1: float
    max_kl: float


@dataclass(frozen=True)
class LogitsReport:
    """Differences of logits over all positions, KL(A‖B) in nats, and what does not keep to the limits."""

    engine_a: str
    engine_b: str
    positions: int
    max_difference: float
    mean_difference: float
    relative: float  # max_difference / max |logit of A|
    top1: float
    mean_kl: float
    max_kl: float
    worst_position: tuple[int, int]  # window, position in it
    failures: list[str]
    per_position: list[dict[str, float]] = field(default_factory=list)  # of all windows, in order

    def __str__(self) -> str:
        window, position = self.worst_position
        lines = [
            f"logits at {self.positions:,} positions, A through {self.engine_a}, B through {self.engine_b}:",
            f"  difference  max {self.max_difference:.2e} ({self.relative:.2e} of the largest logit)"
            f" at window {window}, position {position}; mean {self.mean_difference:.2e}",
            f"  top-1       {self.top1:.4%} the same",
            f"  KL(A‖B)     max {self.max_kl:.2e}, mean {self.mean_kl:.2e} nats",
            *(f"  failed: {failure}" for failure in self.failures),
        ]
        return "\n".join(lines)


def read_windows(path: Path, a: TensorSource, b: TensorSource, *, windows: int, length: int) -> torch.Tensor:
    """The first `windows` pieces of `length` tokens of the text, int64 [windows, length].

    A .jsonl file gives the texts of its rows, one after another; another file is one text. The tokenizer is A's, or B's
    where A has none. Raises InputError for a file that can't be read or is too short, a folder without tokenizer, and
    models without logits.
    """
    import torch

    for source in (a, b):
        if source.model.scored:
            raise InputError(f"{source.path}: a {source.model.raw['architectures'][0]} gives scores and has no logits")
    text = _read_text(path)
    ids = _tokenizer(a, b)(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < windows * length:
        raise InputError(
            f"{path}: the text has {len(ids):,} tokens, but {windows} windows of {length} need {windows * length:,};"
            " name a longer text, or fewer or shorter windows"
        )
    tokens = torch.tensor(ids[: windows * length]).view(windows, length)
    for source in (a, b):
        config = source.model.config
        if int(tokens.max()) >= config.vocab_size:
            raise InputError(
                f"{source.path}: the tokenizer gives token {int(tokens.max())}, the vocabulary has {config.vocab_size}"
            )
        if length > config.max_position_embeddings:
            raise InputError(
                f"--window-length: {length} tokens are more than the {config.max_position_embeddings} of {source.path}"
            )
    return tokens


def _read_text(path: Path) -> str:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read as UTF-8 text: {error}") from None
    if path.suffix != ".jsonl":
        return content
    texts = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            texts.append(json.loads(line)["text"])
            assert isinstance(texts[-1], str)
        except (ValueError, KeyError, TypeError, AssertionError):
            raise InputError(f'{path}: line {number}: not a row with a text: expected {{"text": "…"}}') from None
    return "".join(texts)


def _tokenizer(a: TensorSource, b: TensorSource) -> Any:
    from mcore_swift.data.tokenizer import TOKENIZER_FILES, load_tokenizer

    for source in (a, b):
        if any((source.model.tokenizer / name).is_file() for name in TOKENIZER_FILES):
            return load_tokenizer(source.model.tokenizer)
    raise InputError(f"{a.path}: neither here nor in {b.path} is a tokenizer; logits are compared on its tokens")


def compare_logits(a: TensorSource, b: TensorSource, windows: torch.Tensor, limits: Limits) -> LogitsReport:
    """Runs both models over `windows`, int64 [windows, length]; holds one window's logits and both models."""
    import torch

    from mcore_swift import parallel
    from mcore_swift.platform import select
    from mcore_swift.ranks import launch
    from mcore_swift.training.run import preload

    engine_a = "transformers" if a.kind == "hf" else "Megatron-Core"
    engine_b = "transformers" if b.kind == "hf" and a.kind == "megatron" else "Megatron-Core"
    rows: list[dict[str, torch.Tensor]] = []

    def run() -> None:
        parallel.initialize(parallel.resolve(_one_rank(), world_size=1), platform, seed=1)
        try:
            with torch.no_grad():
                forward_a, forward_b = _ENGINES[engine_a](a), _ENGINES[engine_b](b)
                rows.extend(_positions(forward_a(window), forward_b(window)) for window in windows)
        finally:
            parallel.shutdown()

    platform = select("cpu")
    launch(run, ranks=1, preload=lambda: preload(platform), threads=os.cpu_count() or 1)
    return _report(engine_a, engine_b, rows, limits)


def _positions(a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    """What differs at each position of a window: float64 [length] each. a, b: float32 [length, vocabulary]."""
    apart = (a - b).abs()
    log_a, log_b = a.double().log_softmax(-1), b.double().log_softmax(-1)
    return {
        "max_difference": apart.amax(-1).double(),
        "mean_difference": apart.double().mean(-1),
        "largest": a.abs().amax(-1).double(),
        "same_top1": (a.argmax(-1) == b.argmax(-1)).double(),
        "kl": (log_a.exp() * (log_a - log_b)).sum(-1).clamp(min=0),  # rounding may leave −1e-18
    }


def _report(engine_a: str, engine_b: str, rows: list[dict[str, torch.Tensor]], limits: Limits) -> LogitsReport:
    import torch

    joined = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    length = len(rows[0]["kl"])
    max_difference, max_kl = float(joined["max_difference"].max()), float(joined["kl"].max())
    relative = max_difference / float(joined["largest"].max())
    top1 = float(joined["same_top1"].mean())
    checks = (  # written so that NaN fails
        (relative <= limits.max_difference, f"difference {relative:.3g} > --max-difference {limits.max_difference:g}"),
        (top1 >= limits.min_top1, f"top-1 agreement {top1:.6g} < --min-top1 {limits.min_top1:g}"),
        (max_kl <= limits.max_kl, f"KL divergence {max_kl:.3g} > --max-kl {limits.max_kl:g}"),
    )
    shown = ("max_difference", "kl", "same_top1")
    columns = zip(*(joined[name].tolist() for name in shown), strict=True)
    return LogitsReport(
        engine_a=engine_a,
        engine_b=engine_b,
        positions=len(joined["kl"]),
        max_difference=max_difference,
        mean_difference=float(joined["mean_difference"].mean()),
        relative=relative,
        top1=top1,
        mean_kl=float(joined["kl"].mean()),
        max_kl=max_kl,
        worst_position=divmod(int(joined["max_difference"].argmax()), length),
        failures=[message for good, message in checks if not good],
        per_position=[dict(zip(shown, values, strict=True)) for values in columns],
    )


# --- the engines ------------------------------------------------------------------------------------------------------


def _transformers(source: TensorSource) -> Forward:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        source.path,
        dtype=torch.float32,
        local_files_only=True,
        attn_implementation="eager",  # written out; Megatron-Core's side uses torch's fused attention
    )
    model.eval()
    return lambda window: model(window[None]).logits[0].float()


def _megatron_core(source: TensorSource) -> Forward:
    import torch

    from mcore_swift import parallel
    from mcore_swift.models.build import build_chunks, tensor_rules, transformer_config
    from mcore_swift.platform import select

    platform = select("cpu")
    plan = parallel.resolve(_one_rank(), world_size=1)
    config = transformer_config(source.model, plan, platform, dtype=torch.float32)
    (chunk,) = build_chunks(source.model, config, plan, platform)
    _load(chunk, tensor_rules(source.model, config), source)
    chunk.eval()

    def forward(window: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(len(window))[None]
        return chunk(window[None], positions, None)[0, :, : source.model.vocab_size].float()

    return forward


def _load(chunk: Any, rules: Any, source: TensorSource) -> None:
    """Fills the model from any source, tensor by tensor: each rule's parts laid into the rows of the global tensor."""
    from mcore_swift.weights.live import local_shards, rule_of

    for shard in local_shards([chunk]):
        rule = rule_of(shard, rules)
        parts = [source.read(name) for name in rule.hf]
        if rule.packed:
            own = rule.unpack(parts[0][rule.expert])
            shard.data.copy_(own[shard.offset[0] : shard.offset[0] + len(shard.data)])
            continue
        shard.data.zero_()  # vocabulary padding, if any
        rows = sum(len(part) for part in parts)
        for part, first, last, target in rule.segments(
            shard.offset[0], min(shard.offset[0] + shard.data.size(0), rows), tuple(len(part) for part in parts)
        ):
            shard.data[target : target + last - first] = parts[part][first:last].to(shard.data.dtype)


_ENGINES: dict[str, Callable[[TensorSource], Forward]] = {
    "transformers": _transformers,
    "Megatron-Core": _megatron_core,
}


def _one_rank() -> Any:
    from mcore_swift.recipe import ParallelSection

    return ParallelSection(sequence_parallel=False)
