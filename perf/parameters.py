"""How many parameters lie on each pipeline stage's ranks, and what they take in memory: by formula, nothing is built.

`fake_world` counts the same in real Megatron modules; the tests hold the two equal.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from mcore_swift.models.build import ModelSource, padded_vocab_size
from mcore_swift.models.keys import global_shapes, rule_config, weight_rules
from mcore_swift.parallel import ParallelPlan
from mcore_swift.recipe import Recipe

EXPERTS = ".experts.experts."
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")  # padded for tensor parallelism
BUFFERS = ("router.expert_bias",)  # saved with the weights, but not trained
# Tensors that every tensor parallel rank holds whole: norms, routers, biases behind a sum over the ranks, and latent
# attention's way down, which Megatron computes on each rank.
_WHOLE = re.compile(
    r"norm\.weight$|layer_norm_weight$|\.router\.|\.gate_weight$|linear_(q|kv)_down_proj\.|linear_(proj|fc2)\.bias$"
)


@dataclass(frozen=True)
class Parameters:
    """Parameters of one rank: those of experts are shared out, and reduced, over groups of ranks of their own."""

    dense: int
    experts: int = 0

    @property
    def total(self) -> int:
        return self.dense + self.experts

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(self.dense + other.dense, self.experts + other.experts)


def model_parameters(source: ModelSource) -> tuple[int, int]:
    """Parameters of the whole model, and those that meet one token (its experts only; without the embedding's rows)."""
    config = rule_config(source)
    total = active = 0.0
    for key, shape in _shapes(source).items():
        total += prod(shape)
        if not key.startswith("embedding.") or source.tied:
            active += prod(shape) * (config.moe_router_topk / config.num_moe_experts if EXPERTS in key else 1)
    return int(total), round(active)


def stage_parameters(source: ModelSource, plan: ParallelPlan, chunks: Sequence[str]) -> list[Parameters]:
    """Parameters of a rank of each pipeline stage. `chunks`: the layout (`models.stages.pipeline_layout`)."""
    stages = [Parameters(0)] * plan.pp
    stage_of_layer = [number % plan.pp for number, chunk in enumerate(chunks) for _ in range(chunk.count("t"))]
    mtp = "m" in chunks[-1]
    for key, shape in _shapes(source).items():
        if key.startswith("mtp.") and not mtp:
            continue
        held = rank_share(key, shape, plan)
        if found := re.match(r"decoder\.layers\.(\d+)\.", key):
            places = {stage_of_layer[int(found[1])]}
        elif key.startswith("embedding."):  # the output layer's twin, and what multi-token prediction embeds with
            places = {0, plan.pp - 1} if source.tied or mtp else {0}
        else:
            places = {plan.pp - 1}
        for place in places:
            stages[place] += held
    return stages


def rank_share(key: str, shape: tuple[int, ...], plan: ParallelPlan) -> Parameters:
    """What one rank holds of the global tensor `key`, whose unpadded shape is `shape`."""
    if EXPERTS in key:
        share = prod(shape) // (plan.ep * (1 if key.endswith("linear_fc2.bias") else plan.etp))
        return Parameters(0, share) if plan.ep > 1 else Parameters(share)
    if key in VOCABULARY:
        shape = (padded_vocab_size(shape[0], plan.tp), *shape[1:])
    return Parameters(prod(shape) // (1 if _WHOLE.search(key) else plan.tp))


def _shapes(source: ModelSource) -> dict[str, tuple[int, ...]]:
    shapes = global_shapes(source)
    unknown = weight_rules(source).keys() - shapes.keys()
    assert not unknown, f"no shape known of {sorted(unknown)[:3]}"
    return {key: shape for key, shape in shapes.items() if not key.endswith(BUFFERS)}


@dataclass(frozen=True)
class RankBytes:
    """Bytes of one rank that stay throughout a step; activations and workspaces come on top."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def rank_bytes(parameters: Parameters, plan: ParallelPlan, recipe: Recipe) -> RankBytes:
    """What the parameters of a rank, their gradients and the optimizer's states take.

    Per parameter: bf16 weights 2 and fp32 main gradients 4, and fp32 master weights with Adam's two moments 12, which
    the distributed optimizer shards over d data parallel ranks: 6 + 12 / d; with fp32 weights 8 + 8 / d (the table in
    Megatron-Core's guide to its distributed optimizer). For experts d counts the ranks that hold the same ones.
    """
    half = uses_bf16(recipe)
    states = {"adam": 8, "sgd": 4}.get(recipe.optimizer.name, 8) + 4 * half
    dense_ranks = plan.dp * plan.cp
    expert_ranks = plan.tp * plan.cp * plan.dp // (plan.ep * plan.etp)
    if not recipe.optimizer.distributed:
        dense_ranks = expert_ranks = 1
    return RankBytes(
        weights=parameters.total * (2 if half else 4),
        gradients=parameters.total * 4,
        optimizer=-(-parameters.dense * states // dense_ranks) + -(-parameters.experts * states // expert_ranks),
    )


def uses_bf16(recipe: Recipe) -> bool:
    """Whether the run's weights are bf16 where it is meant to run: on GPUs, unless the recipe says the CPU."""
    dtype = recipe.precision.dtype
    return dtype == "bf16" or (dtype == "auto" and recipe.runtime.device != "cpu")
