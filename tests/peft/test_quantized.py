"""QLoRA against bitsandbytes and PEFT: the same four-bit base and the same training at every layout, in that memory.

The tiny models' rows are whole blocks of 64, as real models' are. Tensor parallelism cuts some of them inside a block.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mcore_swift import parallel
from mcore_swift.objectives.registry import OBJECTIVES
from mcore_swift.recipe import AdapterSection, MoeSection, ParallelSection, Recipe, RuntimeSection
from tests.distributed.harness import RankFailure, in_fork, prepared, run_ranks
from tests.distributed.rank_model import (
    CPU,
    assert_close,
    hf_copies,
    merge,
    micro_batches,
    open_model,
    recipe_for,
)
from tests.distributed.tiny_models import tiny_folder
from tests.peft.method_run import adapter_rank
from tests.peft.peft_run import LEARNING_RATE, peft_steps
from tests.peft.test_experts import expert_folder
from tests.peft.test_lora import ALL, peft_folder
from tests.training.checkpoint_run import assemble, saved_and_loaded, with_checkpoints

# 192 columns: three blocks, so that two tensor parallel ranks cut the middle one. The smaller matrices have 256 scales,
# a block of double quantization, the others more.
SIZES: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
MOE_SIZES: dict[str, Any] = SIZES | {"hidden_size": 64, "moe_intermediate_size": 64}
LAYOUTS = {
    "one rank": ParallelSection(),
    "TP2": ParallelSection(tp=2, sequence_parallel=False),
    "TP2+SP": ParallelSection(tp=2),
    "PP2": ParallelSection(pp=2),
    "DP2": ParallelSection(dp=2),
    "TP2xPP2": ParallelSection(tp=2, pp=2),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prepared()
    import bitsandbytes.functional  # noqa: F401  (once, before the forks)

    return tiny_folder(tmp_path_factory.mktemp("quantized") / "qwen3", "qwen3", **SIZES)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prepared()
    import bitsandbytes.functional  # noqa: F401

    return tiny_folder(tmp_path_factory.mktemp("quantized") / "qwen3-moe", "qwen3-moe", **MOE_SIZES)


def adapter(folder: Path | None = None, **keys: Any) -> AdapterSection:
    """NF4 with double quantization, if `keys` don't say otherwise; the adapters of `folder`, or new ones."""
    start: dict[str, Any] = {"path": str(folder)} if folder else {"rank": 4, "targets": ["all-linear"]}
    found: dict[str, Any] = {"name": "lora", "quantization": "nf4"} | start | keys
    return AdapterSection(**found)


def ranks_of(recipe: Recipe) -> int:
    return parallel.resolve(recipe.parallel, world_size=None).world_size


# --- bitsandbytes and PEFT --------------------------------------------------------------------------------------------


def bitsandbytes_model(model: Path, kind: str, *, double: bool) -> Any:
    """transformers' model, with the decoder's linear layers replaced by bitsandbytes'."""
    from bitsandbytes.nn.modules import Linear4bit
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    for name, linear in list(base.named_modules()):
        if isinstance(linear, torch.nn.Linear) and name != "lm_head":
            bias = linear.bias is not None
            four: Any = Linear4bit(
                linear.in_features,
                linear.out_features,
                bias,
                torch.float32,
                compress_statistics=double,
                quant_type=kind,
            )
            four.load_state_dict(linear.state_dict())
            four.weight = four.weight.to("cpu")  # which quantizes it
            base.set_submodule(name, four)
    base.is_loaded_in_4bit = True  # PEFT asks for it
    return base.requires_grad_(False).train()  # in eval mode some CPUs compute in bf16


def bitsandbytes_weights(model: Path, kind: str, double: bool) -> dict[str, torch.Tensor]:
    """What bitsandbytes makes of the folder's linear weights."""
    import bitsandbytes.functional as F

    found = {}
    for name, weight in load_file(model / "model.safetensors").items():
        if "_proj." in name and name.endswith(".weight"):
            found[name] = F.dequantize_4bit(
                *F.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=double)
            )
    return found


