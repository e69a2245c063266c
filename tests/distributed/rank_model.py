"""What the ranks of a test run: the project's own path from a recipe to gradients and trained parameters.

Everything is returned under Hugging Face names, so that any two layouts, and transformers itself, can be compared.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file

from mcore_swift import parallel
from mcore_swift.data.batch import MicroBatch
from mcore_swift.data.collate import collate
from mcore_swift.data.samples import Document
from mcore_swift.data.shape import LoaderShape
from mcore_swift.models.build import read_source
from mcore_swift.objectives.registry import OBJECTIVES
from mcore_swift.recipe import (
    AdapterSection,
    DataSection,
    ModelSection,
    MoeSection,
    OptimizerSection,
    ParallelSection,
    PrecisionSection,
    Recipe,
    RuntimeSection,
    ScheduleSection,
)
from mcore_swift.recipe_checks.objective import SCORED
from tests.distributed.harness import prepared, run_ranks

CPU = torch.device("cpu")
SEQUENCE_LENGTH = 48
# A pack is two documents. Packs 2, 3, 6, 7, which the second of two data parallel ranks gets, are short and count few
# tokens: a mean of the ranks' means would be far from the mean over all tokens.
PACK_LENGTHS = ((23, 19), (17, 24), (4, 3), (3, 5), (12, 30), (26, 9), (4, 4), (5, 3))
STEPS = 3


def documents(vocab_size: int) -> list[Document]:
    """Sixteen documents of different lengths; the loss counts on a part of each that differs between them."""
    generator = np.random.default_rng(11)
    found = []
    for length in (length for pair in PACK_LENGTHS for length in pair):
        tokens = generator.integers(0, vocab_size, length).astype(np.int32)
        loss = (np.arange(length) >= generator.integers(0, length - 1)).astype(np.uint8)
        found.append((tokens, loss))
    found[0] = (found[0][0], np.array([0, 1, 1, 0] * 5 + [1, 1, 1], dtype=np.uint8))
    return found


def micro_batches(
    recipe: Recipe, vocab_size: int, place: parallel.Ranks, *, adapters: int = 0, weights: Sequence[float] = ()
) -> list[MicroBatch]:
    """This rank's micro-batches of the one global batch that all tests use.

    With `adapters`, document i is routed to adapter i % adapters; with `weights`, it has weight i % their number.
    """
    texts = documents(vocab_size)
    if weights:
        weighed = [np.float32(weights[i % len(weights)]) for i in range(len(texts))]
        texts = [(tokens, loss * weight) for (tokens, loss), weight in zip(texts, weighed, strict=True)]
    samples = [texts[i : i + 2] for i in range(0, len(texts), 2)] if recipe.data.packing else [[t] for t in texts]
    numbers = iter(range(len(texts)))
    routes = [[next(numbers) % max(adapters, 1) for _ in sample] for sample in samples]
    shape = LoaderShape(
        global_batch_size=len(samples),
        micro_batch_size=recipe.schedule.micro_batch_size,
        sequence_length=SEQUENCE_LENGTH,
        dp_rank=place.dp,
        dp_size=place.dp_size,
        pad_multiple=parallel.resolve(recipe.parallel, world_size=None).length_multiple,
    )
    found = [
        collate(
            [samples[slot] for slot in slots],
            packing=recipe.data.packing,
            shape=shape,
            pad_id=0,
            adapters=[routes[slot] for slot in slots] if adapters else None,
        )
        for slots in shape.slots()
    ]
    return [replace(batch, weighted=bool(weights)) for batch in found]


def recipe_for(
    folder: Path,
    layout: ParallelSection | None = None,
    *,
    packing: bool = True,
    micro_batch_size: int = 2,
    learning_rate: float = 1e-4,
    optimizer: OptimizerSection | None = None,
    runtime: RuntimeSection | None = None,
    dtype: Literal["fp32", "bf16"] = "fp32",
    moe: MoeSection | None = None,
    adapter: AdapterSection | None = None,
) -> Recipe:
    """A recipe for the tiny model in `folder`. Clipping is on and always bites: its norm takes part in every step."""
    return Recipe(
        model=ModelSection(path=str(folder)),
        data=DataSection(train=[], packing=packing, sequence_length=SEQUENCE_LENGTH),
        parallel=layout or ParallelSection(),
        adapter=adapter or AdapterSection(),
        optimizer=optimizer or OptimizerSection(clip_grad=0.1),
        schedule=ScheduleSection(
            steps=STEPS, global_batch_size=8, micro_batch_size=micro_batch_size, learning_rate=learning_rate
        ),
        precision=PrecisionSection(dtype=dtype),
        runtime=runtime or RuntimeSection(device="cpu"),
        moe=moe or MoeSection(),
    )


@dataclass(frozen=True)
class Trained:
    """One layout's results. Tensors under Hugging Face names; the sums are the same on every rank."""

    losses: list[float]  # of the steps
    grad_norms: list[float]
    loss_tokens: int
    rank_tokens: list[int]  # labels that count, by data parallel rank
    gradients: dict[str, torch.Tensor]  # of the first step, before clipping
    parameters: dict[str, torch.Tensor]  # after the last step
    metrics: dict[str, float]  # of the first step


