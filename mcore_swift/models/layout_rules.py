"""Rules about a model at a layout: decided from its config, before Megatron is imported or a process group made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore_swift.models.context_rules import CONTEXT_RULES
from mcore_swift.parallel import ParallelPlan
from mcore_swift.pipeline import parse
from mcore_swift.recipe_checks.table import Row


@dataclass(frozen=True)
class Fit:
    """A model at a layout. `fields`: what the family makes of the config, under TransformerConfig's names."""

    plan: ParallelPlan
    fields: Mapping[str, Any]
    family: str
    folder: Path

    @property
    def heads(self) -> int:
        return self.fields["num_attention_heads"]

    @property
    def groups(self) -> int:
        return self.fields["num_query_groups"]

    @property
    def ffn_size(self) -> int:
        return self.fields["ffn_hidden_size"]

    @property
    def layers(self) -> int:
        return self.fields["num_layers"]

    @property
    def experts(self) -> int | None:
        return self.fields.get("num_moe_experts")

    @property
    def expert_ffn_size(self) -> int:
        return self.fields["moe_ffn_hidden_size"]

    @property
    def allowed_tp(self) -> str:
        return _divisors(self.heads, self.groups, self.ffn_size)

    @property
    def allowed_ep(self) -> str:
        return _divisors(self.experts or 1)

    @property
    def allowed_etp(self) -> str:
        return _divisors(self.expert_ffn_size)

    @property
    def mtp(self) -> int:
        return self.fields.get("mtp_num_layers") or 0

    @property
    def expert_biases(self) -> bool:
        return self.experts is not None and bool(self.fields.get("add_bias_linear"))

    @property
    def chunks(self) -> int:
        return self.plan.pp * self.plan.vpp

    @property
    def to_share(self) -> int:
        """What is shared out over the chunks: layers, and what the recipe counts as layers."""
        return self.layers + self.plan.pipeline.account_embedding + self.plan.pipeline.account_loss

    @property
    def given(self) -> list[int]:
        """Layers of the stages whose number the recipe gives."""
        wish = self.plan.pipeline
        return [count for count in (wish.first_stage_layers, wish.last_stage_layers) if count is not None]

    @property
    def left(self) -> int:
        return self.layers - sum(self.given)

    @property
    def left_chunks(self) -> int:
        return self.chunks - len(self.given) * self.plan.vpp

    @property
    def written(self) -> str:
        """The recipe's pipeline_layout, repetitions written out."""
        layout = self.plan.pipeline.layout
        return "|".join((layout is not None and parse(layout)) or ())


def _divisors(*sizes: int) -> str:
    return ", ".join(str(n) for n in range(1, min(sizes) + 1) if not any(size % n for size in sizes))


MODEL_RULES: list[Row[Fit]] = [
    Row(
        "parallel.tp",
        "a size that does not divide the attention heads",
        lambda r: r.heads % r.plan.tp,
        "{r.plan.tp} does not divide the model's {r.heads} attention heads ({r.folder})",
        "allowed: {r.allowed_tp}",
    ),
    Row(
        "parallel.tp",
        "a size that does not divide the key-value heads",
        lambda r: r.groups % r.plan.tp,
        "{r.plan.tp} does not divide the model's {r.groups} key-value heads ({r.folder})",
        "allowed: {r.allowed_tp}",
    ),
    Row(
        "parallel.tp",
        "a size that does not divide the feed-forward size",
        lambda r: r.ffn_size % r.plan.tp,
        "{r.plan.tp} does not divide the model's {r.ffn_size} ffn size ({r.folder})",
        "allowed: {r.allowed_tp}",
    ),
    Row(
        "parallel.ep",
        "greater than 1, for a model without experts",
        lambda r: r.experts is None and r.plan.ep > 1,
        "{r.plan.ep}, but {r.family} has no experts ({r.folder})",
        "leave it out",
    ),
    Row(
        "parallel.etp",
        "any, for a model without experts",
        lambda r: r.experts is None and r.plan.etp != r.plan.tp,
        "{r.plan.etp}, but {r.family} has no experts ({r.folder})",
        "leave it out",
    ),
    Row(
        "parallel.ep",
        "a size that does not divide the experts",
        lambda r: r.experts is not None and r.experts % r.plan.ep,
        "{r.plan.ep} does not divide the model's {r.experts} experts ({r.folder})",
        "allowed: {r.allowed_ep}",
    ),
    Row(
        "parallel.etp",
        "a size that does not divide the experts' feed-forward size",
        lambda r: r.experts is not None and r.expert_ffn_size % r.plan.etp,
        "{r.plan.etp} does not divide the model's {r.expert_ffn_size} expert ffn size ({r.folder})",
        "allowed: {r.allowed_etp}",
    ),
    Row(
        "parallel.etp",
        "other than 1, for experts with biases",
        lambda r: r.expert_biases and r.plan.etp > 1,
        "{r.plan.etp} (parallel.tp where it is not given), but the experts of {r.family} have biases, which"
        " Megatron-Core has at 1 only: each rank would add them ({r.folder})",
        "set parallel.etp: 1",
    ),
    Row(
        "parallel.pp",
        "pp × vpp greater than the layers",
        lambda r: r.plan.pp > 1 and r.chunks > r.to_share,
        "pp {r.plan.pp} × vpp {r.plan.vpp} is more than the model's {r.layers} layers ({r.folder})",
        "lower one of them",
    ),
    Row(
        "parallel.first_stage_layers parallel.last_stage_layers",
        "more than leave a layer for each other chunk, or, where there is none, another number than the model's",
        lambda r: r.given and (r.left < r.left_chunks or (r.left and not r.left_chunks)),
        "{r.left} of the model's {r.layers} layers are left for {r.left_chunks} other chunks ({r.folder})",
        "lower or raise them",
    ),
    Row(
        "parallel.pipeline_layout",
        "another number of layers than the model's",
        lambda r: r.written and r.written.count("t") != r.layers,
        "{r.written} has other than the model's {r.layers} layers ({r.folder})",
        "write a t for each layer",
    ),
    Row(
        "parallel.pipeline_layout",
        "another number of multi-token prediction layers than the model's",
        lambda r: r.written and r.written.count("m") != r.mtp,
        "{r.written} has other than the model's {r.mtp} multi-token prediction layers ({r.folder})",
        "write an m for each of them before the L",
    ),
    *CONTEXT_RULES,
]
