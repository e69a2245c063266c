"""Memory and overlap levers: what Megatron is told, what is refused and why, and that recomputation changes nothing."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mcore_swift import parallel
from mcore_swift.errors import InputError
from mcore_swift.models.lever_rules import LEVER_RULES, Run
from mcore_swift.recipe import ParallelSection, PrecisionSection, Recipe, RuntimeSection
from mcore_swift.recipe_checks import check_recipe
from mcore_swift.recipe_checks.levers import LEVERS
from mcore_swift.recipe_checks.optimizer import OPTIMIZER as OPTIMIZER_RULES
from mcore_swift.recipe_checks.table import explained, refuse
from mcore_swift.recipe_io import load_recipe
from mcore_swift.training.levers import config_fields, environment
from tests.distributed.harness import run_ranks
from tests.distributed.rank_model import CPU, Trained, assert_close, micro_batches, open_model, recipe_for, train
from tests.distributed.test_layouts import assert_identical

SMALL = "model: {path: m}\ndata: {train: [a.jsonl]}\nschedule: {steps: 4}\n"


def load(folder: Path, options: str) -> Recipe:
    (folder / "recipe.yaml").write_text(SMALL)
    pairs = [pair.split(" ", 1) for pair in f" {options}".split(" --")[1:]]
    return load_recipe(folder / "recipe.yaml", [word for key, value in pairs for word in (f"--{key}", value)])


# --- what Megatron is told --------------------------------------------------------------------------------------------

FIELDS: list[tuple[RuntimeSection, ParallelSection, dict[str, object]]] = [
    (RuntimeSection(), ParallelSection(), {"overlap_p2p_comm": False}),
    (
        RuntimeSection(recompute="selective", recompute_modules=["layernorm", "moe_act"]),
        ParallelSection(),
        {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "moe_act"]},
    ),
    (
        RuntimeSection(recompute="full", recompute_method="block", recompute_layers=3),
        ParallelSection(),
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3},
    ),
    (
        RuntimeSection(offload_layers=2),
        ParallelSection(),
        {"cpu_offloading": True, "cpu_offloading_num_layers": 2, "cpu_offloading_weights": False},
    ),
    (
        RuntimeSection(offload_modules=["core_attn", "attn_proj"]),
        ParallelSection(),
        {"fine_grained_activation_offloading": True, "offload_modules": ["core_attn", "attn_proj"]},
    ),
    (RuntimeSection(tp_overlap=True), ParallelSection(tp=2), {"tp_comm_overlap": True}),
    (
        RuntimeSection(ep_overlap=True, delay_wgrad=True),
        ParallelSection(ep=2, dp=2),
        {"overlap_moe_expert_parallel_comm": True, "delay_wgrad_compute": True},
    ),
    (RuntimeSection(), ParallelSection(pp=2, vpp=2), {"overlap_p2p_comm": True, "batch_p2p_comm": False}),
]


@pytest.mark.parametrize(("runtime", "layout", "expected"), FIELDS)
def test_transformer_config_fields(
    runtime: RuntimeSection, layout: ParallelSection, expected: dict[str, object]
) -> None:
    fields = config_fields(recipe_for(Path("m"), layout, runtime=runtime), overlap=True)
    assert {name: fields.get(name) for name in expected} == expected
    assert set(fields) <= {*expected, "overlap_p2p_comm", "cpu_offloading_activations"}  # nothing nobody asked for


def test_fp8_fields() -> None:
    recipe = replace(recipe_for(Path("m")), precision=PrecisionSection(fp8="delayed", fp8_param_gather=True))
    fields = config_fields(recipe, overlap=False)
    assert (fields["fp8"], fields["fp8_recipe"], fields["fp8_param"]) == ("hybrid", "delayed", True)


@pytest.mark.parametrize(("runtime", "layout", "expected"), FIELDS)
def test_megatron_accepts_the_fields(
    runtime: RuntimeSection, layout: ParallelSection, expected: dict[str, object]
) -> None:
    import torch
    from megatron.core.transformer import TransformerConfig

    fields = config_fields(recipe_for(Path("m"), layout, runtime=runtime), overlap=True)
    model: dict[str, Any] = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_moe_experts": 8}
    model |= {"moe_grouped_gemm": True, "moe_token_dispatcher_type": "alltoall", "bf16": True, "add_bias_linear": False}
    model |= {"expert_model_parallel_size": layout.ep, "tensor_model_parallel_size": layout.tp}
    model |= {"pipeline_model_parallel_size": layout.pp, "pipeline_dtype": torch.bfloat16}
    model |= {"virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None}
    model |= {"sequence_parallel": layout.tp > 1}
    config = TransformerConfig(**model, **cast(Any, fields))
    assert {name: getattr(config, name) for name in expected} == expected


def test_environment() -> None:
    recipe = recipe_for(Path("m"), runtime=RuntimeSection(ep_overlap=True, offload_modules=["core_attn"]))
    assert environment(recipe) == {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "NVTE_CPU_OFFLOAD_V1": "1"}
    assert environment(recipe_for(Path("m"))) == {}


# --- what is refused --------------------------------------------------------------------------------------------------

OPTIMIZER = "--optimizer.distributed false --optimizer.name muon"
REFUSED = [
    ("--runtime.recompute full --runtime.recompute_layers 0", "runtime.recompute_layers: found 0; it must be at least"),
    ("--optimizer.offload_fraction 1.5", "optimizer.offload_fraction: found 1.5; it must be between 0 and 1"),
    ("--runtime.recompute_method block", "runtime.recompute_method: block is used by runtime.recompute: full only"),
    (
        "--runtime.recompute selective --runtime.recompute_modules [moe,moe_act]",
        "moe_act and shared_experts are parts of it; name either the whole or parts",
    ),
    (
        "--runtime.recompute selective --runtime.recompute_modules [layernorm] --precision.fp8 delayed",
        "delayed scales that have moved on; use another precision.fp8",
    ),
    ("--runtime.offload_modules [mlp]", "runtime.offload_modules: found ['mlp']; allowed: attn_norm, qkv_linear"),
    ("--runtime.offload_modules [core_attn] --runtime.offload_layers 2", "set one of them"),
    ("--runtime.offload_modules [attn_proj]", "attn_proj's input is core_attn's output"),
    (
        "--runtime.offload_modules [moe_act] --runtime.recompute selective --runtime.recompute_modules [moe]",
        "moe recomputes all that moe_act and expert_fc1 would offload",
    ),
    ("--runtime.offload_modules [core_attn] --runtime.recompute full", "full recomputation keeps nothing"),
    ("--runtime.offload_layers 2 --runtime.recompute full", "found runtime.recompute: full; leave one out"),
    ("--runtime.offload_layers 2 --parallel.pp 2", "found parallel.pp 2; use runtime.offload_modules"),
    ("--optimizer.name muon", "muon is not sharded by Megatron's distributed optimizer"),
    ("--optimizer.muon_steps 3", "muon's settings do nothing for optimizer.name: adam"),
    (f"{OPTIMIZER} --optimizer.exp_avg_dtype bf16", "they are forms of Adam's states, found optimizer.name: muon"),
    ("--optimizer.exp_avg_dtype bf16 --optimizer.distributed false", "set optimizer.distributed: true"),
    ("--optimizer.main_params remainder --precision.dtype fp32", "no states of its own for fp32 parameters"),
    (
        "--optimizer.main_params remainder --precision.fp8 tensorwise --precision.fp8_param_gather true"
        " --model.init random",
        "there are no bf16 parameters that fp32 ones could be the remainder of",
    ),
    ("--optimizer.offload_fraction 0.5 --optimizer.main_params remainder", "the CPU's Adam holds its states in fp32"),
    (f"{OPTIMIZER} --optimizer.offload_fraction 0.5", "0.5 of muon's states can't be offloaded"),
    ("--optimizer.offload_fraction 0.5 --precision.dtype fp32", "Megatron offloads what bf16 parameters need"),
    ("--optimizer.offload_fraction 0.5 --optimizer.distributed false", "each rank would update all parameters"),
    (
        "--optimizer.offload_fraction 0.5 --precision.fp8 tensorwise --precision.fp8_param_gather true",
        "the CPU's Adam can't quantize what it has updated; use precision.fp8: delayed",
    ),
    ("--precision.fp8_param_gather true", "precision.fp8_param_gather: there are no FP8 parameters without"),
    (
        "--precision.fp8_param_gather true --precision.fp8 delayed --optimizer.distributed false",
        "parameters are gathered by the distributed optimizer only",
    ),
    ("--precision.fp8_param_gather true --precision.fp8 delayed", "it is for model.init: random"),
    (
        "--precision.fp8_param_gather true --precision.fp8 delayed --model.init random --checkpoint.dir d",
        "can't be restored from a checkpoint part by part; set checkpoint.resume: never",
    ),
    ("--optimizer.fsdp megatron --parallel.tp 2", "proved for data parallelism alone, found tp 2"),
    ("--optimizer.fsdp megatron --checkpoint.dir d", "shards can't be saved or exported yet; leave checkpoint.dir"),
    (f"{OPTIMIZER} --optimizer.fsdp torch", "torch is proved with adam only, found optimizer.name: muon"),
    ("--optimizer.fsdp megatron --optimizer.distributed false", "megatron shards the optimizer's states too"),
    ("--optimizer.fsdp torch", "Megatron's distributed optimizer can't take its shards; set optimizer.distributed"),
    ("--optimizer.fsdp megatron --optimizer.exp_avg_dtype bf16", "megatron holds the states itself, in fp32"),
    ("--optimizer.fsdp megatron --runtime.overlap false", "megatron always overlaps; leave runtime.overlap out"),
    (
        "--optimizer.fsdp megatron --precision.fp8 delayed --precision.fp8_param_gather true --model.init random",
        "megatron's shards are gathered in bf16 here",
    ),
    ("--runtime.tp_overlap true", "runtime.tp_overlap: with parallel.tp: 1 there is no tensor parallel communication"),
    (
        "--runtime.tp_overlap true --parallel.tp 2 --parallel.sequence_parallel false",
        "leave parallel.sequence_parallel",
    ),
    ("--runtime.tp_overlap true --parallel.tp 2 --data.packing false", "set data.packing: true"),
    ("--runtime.tp_overlap true --parallel.tp 2 --data.sequence_length 33", "made for data.sequence_length 33"),
    ("--runtime.tp_overlap true --parallel.tp 2 --parallel.cp 2", "each packed document is padded by itself"),
    ("--runtime.ep_overlap true", "with parallel.ep: 1 experts exchange nothing; raise parallel.ep"),
    ("--runtime.ep_overlap true --parallel.ep 2 --parallel.pp 2", "set parallel.vpp to 2 or more"),
    ("--runtime.ep_overlap true --parallel.ep 2 --precision.dtype fp32", "in bf16 only; use precision.dtype: bf16"),
    ("--runtime.ep_overlap true --parallel.ep 2 --runtime.recompute full", "can't be recomputed whole"),
    (
        "--runtime.ep_overlap true --parallel.ep 2 --runtime.recompute selective --runtime.recompute_modules [moe]",
        "recomputing moe would repeat the exchange that is to be hidden",
    ),
    ("--runtime.ep_overlap true --parallel.ep 2 --runtime.offload_layers 1", "can't be offloaded whole"),
    ("--runtime.delay_wgrad true", "set runtime.ep_overlap: true, or leave it out"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_refused_by_the_recipe_alone(tmp_path: Path, options: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_recipe(load(tmp_path, options))
    assert message in str(caught.value)


def test_what_goes_together(tmp_path: Path) -> None:
    for options in (
        "--runtime.recompute selective --runtime.recompute_modules [layernorm,moe_act] --runtime.ep_overlap true"
        " --runtime.delay_wgrad true --parallel.ep 2 --parallel.pp 2 --parallel.vpp 2",
        "--optimizer.main_params remainder --optimizer.exp_avg_dtype bf16 --optimizer.exp_avg_sq_dtype bf16",
        "--optimizer.offload_fraction 1 --precision.fp8 delayed",
        "--precision.fp8_param_gather true --precision.fp8 tensorwise --model.init random",
        "--runtime.tp_overlap true --parallel.tp 2",
        "--runtime.offload_modules [core_attn,attn_proj] --runtime.recompute selective --parallel.pp 2",
        f"{OPTIMIZER} --optimizer.muon_steps 6 --optimizer.muon_extra_scale 0.2",
    ):
        check_recipe(load(tmp_path, options))


DENSE = {"num_layers": 4}
MOE = {"num_layers": 4, "num_moe_experts": 8, "moe_layer_freq": [1, 1, 1, 1]}
ON_GPU, ON_CPU = False, True
SHARED = "--objective.name dpo --data.share_prompts true"
ALONE: list[tuple[str, dict[str, Any], bool, str]] = [
    (
        "--runtime.recompute selective --runtime.recompute_modules [moe_act]",
        MOE,
        ON_CPU,
        "with Transformer Engine only; recompute core_attn",
    ),
    ("--runtime.offload_layers 1", DENSE, ON_CPU, "where they are already; leave them out"),
    ("--optimizer.offload_fraction 0.5", DENSE, ON_CPU, "0.5 of the states would move from a GPU"),
    ("--optimizer.exp_avg_dtype bf16", DENSE, ON_CPU, "Transformer Engine's FusedAdam is what holds states"),
    ("--runtime.tp_overlap true --parallel.tp 2", DENSE, ON_CPU, "user buffers need GPUs"),
    ("--optimizer.fsdp megatron", DENSE, ON_CPU, "megatron's device meshes are made of GPUs"),
    ("--optimizer.fsdp megatron", MOE, ON_GPU, "megatron is proved for dense models only, and toy has experts"),
    ("--runtime.ep_overlap true --parallel.ep 2 --parallel.dp 2", MOE, ON_CPU, "without a GPU's streams"),
    ("--precision.fp8 delayed --precision.fp8_param_gather true", DENSE, ON_CPU, "FP8 needs an NVIDIA GPU"),
    (OPTIMIZER, DENSE, ON_GPU, "muon needs the package emerging-optimizers"),
    ("--runtime.recompute selective --runtime.recompute_modules [moe]", DENSE, ON_GPU, "experts that toy doesn't have"),
    ("--runtime.recompute selective --runtime.recompute_modules [shared_experts]", MOE, ON_GPU, "names experts that"),
    ("--runtime.recompute selective --runtime.recompute_modules [mla_up_proj]", DENSE, ON_GPU, "latent attention"),
    ("--runtime.recompute selective --runtime.recompute_modules [mlp]", MOE, ON_GPU, "have experts; name moe"),
    (
        "--runtime.recompute selective --runtime.recompute_modules [layernorm]",
        DENSE,
        ON_GPU,
        "inside its linear layers",
    ),
    (
        "--runtime.recompute full --runtime.recompute_layers 3 --parallel.pp 2",
        DENSE,
        ON_GPU,
        "3 is more than the layers",
    ),
    ("--runtime.offload_layers 4", DENSE, ON_GPU, "4 of 4 layers"),
    ("--runtime.offload_modules [expert_fc1]", DENSE, ON_GPU, "names parts of experts, which toy doesn't have"),
    ("--runtime.ep_overlap true --parallel.ep 2 --parallel.dp 2", DENSE, ON_GPU, "toy has no experts"),
    (SHARED, DENSE | {"multi_latent_attention": True}, ON_GPU, "data.share_prompts: queries, keys and values of toy"),
    (SHARED, DENSE | {"attention_dropout": 0.1}, ON_CPU, "toy has dropout in its attention here"),
]


def refuse_run(recipe: Recipe, fields: dict[str, Any], *, on_cpu: bool, has_muon: bool = False) -> None:
    plan = parallel.resolve(recipe.parallel, world_size=None)
    refuse(LEVER_RULES, Run(recipe, plan, on_cpu, fields, "toy", has_muon))


@pytest.mark.parametrize(("options", "fields", "on_cpu", "message"), ALONE)
def test_refused_here_or_for_this_model(
    tmp_path: Path, options: str, fields: dict[str, Any], on_cpu: bool, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        refuse_run(load(tmp_path, options), fields, on_cpu=on_cpu)
    assert message in str(caught.value)


def test_allowed_here_and_for_this_model(tmp_path: Path) -> None:
    shared = MOE | {"moe_shared_expert_intermediate_size": 64, "multi_latent_attention": True}
    every = "--runtime.recompute selective --runtime.recompute_modules [core_attn,layernorm,mla_up_proj,shared_experts]"
    here = "--runtime.recompute selective --runtime.recompute_modules [core_attn,mlp,shared_experts]"
    for options, fields, on_cpu in (
        (OPTIMIZER, DENSE, ON_CPU),
        (here, shared | {"moe_layer_freq": [0, 1, 1, 1]}, ON_CPU),
        (every, shared, ON_GPU),
        ("--runtime.recompute full --runtime.recompute_layers 2 --parallel.pp 2", DENSE, ON_GPU),
        ("--runtime.ep_overlap true --parallel.ep 2 --parallel.dp 2", MOE, ON_GPU),
        (SHARED, MOE | {"softmax_type": "learnable", "window_size": (4, 0), "attention_dropout": 0.0}, ON_GPU),
    ):
        refuse_run(load(tmp_path, options), fields, on_cpu=on_cpu, has_muon=True)


def test_every_rule_explains_itself() -> None:
    for row in explained([*LEVERS, *OPTIMIZER_RULES, *LEVER_RULES]):
        assert all(row.values()), row
        assert "{" not in row["reason"] + row["instead"], row


def test_a_run_is_refused_before_ranks_start(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mcore_swift.training import run

    monkeypatch.setattr(run, "launch", lambda *args, **kwargs: pytest.fail("ranks were started"))
    recipe = recipe_for(models("qwen2"), runtime=RuntimeSection(device="cpu", offload_layers=1))
    with pytest.raises(InputError, match="where they are already"):
        run.run(recipe)


def test_user_buffers_are_those_of_a_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from mcore_swift.training.levers import start_user_buffers

    calls: list[dict[str, Any]] = []
    module = SimpleNamespace(
        UserBufferQuantizationMode=SimpleNamespace(FP8="fp8", NONE="none"), initialize_ub=lambda **kw: calls.append(kw)
    )
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.module.base", module)  # type: ignore[arg-type]
    config: Any = SimpleNamespace(hidden_size=64)
    start_user_buffers(recipe_for(Path("m")), config)
    assert not calls
    start_user_buffers(
        recipe_for(Path("m"), ParallelSection(tp=2), runtime=RuntimeSection(tp_overlap=True), micro_batch_size=2),
        config,
    )
    assert calls == [
        {"shape": [96, 64], "tp_size": 2, "quantization_modes": ["none"], "ub_cfgs": {}, "bootstrap_backend": "nccl"}
    ]


# --- recomputation changes nothing ------------------------------------------------------------------------------------

LAYOUTS = {
    "one rank": ParallelSection(),
    "TP2+SP": ParallelSection(tp=2),
    "PP2xVPP2": ParallelSection(pp=2, vpp=2),
    "EP2": ParallelSection(ep=2, dp=2),
    "EP2xTP2": ParallelSection(ep=2, tp=2, dp=2),
}


def selective(*modules: str) -> RuntimeSection:
    return RuntimeSection(device="cpu", recompute="selective", recompute_modules=list(modules))


def full(method: Any, layers: int) -> RuntimeSection:
    return RuntimeSection(device="cpu", recompute="full", recompute_method=method, recompute_layers=layers)


RECOMPUTE: list[Any] = [
    pytest.param("qwen3", "one rank", selective("layernorm"), marks=pytest.mark.nightly),
    pytest.param("qwen3", "one rank", full("block", 2)),
    pytest.param("qwen3", "TP2+SP", selective("layernorm", "core_attn", "mlp"), marks=pytest.mark.nightly),
    pytest.param("qwen3", "PP2xVPP2", selective("layernorm"), marks=pytest.mark.nightly),
    pytest.param("qwen3", "one rank", full("uniform", 3), marks=pytest.mark.nightly),
    pytest.param("qwen3", "PP2xVPP2", full("block", 1), marks=pytest.mark.nightly),
    pytest.param("qwen3-moe", "one rank", selective("moe", "layernorm"), marks=pytest.mark.nightly),
    pytest.param("qwen3-moe", "EP2", selective("moe"), marks=pytest.mark.nightly),
    pytest.param("qwen3-moe", "EP2xTP2", selective("moe", "layernorm"), marks=pytest.mark.nightly),
    pytest.param("qwen3-moe", "EP2", full("uniform", 1), marks=pytest.mark.nightly),
    pytest.param("qwen2-moe", "EP2", selective("shared_experts", "layernorm"), marks=pytest.mark.nightly),
    pytest.param("deepseek-v3", "one rank", selective("mla_up_proj", "shared_experts"), marks=pytest.mark.slow),
    pytest.param("deepseek-v3", "TP2+SP", selective("mla_up_proj"), marks=pytest.mark.nightly),
]


@functools.cache
def plain(folder: Path, layout: str) -> Trained:
    return train(recipe_for(folder, LAYOUTS[layout]))


@pytest.fixture
def fp8_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints that drop their output ask Transformer Engine, which is not here, whether FP8 is on."""
    from tests.distributed.harness import prepared

    prepared()
    from megatron.core.tensor_parallel import random

    manager = SimpleNamespace(is_fp8_enabled=lambda: False)
    monkeypatch.setattr(random, "FP8GlobalStateManager", manager, raising=False)
    for name in ("activation_recompute_forward", "fp8_autocast"):
        monkeypatch.setattr(random, name, lambda **_: nullcontext(), raising=False)