def peft_run(model: Path, folder: Path, kind: str, double: bool) -> Any:
    """Loss and adapter gradients by PEFT on bitsandbytes' model; the adapters after three AdamW steps."""
    from peft import PeftModel

    base = bitsandbytes_model(model, kind, double=double)
    adapted: Any = PeftModel.from_pretrained(base, str(folder), is_trainable=True)
    return peft_steps(adapted, base.config.vocab_size)


@functools.cache
def expected(model: Path, folder: Path, kind: str, double: bool) -> Any:
    return run_ranks(peft_run, 1, model, folder, kind, double)[0]


# --- the base ---------------------------------------------------------------------------------------------------------


def base_rank(recipe: Recipe) -> dict[str, torch.Tensor]:
    """The whole model's weights as its layers compute with them."""
    from mcore_swift.peft import quantized

    model = open_model(recipe)
    values = quantized.values(model.chunks)
    return dict(hf_copies(model, lambda p: values[id(p)]() if id(p) in values else None))


def base_of(recipe: Recipe) -> dict[str, torch.Tensor]:
    return merge(run_ranks(base_rank, ranks_of(recipe), recipe))


KINDS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]
EXPERT_LAYOUTS = {
    "EP2": ParallelSection(ep=2, dp=2),
    "EP2xTP2": ParallelSection(ep=2, tp=2, dp=2),
    "EP2xPP2": ParallelSection(ep=2, pp=2, dp=2),
    "TP2": ParallelSection(tp=2),
}


@pytest.mark.parametrize(
    ("layout", "kind", "double"),
    [
        pytest.param(
            layout,
            kind,
            double,
            marks=()
            if (layout, kind, double) == ("TP2", "nf4", True)
            else pytest.mark.slow
            if (layout, kind, double) in {("TP2xPP2", "fp4", False), ("one rank", "nf4", True), ("DP2", "fp4", True)}
            else pytest.mark.nightly,
        )
        for layout, (kind, double) in itertools.product(LAYOUTS, KINDS)
    ],
)
def test_base_is_bitsandbytes_to_the_bit(dense: Path, layout: str, kind: Any, double: bool) -> None:
    found = base_of(recipe_for(dense, LAYOUTS[layout], adapter=adapter(quantization=kind, double_quantization=double)))
    wanted = run_ranks(bitsandbytes_weights, 1, dense, kind, double)[0]
    assert found.keys() == wanted.keys() and len(found) == 2 * 7
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=pytest.mark.slow if name == "TP2" else pytest.mark.nightly) for name in EXPERT_LAYOUTS],
)
def test_base_of_experts_is_bitsandbytes_to_the_bit(experts: Path, layout: str) -> None:
    """At an expert tensor parallel size of 2 the ranks have halves of each block."""
    found = base_of(recipe_for(experts, EXPERT_LAYOUTS[layout], adapter=adapter()))
    wanted = run_ranks(bitsandbytes_weights, 1, experts, "nf4", True)[0]
    assert found.keys() == wanted.keys() and len(found) == 2 * 4 + 3 + 8 * 3
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


# --- training ---------------------------------------------------------------------------------------------------------


def train(recipe: Recipe) -> Any:
    """Losses, adapter gradients of the first step, adapters after the last."""
    ranks = run_ranks(adapter_rank, ranks_of(recipe), recipe)
    return ranks[0][0], merge([rank[1] for rank in ranks]), merge([rank[2] for rank in ranks])


QUICK: set[tuple[Any, ...]] = set()
SLOW = {("lora", "nf4", True, "TP2+SP"), ("lora", "fp4", False, "TP2")}


def marked(case: tuple[Any, ...]) -> Any:
    marks = () if case in QUICK else pytest.mark.slow if case in SLOW else pytest.mark.nightly
    return pytest.param(*case, marks=marks, id="-".join(map(str, case)))


