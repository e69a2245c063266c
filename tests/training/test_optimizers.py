"""Optimizers and where their states are: Muon against float64, states in other forms, and what Megatron is told.

What needs a GPU is run around stand-ins (`fake_devices`): they show that a state in any form is saved and put back
exactly, not that the GPU's kernels are right.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_swift import parallel
from mcore_swift.objectives.registry import OBJECTIVES
from mcore_swift.recipe import OptimizerSection, ParallelSection, PrecisionSection, Recipe
from mcore_swift.training.optimizer import data_parallel_config, optimizer_config, precision_aware, state_fields
from tests.distributed.harness import run_ranks
from tests.distributed.rank_model import (
    CPU,
    assert_close,
    gradients_of_first_step,
    hf_copies,
    merge,
    micro_batches,
    open_model,
    recipe_for,
    train,
)

MUON = OptimizerSection(name="muon", distributed=False, clip_grad=0.0, muon_precision="fp32")
LEAN = OptimizerSection(clip_grad=0.1, main_params="remainder", exp_avg_dtype="bf16", exp_avg_sq_dtype="bf16")
REMAINDER = OptimizerSection(clip_grad=0.1, main_params="remainder")
HALF_OFFLOADED = OptimizerSection(clip_grad=0.1, offload_fraction=0.5)
DP2 = ParallelSection(dp=2)


# --- what Megatron is told --------------------------------------------------------------------------------------------


def plan(recipe: Recipe) -> parallel.ParallelPlan:
    return parallel.resolve(recipe.parallel, world_size=None)


def test_plain_adam_is_what_it_was() -> None:
    recipe = recipe_for(Path("m"), DP2, optimizer=OptimizerSection())
    config = optimizer_config(recipe, bf16=True, overlap_param_gather=True)
    assert (config.optimizer, config.bf16, config.use_distributed_optimizer) == ("adam", True, True)
    assert not config.use_precision_aware_optimizer and not config.optimizer_cpu_offload
    assert config.fp8_recipe is None and config.overlap_param_gather
    ddp = data_parallel_config(recipe, plan(recipe), overlap=True)
    assert (ddp.overlap_grad_reduce, ddp.overlap_param_gather, ddp.use_distributed_optimizer) == (True, True, True)
    assert not ddp.fp8_param_gather and not ddp.delay_wgrad_compute


@pytest.mark.parametrize(("dp", "distributed", "expected"), [(1, True, (0, 0)), (2, False, (1, 0)), (2, True, (1, 1))])
def test_overlap_where_there_is_something_to_hide(dp: int, distributed: bool, expected: tuple[int, int]) -> None:
    recipe = recipe_for(Path("m"), ParallelSection(dp=dp), optimizer=OptimizerSection(distributed=distributed))
    ddp = data_parallel_config(recipe, plan(recipe), overlap=True)
    assert (ddp.overlap_grad_reduce, ddp.overlap_param_gather) == expected


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (
            LEAN,
            {"store_param_remainders": True, "exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16},
        ),
        (
            OptimizerSection(exp_avg_dtype="bf16"),
            {"store_param_remainders": False, "exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.float32},
        ),
        (
            HALF_OFFLOADED,
            {
                "optimizer_cpu_offload": True,
                "optimizer_offload_fraction": 0.5,
                "overlap_cpu_optimizer_d2h_h2d": True,
                "store_param_remainders": False,
            },
        ),
    ],
)
def test_forms_of_states(section: OptimizerSection, expected: dict[str, object]) -> None:
    assert precision_aware(section)
    fields = state_fields(section)
    assert fields["use_precision_aware_optimizer"] and fields.items() >= expected.items()


def test_megatron_takes_an_offloading_config() -> None:
    config = optimizer_config(recipe_for(Path("m"), optimizer=HALF_OFFLOADED), bf16=True, overlap_param_gather=False)
    assert config.optimizer_cpu_offload and config.use_precision_aware_optimizer_no_fp8_or_ds_fp8


@pytest.mark.parametrize(("fp8", "reuse"), [("tensorwise", False), ("delayed", False), ("mxfp8", True)])
def test_fp8_parameter_gather(fp8: Any, reuse: bool) -> None:
    precision = PrecisionSection(fp8=fp8, fp8_param_gather=True)
    recipe = replace(recipe_for(Path("m"), DP2), precision=precision)
    ddp = data_parallel_config(recipe, plan(recipe), overlap=True)
    config = optimizer_config(recipe, bf16=True, overlap_param_gather=True)
    assert ddp.fp8_param_gather and config.fp8_recipe == fp8
    assert ddp.reuse_grad_buf_for_mxfp8_param_ag == config.reuse_grad_buf_for_mxfp8_param_ag == reuse


def test_muon_never_orthogonalizes_shards() -> None:
    config = optimizer_config(recipe_for(Path("m"), optimizer=MUON), bf16=False, overlap_param_gather=False)
    assert (config.muon_tp_mode, config.muon_split_qkv, config.muon_fp32_matmul_prec) == ("duplicated", True, "highest")
    assert (config.muon_num_ns_steps, config.muon_coefficient_type, config.muon_momentum) == (5, "quintic", 0.95)


# --- Muon against float64 ---------------------------------------------------------------------------------------------

# The coefficients that Megatron's "quintic" stands for: those of modded-nanogpt's iteration.
QUINTIC = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """Σ pₖ(X) with X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X from X / |X|, in float64."""
    x = matrix.double() / matrix.double().norm()
    for a, b, c in QUINTIC:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def muon_update(gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """The update of matrices that Megatron holds as one (gate and up), with the "spectral" scale."""
    whole = torch.cat(gradients)
    update = newton_schulz(whole) * max(whole.shape) ** 0.5
    return list(update.split([gradient.size(0) for gradient in gradients]))


def first_step(
    before: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor], recipe: Recipe
) -> dict[str, torch.Tensor]:
    """Parameters after Muon's first step (Adam's for what is no matrix inside the decoder), in float64."""
    rate, decay = recipe.schedule.learning_rate, recipe.optimizer.weight_decay
    updates = {}
    for name, gradient in gradients.items():
        if name.endswith("gate_proj.weight"):
            up = name.replace("gate_proj", "up_proj")
            updates[name], updates[up] = muon_update([gradient, gradients[up]])
        elif gradient.dim() == 2 and ".layers." in name and not name.endswith("up_proj.weight"):
            (updates[name],) = muon_update([gradient])
        elif not name.endswith("up_proj.weight"):
            g = gradient.double()
            updates[name] = g / (g.abs() + recipe.optimizer.eps)
    return {
        name: value.double() * (1 - rate * decay * (value.dim() > 1)) - rate * updates[name]
        for name, value in before.items()
    }


def one_step(recipe: Recipe) -> tuple[dict[str, torch.Tensor], ...]:
    from mcore_swift.training import step
    from mcore_swift.training.optimizer import set_learning_rate

    model = open_model(recipe)
    batches = micro_batches(recipe, model.source.vocab_size, parallel.ranks())
    gradients = gradients_of_first_step(model)
    set_learning_rate(model.optimizer, recipe.schedule.learning_rate, recipe.optimizer.weight_decay)
    before = dict(hf_copies(model, lambda parameter: parameter.data))
    step.train_step(model.models, model.optimizer, batches, OBJECTIVES["sft"], CPU)
    return before, gradients, dict(hf_copies(model, lambda parameter: parameter.data))


@pytest.mark.parametrize("layout", [ParallelSection(), ParallelSection(tp=2)], ids=["one rank", "TP2+SP"])
def test_muons_first_step(models: Any, layout: ParallelSection) -> None:
    recipe = recipe_for(models("qwen3"), layout, optimizer=MUON, learning_rate=1e-3)
    results = run_ranks(one_step, layout.tp, recipe)
    before, gradients, after = (merge([result[number] for result in results]) for number in range(3))
    expected = first_step(before, gradients, recipe)
    moved = {name: after[name] - before[name] for name in before}
    assert_close(moved, {name: expected[name] - before[name].double() for name in before}, tolerance=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "layout"),
    [
        ("qwen3", ParallelSection(dp=2)),
        ("qwen3", ParallelSection(tp=2, pp=2)),
        ("qwen3-moe", ParallelSection(ep=2, dp=2)),
    ],
)
def test_muon_at_other_layouts(models: Any, variant: str, layout: ParallelSection) -> None:
    folder = models(variant)
    found = train(recipe_for(folder, layout, optimizer=MUON))
    expected = train(recipe_for(folder, optimizer=MUON))
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    assert_close(found.parameters, expected.parameters)


# --- states in other forms are saved and put back exactly -------------------------------------------------------------


def step_again(recipe: Recipe, prepare: Any) -> tuple[list[float], dict[str, torch.Tensor], dict[str, set[str]]]:
    """Two steps, a snapshot of what a checkpoint would hold, a third step; then the snapshot and the third step again.

    Returns the four losses, the parameters, and the snapshot's dtypes by kind of state. Both third steps agree bit for
    bit, or this fails.
    """
    if prepare is not None:
        prepare()
    from mcore_swift.training import optimizer_state, step
    from mcore_swift.training.optimizer import set_learning_rate
    from mcore_swift.weights.dist_checkpoint import model_items

    model = open_model(recipe)
    batches = micro_batches(recipe, model.source.vocab_size, parallel.ranks())
    set_learning_rate(model.optimizer, recipe.schedule.learning_rate, recipe.optimizer.weight_decay)

    def take_step() -> float:
        return step.train_step(model.models, model.optimizer, batches, OBJECTIVES["sft"], CPU).loss

    def targets() -> Any:
        items, put_back = optimizer_state.load_targets(model.optimizer, model_items(model.chunks).parts)
        return [item.data for item in items], [item.key for item in items], put_back

    losses = [take_step(), take_step()]
    parameters = [parameter for chunk in model.chunks for parameter in chunk.parameters()]
    saved = [parameter.detach().clone() for parameter in parameters]
    data, keys, _ = targets()
    states, count = [value.clone() for value in data], optimizer_state.get_step(model.optimizer)
    losses.append(take_step())
    expected = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, saved, strict=True):
            parameter.copy_(value)
    data, _, put_back = targets()
    for target, value in zip(data, states, strict=True):
        target.copy_(value)
    put_back()
    optimizer_state.set_step(model.optimizer, count)
    losses.append(take_step())
    for parameter, value in zip(parameters, expected, strict=True):
        assert torch.equal(parameter, value)
    kinds: dict[str, set[str]] = {}
    for key, value in zip(keys, states, strict=True):
        kinds.setdefault(key.split(".")[2], set()).add(str(value.dtype))
    return losses, dict(hf_copies(model, lambda parameter: parameter.data)), kinds


def lean() -> None:
    from tests.training.fake_devices import install_lean_adam

    install_lean_adam()


def offloaded() -> None:
    from tests.training.fake_devices import pretend_on_gpu

    pretend_on_gpu()


@functools.cache
def plain_bf16(folder: Path) -> tuple[list[float], dict[str, torch.Tensor], dict[str, set[str]]]:
    return stepped(folder, OptimizerSection(clip_grad=0.1), None, "bf16")


def stepped(folder: Path, section: OptimizerSection, prepare: Any, dtype: Any) -> Any:
    results = run_ranks(step_again, 2, recipe_for(folder, DP2, optimizer=section, dtype=dtype), prepare)
    return results[0][0], merge([result[1] for result in results]), results[0][2]


FP32 = {"exp_avg": {"torch.float32"}, "exp_avg_sq": {"torch.float32"}, "fp32_param": {"torch.float32"}}


@pytest.mark.slow
def test_remainders_are_exact(models: Any) -> None:
    """bf16 parameters with their remainders train as with fp32 ones; a checkpoint holds the same of both."""
    losses, parameters, kinds = stepped(models("qwen2"), REMAINDER, lean, "bf16")
    expected = plain_bf16(models("qwen2"))
    assert kinds == expected[2] == FP32
    assert losses == pytest.approx(expected[0], rel=1e-3)  # LeanAdam rounds otherwise than torch's in the last bits
    assert_close(parameters, expected[1], tolerance=2e-3)


@pytest.mark.slow
def test_bf16_moments(models: Any) -> None:
    losses, _, kinds = stepped(models("qwen2"), LEAN, lean, "bf16")
    assert kinds == FP32  # a checkpoint can be resumed with other moments
    assert losses == pytest.approx(plain_bf16(models("qwen2"))[0], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_states_on_the_cpu(models: Any, fraction: float) -> None:
    """AdamW there gives what AdamW gives here; a checkpoint does not show where the states were."""
    section = replace(HALF_OFFLOADED, offload_fraction=fraction)
    losses, parameters, kinds = stepped(models("qwen2"), section, offloaded, "bf16")
    plain = plain_bf16(models("qwen2"))
    assert kinds == plain[2]
    assert losses == pytest.approx(plain[0], rel=1e-3)  # a bf16 parameter may round to the other side
    assert_close(parameters, plain[1], tolerance=2e-3)


@pytest.mark.slow
def test_muons_momentum_is_saved(models: Any) -> None:
    *_, kinds = stepped(models("qwen2"), MUON, None, "fp32")
    assert kinds.keys() == {"momentum_buffer", "exp_avg", "exp_avg_sq"}


def test_fp32_from_bf16_and_remainder() -> None:
    from mcore_swift.training.optimizer_state import join_remainder, split_remainder

    whole = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-30, 30, 10_000)
    high = whole.bfloat16()
    low = split_remainder(high, whole)
    assert low.dtype == torch.int16 and torch.equal(join_remainder(high, low), whole)
    tie = torch.tensor([0x3F808000], dtype=torch.int32).view(torch.float32)  # torch rounds it down, to even
    last_bit = join_remainder(tie.bfloat16(), split_remainder(tie.bfloat16(), tie)).view(torch.int32)
    assert last_bit.item() == 0x3F807FFF
