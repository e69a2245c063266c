"""How many parameters lie on each pipeline stage's ranks, and what they take in memory: by formula, nothing is built.

`fake_world` counts the same in real Megatron modules; the tests hold the two equal.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

from mcore_swift.models.build import ModelSource, padded_vocab_size
from mcore_swift.models.keys import global_shapes, rule_config, weight_rules
from mcore_swift.models.stages import pipeline_layout
from mcore_swift.parallel import ParallelPlan
from mcore_swift.recipe import Recipe
from mcore_swift.training import frozen

EXPERTS = ".experts.experts."
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")  # padded for tensor parallelism
BUFFERS = ("router.expert_bias",)  # saved with the weights, but not trained
# Tensors that every tensor parallel rank holds whole: norms, routers, biases behind a sum over the ranks. With
# Transformer Engine's layers also latent attention's way down; the torch layers cut it.
_WHOLE = re.compile(
    r"^score\.weight$|norm\.weight$|layer_norm_weight$|\.router\.|\.gate_weight$|linear_(proj|fc2)\.bias$"
)
LATENT = re.compile(r"linear_(q|kv)_down_proj\.")


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


def stage_parameters(
    source: ModelSource, plan: ParallelPlan, chunks: Sequence[str], *, layers: str = "transformer_engine"
) -> list[Parameters]:
    """Parameters of a rank of each pipeline stage, for Platform.layers `layers`. `chunks`: `stages.pipeline_layout`."""
    stages = [Parameters(0)] * plan.pp
    stage_of_layer = layer_stages(plan, chunks)
    mtp = "m" in chunks[-1]
    for key, shape in _shapes(source).items():
        if key.startswith("mtp.") and not mtp:
            continue
        held = rank_share(key, shape, plan, layers)
        if found := re.match(r"decoder\.layers\.(\d+)\.", key):
            places = {stage_of_layer[int(found[1])]}
        elif key.startswith("embedding."):  # the output layer's twin, and what multi-token prediction embeds with
            places = {0, plan.pp - 1} if source.tied or mtp else {0}
        else:
            places = {plan.pp - 1}
        for place in places:
            stages[place] += held
    return stages


def layer_stages(plan: ParallelPlan, chunks: Sequence[str]) -> list[int]:
    """The pipeline stage of each decoder layer."""
    return [number % plan.pp for number, chunk in enumerate(chunks) for _ in range(chunk.count("t"))]


def rank_share(key: str, shape: tuple[int, ...], plan: ParallelPlan, layers: str) -> Parameters:
    """What one rank holds of the global tensor `key`, whose unpadded shape is `shape`."""
    if EXPERTS in key:
        share = prod(shape) // (plan.ep * (1 if key.endswith("linear_fc2.bias") else plan.etp))
        own_groups = plan.ep > 1 or plan.etp != plan.tp  # else they are reduced like everything else
        return Parameters(0, share) if own_groups else Parameters(share)
    if key in VOCABULARY:
        shape = (padded_vocab_size(shape[0], plan.tp), *shape[1:])
    whole = _WHOLE.search(key) or (layers == "transformer_engine" and LATENT.search(key))
    return Parameters(prod(shape) // (1 if whole else plan.tp))


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
    frozen: int = 0  # weights of a model beside the trained one

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.frozen


def rank_bytes(parameters: Parameters, plan: ParallelPlan, recipe: Recipe) -> RankBytes:
    """What the parameters of a rank, their gradients and the optimizer's states take.

    Per parameter: bf16 weights 2 and fp32 main gradients 4, and fp32 master weights with Adam's two moments 12, which
    the distributed optimizer shards over d data parallel ranks: 6 + 12 / d; with fp32 weights 8 + 8 / d (the table in
    Megatron-Core's guide to its distributed optimizer). For experts d counts the ranks that hold the same ones. Muon is
    counted with one momentum for everything, though embeddings and norms are left to Adam. FSDP shards weights and
    gradients, too; what is offloaded to the CPU is left out.
    """
    half, optimizer = uses_bf16(recipe), recipe.optimizer
    moments = {name: 2 if getattr(optimizer, name) == "bf16" else 4 for name in ("exp_avg_dtype", "exp_avg_sq_dtype")}
    master = {"fp32": 4, "remainder": 2}[optimizer.main_params] if half else 0
    states = master + {"adam": sum(moments.values()), "sgd": 4, "muon": 4}[optimizer.name]
    ranks = (plan.dp * plan.cp, plan.tp * plan.cp * plan.dp // (plan.ep * plan.etp))
    state_ranks = ranks if optimizer.distributed else (1, 1)
    weight_ranks = ranks if optimizer.fsdp else (1, 1)

    def shared(size: float, over: tuple[int, int]) -> int:
        return ceil(parameters.dense * size / over[0]) + ceil(parameters.experts * size / over[1])

    return RankBytes(
        weights=shared(2 if half else 4, weight_ranks),
        gradients=shared(4, weight_ranks),
        optimizer=shared(states * (1 - optimizer.offload_fraction), state_ranks),
    )


def frozen_bytes(recipe: Recipe, source: ModelSource, plan: ParallelPlan) -> list[int]:
    """What a rank of each pipeline stage holds of the teacher, or of the reference, if that is a model of its own.

    `source` and `plan` are the trained model's. Raises InputError when the other one doesn't fit them.
    """
    if not frozen.stays(recipe):
        return [0] * plan.pp
    own = frozen.frozen_model(recipe, source, plan)
    held = stage_parameters(own.source, own.plan, pipeline_layout(own.source, own.plan))
    return [each.total * (2 if uses_bf16(recipe) else 4) for each in held]


def uses_bf16(recipe: Recipe) -> bool:
    """Whether the run's weights are bf16 where it is meant to run: on GPUs, unless the recipe says the CPU."""
    dtype = recipe.precision.dtype
    return dtype == "bf16" or (dtype == "auto" and recipe.runtime.device != "cpu")