@pytest.mark.parametrize(
    ("method", "kind", "double", "layout"),
    [marked((m, *kind, layout)) for m, kind, layout in itertools.product(("lora", "dora"), KINDS, LAYOUTS)],
)
def test_as_peft_on_bitsandbytes(dense: Path, method: str, kind: Any, double: bool, layout: str) -> None:
    folder = peft_folder(dense, dense.parent / method, method, ALL)
    loss, gradients, trained = expected(dense, folder, kind, double)
    section = adapter(folder, quantization=kind, double_quantization=double)
    losses, found, then = train(recipe_for(dense, LAYOUTS[layout], adapter=section, learning_rate=LEARNING_RATE))
    assert losses[0] == pytest.approx(loss, rel=1e-5)
    assert_close(found, gradients, tolerance=1e-4)
    assert_close(then, trained, tolerance=1e-4)


@functools.cache
def one_rank(model: Path, folder: Path) -> Any:
    return train(recipe_for(model, adapter=adapter(folder), learning_rate=LEARNING_RATE))


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=pytest.mark.nightly if "x" in name else pytest.mark.slow) for name in EXPERT_LAYOUTS],
)
def test_layouts_of_experts_agree(experts: Path, layout: str) -> None:
    folder = expert_folder(experts, experts.parent / "adapters")
    losses, gradients, trained = one_rank(experts, folder)
    recipe = recipe_for(experts, EXPERT_LAYOUTS[layout], adapter=adapter(folder), learning_rate=LEARNING_RATE)
    found = train(recipe)
    assert found[0] == pytest.approx(losses, rel=1e-5)
    assert_close(found[1], gradients)
    assert_close(found[2], trained)


@pytest.mark.parametrize(
    "layout", [pytest.param("PP2", marks=pytest.mark.slow), pytest.param("TP2xPP2", marks=pytest.mark.nightly)]
)
def test_layouts_agree(dense: Path, layout: str) -> None:
    folder = peft_folder(dense, dense.parent / "lora", "lora", ALL)
    losses, gradients, trained = one_rank(dense, folder)
    found = train(recipe_for(dense, LAYOUTS[layout], adapter=adapter(folder), learning_rate=LEARNING_RATE))
    assert found[0] == pytest.approx(losses, rel=1e-5)
    assert_close(found[1], gradients)
    assert_close(found[2], trained)


@pytest.mark.parametrize(
    "recompute", [pytest.param("full", marks=pytest.mark.nightly), pytest.param("selective", marks=pytest.mark.nightly)]
)
def test_recomputation_changes_nothing(dense: Path, recompute: Any) -> None:
    folder = peft_folder(dense, dense.parent / "lora", "lora", ALL)
    runtime = RuntimeSection(device="cpu", recompute=recompute, recompute_modules=["core_attn", "mlp"])
    recipe = recipe_for(dense, LAYOUTS["TP2+SP"], adapter=adapter(folder), learning_rate=LEARNING_RATE)
    plain_run, recomputed = train(recipe), train(replace(recipe, runtime=runtime))
    assert recomputed[0] == plain_run[0]
    assert_close(recomputed[1], plain_run[1], tolerance=0)


# --- memory -----------------------------------------------------------------------------------------------------------


