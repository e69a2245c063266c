"""A training run from its recipe: everything that can be found wrong cheaply is found before any rank is started."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from mcore_swift import rank_env
from mcore_swift.data.tokenizer import load_tokenizer, pad_id_of
from mcore_swift.errors import InputError
from mcore_swift.models import scored
from mcore_swift.models.build import ModelSource, check_layout, read_source
from mcore_swift.models.experts import check_experts
from mcore_swift.models.keys import weight_rules
from mcore_swift.models.lever_rules import check_levers
from mcore_swift.parallel import ParallelPlan, resolve
from mcore_swift.peft.freezing import frozen_tensors
from mcore_swift.peft.quantized_rules import check_quantization
from mcore_swift.platform import Platform, select
from mcore_swift.ranks import launch
from mcore_swift.recipe import Recipe
from mcore_swift.recipe_checks.job import BATCHES, Batches
from mcore_swift.recipe_checks.lisa import LISA_LAYERS, Layers
from mcore_swift.recipe_checks.objective import SCORED
from mcore_swift.recipe_checks.table import refuse
from mcore_swift.training import frozen
from mcore_swift.training.levers import environment


def run(recipe: Recipe) -> int:
    """Starts the run's local ranks, or joins those that torchrun or srun started; returns the exit code."""
    platform = select(recipe.runtime.device)
    plan = plan_ranks(recipe, platform)
    source = model_source(recipe)
    check_layout(source, plan)
    check_experts(source, plan, recipe.moe, device=platform.name)
    check_levers(recipe, plan, source, on_cpu=platform.name == "cpu")
    check_quantization(recipe, source, on_cpu=platform.name == "cpu")
    check_micro_batches(recipe, plan)
    refuse(LISA_LAYERS, Layers(recipe, source.config.num_hidden_layers))
    if frozen.stays(recipe):
        frozen.frozen_model(recipe, source, plan)
    if recipe.model.partly_frozen:
        frozen_tensors(weight_rules(source), recipe.model)

    if source.scored:
        source = scored.with_padding(source, pad_id_of(load_tokenizer(source.tokenizer)))

    for name, value in environment(recipe).items():
        os.environ.setdefault(name, value)

    def rank() -> None:
        from mcore_swift import parallel
        from mcore_swift.training.trainer import Trainer

        Trainer(recipe, source, plan, platform).run()
        parallel.shutdown()

    return launch(
        rank, ranks=plan.world_size, preload=lambda: preload(platform), threads=threads(recipe, platform, plan)
    )


def plan_ranks(recipe: Recipe, platform: Platform) -> ParallelPlan:
    """The layout: of the ranks that joined, or of those to be started here. Raises InputError when it does not fit."""
    joined = rank_env.joined(os.environ)
    devices = platform.device_count()
    if joined is not None:
        return resolve(recipe.parallel, world_size=int(joined["WORLD_SIZE"]))
    wanted = recipe.runtime.ranks
    if wanted is None and devices is not None and recipe.parallel.dp is None:
        wanted = devices
    plan = resolve(recipe.parallel, world_size=wanted)
    if devices is not None and plan.world_size > devices:
        raise InputError(f"parallel: {plan} needs {plan.world_size} ranks, but {devices} GPUs are visible")
    return plan


def check_micro_batches(recipe: Recipe, plan: ParallelPlan) -> None:
    """Raises InputError when the global batch can't be shared out over the ranks, or not interleaved."""
    refuse(BATCHES, Batches(recipe, plan))


def model_source(recipe: Recipe) -> ModelSource:
    """The model's configuration, from a Hugging Face folder or from a Megatron checkpoint that carries one."""
    from mcore_swift.training.checkpoint import checkpoint_source, is_checkpoint

    path = Path(recipe.model.path)
    folder = checkpoint_source(path) if is_checkpoint(path) else path
    tokenizer, template = (Path(p) if p else None for p in (recipe.model.tokenizer, recipe.data.chat_template))
    source = read_source(
        folder,
        overrides=recipe.model.overrides,
        tokenizer=tokenizer,
        chat_template=template,
        mtp_loss_scale=recipe.model.mtp_loss_scale,
        as_scored=recipe.objective.name in SCORED,
    )
    if source.scored and recipe.objective.name not in SCORED:
        raise InputError(
            f"model.path: {folder} is a {source.raw['architectures'][0]}, which gives a text a score and has no output"
            f" layer to write or learn one with; only objective.name: {' or '.join(SCORED)} trains it"
        )
    return source


def threads(recipe: Recipe, platform: Platform, plan: ParallelPlan) -> int:
    """CPU threads of a rank: the recipe's, else an equal share of the cores."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", plan.world_size))
    return recipe.runtime.threads or max(1, (os.cpu_count() or 1) // ranks_here)


def preload(platform: Platform) -> None:
    """Imports what every rank needs, once, before the ranks are forked; keeps the libraries' chatter down."""
    import logging

    for name in ("megatron", "torch.utils.cpp_extension", "torch.distributed", "DotProductAttention"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    warnings.filterwarnings("ignore", module=r"torch\..*")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        platform.install()
        import mcore_swift.training.trainer  # noqa: F401