def train(recipe: Recipe) -> Trained:
    """Runs `recipe` on as many forked ranks as its layout needs; gradients of the first step, then STEPS steps."""
    plan = parallel.resolve(recipe.parallel, world_size=None)
    results = run_ranks(_train_rank, plan.world_size, recipe)
    for other in results[1:]:  # what is said to be the same on every rank is
        assert (other.losses, other.grad_norms) == (results[0].losses, results[0].grad_norms)
        assert other.metrics == results[0].metrics
    return replace(
        results[0],
        gradients=merge([result.gradients for result in results]),
        parameters=merge([result.parameters for result in results]),
    )


def merge(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors of all ranks: each came from one rank, or one expert's slice of it from each rank: NAME[EXPERT]."""
    found = {name: tensor for part in parts for name, tensor in part.items()}
    assert len(found) == sum(map(len, parts)), "a tensor came from two ranks"
    slices: dict[str, dict[int, torch.Tensor]] = {}
    for name in [name for name in found if name.endswith("]")]:
        packed, _, expert = name[:-1].partition("[")
        slices.setdefault(packed, {})[int(expert)] = found.pop(name)
    return found | {name: torch.stack([own[i] for i in range(len(own))]) for name, own in slices.items()}


def assert_close(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], *, tolerance: float = 1e-5
) -> None:
    """The same names, and for each tensor |found - expected| <= tolerance * |expected| (Euclidean norms).

    There is no allowance for small tensors. The gradient of a key bias comes closest to needing one: the softmax
    cancels most of it (all of it, where attention is uniform), so that its rounding noise is large beside its norm.
    With the tiny models' weights it stays below 4e-6; with transformers' initial weights it would reach 2e-5.
    """
    assert found.keys() == expected.keys()
    errors = {
        name: ((found[name].double() - tensor.double()).norm() / tensor.double().norm()).item()
        for name, tensor in expected.items()
    }
    wrong = sorted(((name, error) for name, error in errors.items() if not error <= tolerance), key=lambda e: -e[1])
    assert not wrong, f"{len(wrong)} of {len(errors)} tensors differ, the worst: {wrong[:5]}"


def open_model(recipe: Recipe) -> Any:
    """Joins the job and builds the recipe's model with its weights, DDP and optimizer: a setup.TrainingModel."""
    from mcore_swift.training import setup

    plan = parallel.resolve(recipe.parallel, world_size=int(os.environ["WORLD_SIZE"]))
    platform = prepared()
    parallel.initialize(plan, platform, seed=1)
    source = read_source(
        Path(recipe.model.path),
        mtp_loss_scale=recipe.model.mtp_loss_scale,
        as_scored=recipe.objective.name in SCORED,
    )
    return setup.build(recipe, source, plan, platform)


def _train_rank(recipe: Recipe) -> Trained:
    from mcore_swift.training import step
    from mcore_swift.training.optimizer import set_learning_rate

    model = open_model(recipe)
    place = parallel.ranks()
    batches = micro_batches(recipe, model.source.vocab_size, place)
    objective = OBJECTIVES["sft"]
    gradients = gradients_of_first_step(model)
    set_learning_rate(model.optimizer, recipe.schedule.learning_rate, recipe.optimizer.weight_decay)
    results = [step.train_step(model.models, model.optimizer, batches, objective, CPU) for _ in range(STEPS)]
    assert not any(result.skipped for result in results)
    return Trained(
        losses=[result.loss for result in results],
        grad_norms=[result.grad_norm for result in results],
        loss_tokens=results[0].loss_tokens,
        rank_tokens=_over_dp_ranks(sum(int(batch.loss_mask.sum()) for batch in batches)),
        gradients=gradients,
        parameters=dict(hf_copies(model, lambda parameter: parameter.data)),
        metrics=results[0].metrics,
    )


def gradients_of_first_step(model: Any) -> dict[str, torch.Tensor]:
    """A dictionary that the optimizer's next step fills with the gradients it was given, before it clips them."""
    found: dict[str, torch.Tensor] = {}
    take_step = model.optimizer.step

    def look_and_step() -> Any:
        gather_gradient_shards(model.models)
        found.update(hf_copies(model, lambda parameter: getattr(parameter, "main_grad", None)))  # buffers have none
        model.optimizer.step = take_step
        return take_step()

    model.optimizer.step = look_and_step
    return found