class Wholes:
    """Counts the full-size weights that are alive, by their storage: autograd's own references count too."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from mcore_swift.peft.quantized import QuantizedWeight

        self.refs: list[Any] = []
        self.made = self.most = 0
        store, dequantized = QuantizedWeight.store, QuantizedWeight._dequantized

        def counted_store(weight: Any, whole: torch.Tensor) -> None:
            self.add(whole)
            store(weight, whole)

        def counted_dequantized(weight: Any) -> torch.Tensor:
            return self.add(dequantized(weight))

        patch.setattr(QuantizedWeight, "store", counted_store)
        patch.setattr(QuantizedWeight, "_dequantized", counted_dequantized)

    def add(self, whole: torch.Tensor) -> torch.Tensor:
        from torch.multiprocessing.reductions import StorageWeakRef

        self.refs = [ref for ref in self.refs if not ref.expired()] + [StorageWeakRef(whole.untyped_storage())]
        self.made, self.most = self.made + 1, max(self.most, len(self.refs))
        return whole

    def alive(self) -> int:
        return sum(not ref.expired() for ref in self.refs)


@pytest.mark.parametrize("recompute", ["none", pytest.param("full", marks=pytest.mark.slow)])
@in_fork
def test_no_whole_weight_outlives_its_layers_call(dense: Path, recompute: Any) -> None:
    from mcore_swift.peft import quantized
    from mcore_swift.training import step

    with pytest.MonkeyPatch.context() as patch:
        wholes = Wholes(patch)
        model = open_model(
            recipe_for(dense, adapter=adapter(), runtime=RuntimeSection(device="cpu", recompute=recompute))
        )
        linears = 2 * 4
        assert (wholes.made, wholes.alive()) == (2 * linears, 0)
        assert wholes.most == 2  # what was read, and what it became, whose difference is measured
        for call in quantized.values(model.chunks).values():
            weight: Any = call.__self__  # type: ignore[attr-defined]
            parameter = weight.site.weight
            assert parameter.untyped_storage().nbytes() == 4 and bool(parameter[0, 0].isnan())
            blocks = parameter.numel() // 64
            nested = sum(4 * -(-(part.rows * weight.site.in_features // 64) // 256) + 4 for part in weight.site.parts)
            assert weight.nbytes == parameter.numel() // 2 + blocks + nested
        batches = micro_batches(recipe_for(dense), model.source.vocab_size, parallel.ranks())
        wholes.made = wholes.most = 0
        result = step.train_step(model.models, model.optimizer, batches, OBJECTIVES["sft"], CPU)
        assert torch.isfinite(torch.tensor(result.loss))
        assert wholes.made == linears * len(batches) * (3 if recompute == "full" else 2)
        assert (wholes.most, wholes.alive()) == (1, 0)
        parameters = {id(t.parameter) for chunk in model.chunks for t in chunk.adapters.tensors()}
        held = {id(p) for group in model.optimizer.param_groups for p in group["params"]}
        assert len(held) == len(parameters) == 2 * 7 * 2  # the optimizer has states for adapters only


class KeepsItTwice(torch.autograd.Function):
    """As Transformer Engine's layers: the weight that was computed with, and the parameter."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight, weight, weight.t())
        return inputs @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        one, two, transposed = ctx.saved_tensors
        assert one.data_ptr() == two.data_ptr() and torch.equal(transposed.t(), one)
        return grads[0] @ one, None