@pytest.mark.parametrize(("variant", "layout", "runtime"), RECOMPUTE)
@pytest.mark.usefixtures("fp8_is_off")
def test_recomputation_changes_nothing(models: Any, variant: str, layout: str, runtime: RuntimeSection) -> None:
    """Not a bit, but for rounding where outputs are dropped too (torch's norm runs without a graph, then with one)."""
    folder = models(variant)
    found, expected = train(recipe_for(folder, LAYOUTS[layout], runtime=runtime)), plain(folder, layout)
    if set(runtime.recompute_modules) & {"layernorm", "mla_up_proj"}:
        assert found.losses == pytest.approx(expected.losses, rel=1e-6)
        assert_close(found.gradients, expected.gradients, tolerance=2e-6)  # a key bias, which mostly cancels: 1.03e-6
    else:
        assert_identical(found, expected)


# --- combined forward and backward passes -----------------------------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.parametrize(
    "layout",
    [
        ParallelSection(ep=2, dp=2),
        pytest.param(ParallelSection(ep=2, dp=2, pp=2, vpp=2), marks=pytest.mark.nightly),
    ],
    ids=["EP2", "EP2xPP2xVPP2"],
)
def test_combined_passes_change_nothing(models: Any, monkeypatch: pytest.MonkeyPatch, layout: ParallelSection) -> None:
    """The schedule that hides experts' exchange, in bf16 as Megatron wants it; nothing is hidden on a CPU."""
    import torch

    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    folder = models("qwen3-moe")

    def run(runtime: RuntimeSection) -> list[tuple[float, float]]:
        recipe = recipe_for(folder, layout, runtime=runtime, dtype="bf16", micro_batch_size=1)
        return run_ranks(losses_and_norms, layout.pp * (layout.dp or 1), recipe)[0]

    found, expected = run(RuntimeSection(device="cpu", ep_overlap=True)), run(RuntimeSection(device="cpu"))
    for step, plain_step in zip(found, expected, strict=True):
        assert step == pytest.approx(plain_step, rel=1e-3)


def losses_and_norms(recipe: Recipe) -> list[tuple[float, float]]:
    from mcore_swift.objectives.registry import OBJECTIVES
    from mcore_swift.training import step
    from mcore_swift.training.optimizer import set_learning_rate

    model = open_model(recipe)
    batches = micro_batches(recipe, model.source.vocab_size, parallel.ranks())
    set_learning_rate(model.optimizer, recipe.schedule.learning_rate, recipe.optimizer.weight_decay)
    results = [step.train_step(model.models, model.optimizer, batches, OBJECTIVES["sft"], CPU) for _ in range(3)]
    return [(result.loss, result.grad_norm) for result in results]