def hf_copies(model: Any, value: Callable[[torch.Tensor], torch.Tensor | None]) -> Iterator[tuple[str, torch.Tensor]]:
    """Copies of what `value` gives for each parameter, under Hugging Face names; each from one rank of the job."""
    from mcore_swift.weights import live

    tensors = live.hf_tensors(model.chunks, model.rules, vocab_size=model.source.vocab_size, value=value)
    for name, tensor, expert in tensors:
        yield name if expert is None else f"{name}[{expert}]", tensor.clone()


def gather_gradient_shards(models: Sequence[Any]) -> None:
    """Completes the gradient buffers of the distributed optimizer, where a rank has reduced only its own shard.

    What each rank's optimizer will use (its shard of every bucket after the reduce-scatter) is all-gathered over the
    whole bucket, so that the parameters' main_grad views show the reduced gradients and nothing else.
    """
    import torch.distributed as dist

    for model in models:
        if not model.ddp_config.use_distributed_optimizer:
            continue
        for buffer in (*model.buffers, *model.expert_parallel_buffers):
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shards = bucket.grad_data.chunk(dist.get_world_size(group))
                own = shards[dist.get_rank(group)].clone()
                bucket.grad_data.fill_(float("nan"))
                dist.all_gather(list(shards), own, group=group)


def _over_dp_ranks(value: int) -> list[int]:
    import torch.distributed as dist

    place = parallel.ranks()
    values = [torch.zeros((), dtype=torch.int64) for _ in range(place.dp_size * place.cp_size)]
    dist.all_gather(values, torch.tensor(value), group=parallel.dp_group())
    return [int(v) for v in values[:: place.cp_size]]  # ranks of a context parallel group follow each other


# --- logits ----------------------------------------------------------------------------------------------------------


def logits(recipe: Recipe, batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
    """Float32 logits [b, s, vocabulary] of each micro-batch, gathered from the recipe's layout. In forked ranks."""
    assert recipe.parallel.cp == 1, "logits are gathered over TP only"
    plan = parallel.resolve(recipe.parallel, world_size=None)
    found = run_ranks(_logits_rank, plan.world_size, recipe, list(batches))
    return next(result for result in found if result)


def _logits_rank(recipe: Recipe, batches: list[MicroBatch]) -> list[torch.Tensor]:
    model = open_model(recipe)
    for chunk in model.models:
        chunk.eval()
    with torch.no_grad():
        return model_logits(model, batches)


def model_logits(model: Any, batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
    """Logits of each micro-batch on the last stage's ranks, nothing elsewhere. Collective."""
    import torch.distributed as dist
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from mcore_swift.peft.adapters import route
    from mcore_swift.training.step import packed_params

    def forward_step(iterator: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        batch = next(iterator)
        route(chunk, batch.adapter)
        output = chunk(batch.tokens, batch.position_ids, None, packed_seq_params=packed_params(batch))
        return output, lambda output, **_: output

    parts = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=model.models[0],
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.size(1),
        micro_batch_size=batches[0].tokens.size(0),
        forward_only=True,
        collect_non_loss_data=True,
    )
    wholes = []
    for part in parts:  # none but on the last stage
        shards = [torch.empty_like(part) for _ in range(dist.get_world_size(parallel.tp_group()))]
        dist.all_gather(shards, part.contiguous(), group=parallel.tp_group())
        wholes.append(torch.cat(shards, dim=-1)[..., : model.source.vocab_size])
    return wholes


# --- transformers' own -----------------------------------------------------------------------------------------------


def transformers_gradients(folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the global batch by transformers in float64, each document alone. In a forked process."""
    return run_ranks(_transformers_gradients, 1, folder)[0]


def _transformers_gradients(folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    texts = documents(model.config.vocab_size)
    count = sum(int(loss[1:].sum()) for _, loss in texts)
    total = torch.zeros((), dtype=torch.float64)
    for tokens, loss in texts:
        inputs = torch.from_numpy(tokens).long()
        logps = model(inputs[None]).logits[0, :-1].log_softmax(-1)
        total = total - (logps.gather(1, inputs[1:, None])[:, 0] * torch.from_numpy(loss[1:])).sum()
    (total / count).backward()
    return float(total / count), saved_gradients(model)


def saved_gradients(model: Any) -> dict[str, torch.Tensor]:
    """The gradients of a transformers model under the names of its folder's tensors."""
    values = [parameter.data for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.data = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    with tempfile.TemporaryDirectory() as place:  # saving splits what transformers fuses: experts, one tensor each
        model.save_pretrained(place)
        (file,) = Path(place).glob("*.safetensors")
        gradients = load_file(file)
    for parameter, data in zip(model.parameters(), values, strict=True):
        parameter.data = data
    for name, _ in model.named_buffers():  # saved like parameters, but not trained
        gradients.pop(name, None)
    return gradients