@pytest.mark.slow
@in_fork
def test_a_layer_that_saves_its_weight_twice(dense: Path) -> None:
    from mcore_swift.peft import quantized

    model = open_model(recipe_for(dense, adapter=adapter()))
    weight: Any = next(iter(quantized.values(model.chunks).values())).__self__  # type: ignore[attr-defined]
    whole = weight.whole().clone()
    inputs = torch.randn(5, whole.size(1), requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        wholes = Wholes(patch)
        weight._forward(lambda x: KeepsItTwice.apply(x, weight.site.weight), inputs).sum().backward()
        assert (wholes.made, wholes.most) == (2, 1)  # forward, backward
    assert inputs.grad is not None and torch.equal(inputs.grad, torch.ones(5, len(whole)) @ whole)


# --- checkpoints, folders, Python -------------------------------------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.parametrize("place", ["TP2+SP", "TP2xPP2"])
def test_resumes_bit_for_bit(dense: Path, tmp_path: Path, place: str) -> None:
    saving, loading = (
        with_checkpoints(recipe_for(dense, LAYOUTS[layout], adapter=adapter(dropout=0.1)), tmp_path)
        for layout in ("TP2+SP", place)
    )
    saved, loaded = saved_and_loaded(saving, loading)
    before, after = assemble([rank[0] for rank in saved]), assemble([rank[0] for rank in loaded])
    assert {key.split(".")[0] for key in before} == {"adapters", "optimizer"}
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    if place == "TP2+SP":
        assert [rank[2] for rank in loaded] == [rank[2] for rank in saved]


def write_rank(recipe: Recipe, folder: Path) -> str:
    from mcore_swift.training import adapters

    model = open_model(recipe)
    adapters.write(recipe, model, folder)
    return model.quantized


def logits(model: Path, merged: Path, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(40).view(2, 20)
    adapted: Any = PeftModel.from_pretrained(bitsandbytes_model(model, "nf4", double=True), str(folder))
    whole: Any = AutoModelForCausalLM.from_pretrained(merged)
    with torch.no_grad():
        return whole(tokens).logits, adapted.train()(tokens).logits


@pytest.mark.slow
def test_merged_folder_and_what_it_costs(dense: Path, tmp_path: Path) -> None:
    """Merged at TP2 x PP2 into the dequantized base, it computes what PEFT does with these adapters on four bits."""
    folder = peft_folder(dense, dense.parent / "lora", "lora", ALL)
    said = run_ranks(write_rank, 4, recipe_for(dense, LAYOUTS["TP2xPP2"], adapter=adapter(folder)), tmp_path)
    merged, adapted = run_ranks(logits, 1, dense, tmp_path / "hf", tmp_path / "adapter")[0]
    assert (merged - adapted).abs().max() <= 1e-5 * adapted.abs().max()
    base, weights = run_ranks(bitsandbytes_weights, 1, dense, "nf4", True)[0], load_file(dense / "model.safetensors")
    off = sum((base[name].double() - weights[name]).square().sum() for name in base)
    error = float((off / sum(weights[name].double().square().sum() for name in base)) ** 0.5)
    assert all(text.endswith(f"relative error {error:.2%}") for text in said) and 0.05 < error < 0.15


def megatron_rank(recipe: Recipe, checkpoint: Path) -> dict[str, torch.Tensor]:
    """The base quantized from a Megatron checkpoint."""
    from mcore_swift.models.build import build_chunks, read_source, tensor_rules, transformer_config
    from mcore_swift.peft import quantized
    from mcore_swift.training import adapters
    from mcore_swift.training.checkpoint import load_weights
    from mcore_swift.weights import live

    plan = parallel.resolve(recipe.parallel, world_size=None)
    parallel.initialize(plan, prepared(), seed=1)
    source = read_source(Path(recipe.model.path))
    config = transformer_config(source, plan, prepared(), dtype=torch.float32)
    chunks, rules = build_chunks(source, config, plan, prepared(), lean=True), tensor_rules(source, config)
    base = adapters.quantized_base(recipe, chunks, rules)
    assert base is not None
    load_weights(checkpoint, models=chunks, fill=base.fill)
    values = quantized.values(chunks)

    def value(parameter: torch.Tensor) -> torch.Tensor:
        return values[id(parameter)]() if id(parameter) in values else parameter.data

    tensors = live.hf_tensors(chunks, rules, vocab_size=source.vocab_size, value=value)
    return {name: tensor.clone() for name, tensor, _ in tensors}


@pytest.mark.slow
def test_base_from_a_megatron_checkpoint(experts: Path, tmp_path: Path) -> None:
    from tests.training.checkpoint_run import save_rank

    run_ranks(save_rank, 2, with_checkpoints(recipe_for(experts, LAYOUTS["PP2"]), tmp_path), 0, 0)
    (checkpoint,) = (tmp_path / "checkpoints").glob("step-*")
    recipe = recipe_for(experts, EXPERT_LAYOUTS["TP2"], adapter=adapter())
    found = merge(run_ranks(megatron_rank, 2, recipe, checkpoint))
    wanted = run_ranks(bitsandbytes_weights, 1, experts, "nf4", True)[0]
    weights = load_file(experts / "model.safetensors")
    assert found.keys() == weights.keys()
    assert [name for name in weights if not torch.equal(found[name], wanted.get(name, weights[name]))] == []


def swift_rank(recipe: Recipe) -> dict[str, torch.Tensor]:
    """From Python, on a model that is loaded already."""
    from mcore_swift import LoRAConfig, Swift
    from mcore_swift.peft import quantized

    model = open_model(recipe)
    Swift.prepare_model(model.chunks, LoRAConfig(rank=4, quantization="nf4"))
    values = quantized.values(model.chunks)
    assert all(p.untyped_storage().nbytes() == 4 for c in model.chunks for p in c.parameters() if id(p) in values)
    return dict(hf_copies(model, lambda p: values[id(p)]() if id(p) in values else None))


@pytest.mark.slow
def test_from_python(dense: Path) -> None:
    found = merge(run_ranks(swift_rank, 2, recipe_for(dense, LAYOUTS["TP2+SP"])))
    wanted = run_ranks(bitsandbytes_weights, 1, dense, "nf4", True)[0]
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.slow
def test_random_weights_for_benchmarks(dense: Path) -> None:
    """They don't depend on the layout."""
    recipe = recipe_for(dense, adapter=adapter())
    recipe = replace(recipe, model=replace(recipe.model, init="random"))
    one, four = base_of(recipe), base_of(replace(recipe, parallel=LAYOUTS["TP2xPP2"]))
    assert one.keys() == four.keys() and all(torch.equal(one[name], four[name]) for name in one)
    assert all(0.015 < float(weight.std()) < 0.025 for weight in one.values())


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from mcore_swift.models.build import read_source
    from tests.distributed.tiny_models import tiny_config

    def of(variant: str, **sizes: Any) -> Any:
        folder = tmp_path_factory.mktemp(variant)
        tiny_config(variant, **sizes).save_pretrained(folder)
        return read_source(folder)

    return {
        "dense": of("qwen3", **SIZES),
        "narrow": of("qwen3"),
        "packed": of("gpt-oss"),
        "experts": of("qwen3-moe", **MOE_SIZES),
    }


@pytest.mark.parametrize(
    ("name", "on_cpu", "message"),
    [
        (
            "narrow",
            True,
            r"adapter\.quantization: .*o_proj\.weight has 96 columns, which can't be cut into blocks of 64",
        ),
        ("packed", True, r"adapter\.quantization: .*gate_up_proj holds all experts"),
        ("experts", False, r"moe\.grouped, adapter\.quantization: grouped experts .* moe\.grouped: false"),
    ],
)
def test_a_model_that_is_not_quantized(sources: Any, name: str, on_cpu: bool, message: str) -> None:
    from mcore_swift.errors import InputError
    from mcore_swift.peft.quantized_rules import check_quantization

    recipe = recipe_for(Path("m"), adapter=adapter())
    with pytest.raises(InputError, match=message):
        check_quantization(recipe, sources[name], on_cpu=on_cpu)
    check_quantization(replace(recipe, adapter=AdapterSection(name="lora")), sources[name], on_cpu=on_cpu)


def test_what_is_quantized(sources: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from mcore_swift.errors import InputError
    from mcore_swift.peft.quantized_rules import check_quantization

    recipe = recipe_for(Path("m"), adapter=adapter())
    check_quantization(recipe, sources["dense"], on_cpu=False)
    check_quantization(replace(recipe, moe=MoeSection(grouped=False)), sources["experts"], on_cpu=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"nf4 needs the package bitsandbytes.* install mcore-swift\[qlora\]"):
        check_quantization(recipe, sources["dense"], on_cpu=False)


@pytest.mark.slow
def test_a_loaded_model_that_is_not_quantized(models: Any) -> None:
    with pytest.raises(
        RankFailure, match=r"InputError: quantization: .*o_proj has 96 columns, which is no multiple of 64"
    ):
        run_ranks(swift_rank, 2, recipe_for(models("qwen3"), LAYOUTS["TP2+SP"]))
