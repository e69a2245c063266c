"""Adapters on experts: against PEFT, which adapts all of a layer's as one tensor, and against their definition.

PEFT's form has one A for gate and up, and neither DoRA nor PiSSA. So where each module has its own A, and for these
methods, the reference is the definition, W + scaling · B A, put into transformers' model in float64.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcore_swift import parallel
from mcore_swift.recipe import AdapterSection, ParallelSection
from tests.distributed.harness import run_ranks
from tests.distributed.rank_model import assert_close, merge, recipe_for
from tests.peft.method_run import adapter_rank, write_rank
from tests.peft.peft_run import LEARNING_RATE, Tensors, loss_of, peft_steps

LAYOUTS = {
    "one rank": ParallelSection(),
    "TP2+SP": ParallelSection(tp=2),  # and ETP2
    "PP2": ParallelSection(pp=2),
    "CP2": ParallelSection(cp=2),
    "EP2": ParallelSection(ep=2, dp=2),
    "TP2xPP2": ParallelSection(tp=2, pp=2),
    "EP2xTP2": ParallelSection(ep=2, tp=2, dp=2),
    "EP2xTP2xETP1": ParallelSection(ep=2, tp=2, etp=1),
    "EP2xPP2": ParallelSection(ep=2, pp=2, dp=2),
}
FAMILIES = ("mixtral", "qwen3-moe")
RANK, ALPHA = 4, 6.0
METHODS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
RATIOS = {"lora+": 4.0}


def cases(*methods: str, slow: tuple[str, str, str] | None = None) -> list[Any]:
    """Each family, method and layout; one case is not nightly."""
    found = []
    for family in FAMILIES:
        for method in methods:
            for layout in LAYOUTS:
                marks = pytest.mark.slow if (family, method, layout) == slow else pytest.mark.nightly
                found.append(pytest.param(family, method, layout, marks=marks, id=f"{family}-{method}-{layout}"))
    return found


def run(model: Path, layout: str, adapter: AdapterSection) -> tuple[list[float], Tensors, Tensors]:
    place = LAYOUTS[layout]
    recipe = recipe_for(model, place, adapter=adapter, learning_rate=LEARNING_RATE)
    ranks = run_ranks(adapter_rank, parallel.resolve(place, world_size=None).world_size, recipe)
    return ranks[0][0], merge([rank[1] for rank in ranks]), merge([rank[2] for rank in ranks])


# --- against PEFT -----------------------------------------------------------------------------------------------------


def peft_folder(model: Path, folder: Path, **settings: Any) -> Path:
    """A folder that PEFT has written, with random adapters on attention and experts."""
    if not folder.exists():
        run_ranks(_make_peft_folder, 1, model, folder, settings)
    return folder


def _make_peft_folder(model: Path, folder: Path, settings: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    wanted = {
        "target_modules": ["q_proj", "v_proj", "o_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, task_type="CAUSAL_LM", **wanted | settings)  # type: ignore[arg-type]
    adapted: Any = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (p for p in adapted.parameters() if p.requires_grad):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)


def _trained_by_peft(model: Path, folder: Path, ratio: float) -> tuple[float, Tensors, Tensors]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    adapted: Any = PeftModel.from_pretrained(base, str(folder), is_trainable=True).double().eval()
    loss, gradients, trained = peft_steps(adapted, base.config.vocab_size, ratio=ratio)
    mixtral, experts = base.config.model_type == "mixtral", getattr(base.config, "num_local_experts", 8)
    return loss, single_experts(gradients, experts, mixtral), single_experts(trained, experts, mixtral)


def single_experts(tensors: Tensors, experts: int, mixtral: bool) -> Tensors:
    """PEFT's tensors of all experts → those of each module, as ParamWrapper's get_delta_weight takes them apart."""
    found = {}
    for name, tensor in tensors.items():
        place, _, kind = name.rpartition(".lora_")
        if not place.endswith(("experts", "base_layer")):
            found[name] = tensor
            continue
        leaves = ("gate_proj", "up_proj") if place.endswith("base_layer") else ("down_proj",)
        place = place.removesuffix(".base_layer")
        if mixtral:
            place, leaves = place.replace(".mlp.", ".block_sparse_moe."), ("w1", "w3") if len(leaves) == 2 else ("w2",)
        for e in range(experts):
            if kind == "A.weight":
                own = [tensor.reshape(experts, -1, tensor.size(1))[e]] * len(leaves)
            else:
                own = list(tensor.reshape(tensor.size(0), -1, experts)[:, :, e].chunk(len(leaves)))
            found |= {f"{place}.{e}.{leaf}.lora_{kind}": one for leaf, one in zip(leaves, own, strict=True)}
    return found


def assert_trained(model: Path, layout: str, folder: Path, ratio: float, expected: Any) -> None:
    """From the folder's adapters: the loss, the gradients and what three steps make of them. `ratio`: LoRA+'s."""
    loss, gradients, trained = expected
    adapter = AdapterSection(name="lora", path=str(folder), learning_rate_ratio=ratio)
    losses, found, then = run(model, layout, adapter)
    assert losses[0] == pytest.approx(loss, rel=1e-6)
    assert_close(found, gradients)
    assert_close(then, trained)


@functools.cache
def trained_by_peft(model: Path, folder: Path, ratio: float = 1.0) -> Any:
    return run_ranks(_trained_by_peft, 1, model, folder, ratio)[0]


@pytest.mark.parametrize(
    ("variant", "method", "layout"), cases("lora", "rslora", "lora+", slow=("mixtral", "lora", "one rank"))
)
def test_as_peft(models: Any, variant: str, method: str, layout: str) -> None:
    """A folder of PEFT's, loaded and trained on as PEFT does: with one A for gate and up."""
    model, ratio = models(variant), RATIOS.get(method, 1.0)
    settings = METHODS.get(method, {})
    folder = peft_folder(model, model.parent / f"{variant}-stacks-{'-'.join(settings)}", **settings)
    assert_trained(model, layout, folder, ratio, trained_by_peft(model, folder, ratio))


# --- against the definition -------------------------------------------------------------------------------------------


def expert_folder(model: Path, folder: Path, **settings: Any) -> Path:
    """A folder as PEFT wrote it with transformers 4: random adapters on attention and on each expert by itself."""
    if not folder.exists():
        generator = torch.Generator().manual_seed(3)
        adapters = {}
        for name, weight in load_file(model / "model.safetensors").items():
            if weight.dim() == 2 and name.split(".")[-2].endswith(("_proj", "w1", "w2", "w3")):
                rows, columns = weight.shape
                place = f"base_model.model.{name.removesuffix('.weight')}"
                adapters[f"{place}.lora_A.weight"] = 0.1 * torch.randn(RANK, columns, generator=generator)
                adapters[f"{place}.lora_B.weight"] = 0.1 * torch.randn(rows, RANK, generator=generator)
                if settings.get("use_dora"):
                    spread = 1 + 0.2 * torch.randn(rows, generator=generator)
                    adapters[f"{place}.lora_magnitude_vector"] = weight.norm(dim=1) * spread
        folder.mkdir()
        save_file(adapters, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["all-linear"], **settings}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


class Defined:
    """transformers' model with W + scaling · B A (DoRA: its rows normalized, times a magnitude) for adapted weights."""

    def __init__(self, base: Any, tensors: Tensors, scaling: float) -> None:
        self.base, self.scaling = base, scaling
        self.tensors = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
        self.weights = {name: weight.detach() for name, weight in base.named_parameters()}

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.tensors.items()

    def adapted(self, module: str, weight: torch.Tensor) -> torch.Tensor:
        if f"{module}.lora_A.weight" not in self.tensors:
            return weight
        a, b = (self.tensors[f"{module}.lora_{which}.weight"] for which in "AB")
        whole = weight + self.scaling * b @ a
        magnitude = self.tensors.get(f"{module}.lora_magnitude_vector")
        return whole if magnitude is None else whole * (magnitude / whole.norm(dim=1).detach())[:, None]

    def __call__(self, tokens: torch.Tensor) -> Any:
        from torch.func import functional_call

        weights = {}
        for name, weight in self.weights.items():
            module = name.removesuffix(".weight")
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                place, leaves = module.rpartition(".")[0], ["down_proj"]
                if name.endswith("gate_up_proj"):
                    leaves = ["gate_proj", "up_proj"]
                if self.base.config.model_type == "mixtral":
                    place = place.replace(".mlp.", ".block_sparse_moe.")
                    leaves = [{"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[leaf] for leaf in leaves]
                weights[name] = torch.stack(
                    [
                        torch.cat(
                            [
                                self.adapted(f"{place}.{e}.{leaf}", part)
                                for leaf, part in zip(leaves, own.chunk(len(leaves)), strict=True)
                            ]
                        )
                        for e, own in enumerate(weight)
                    ]
                )
            elif weight.dim() == 2:
                weights[name] = self.adapted(module, weight)
        return functional_call(self.base, weights, (tokens,))


def _opened(model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )


def _trained_as_defined(model: Path, folder: Path, ratio: float) -> tuple[float, Tensors, Tensors]:
    config = json.loads((folder / "adapter_config.json").read_text())
    scaling = ALPHA / (RANK**0.5 if config.get("use_rslora") else RANK)
    tensors = load_file(folder / "adapter_model.safetensors")
    defined: Any = Defined(
        _opened(model), {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}, scaling
    )
    return peft_steps(defined, defined.base.config.vocab_size, ratio=ratio)


@functools.cache
def trained_as_defined(model: Path, folder: Path, ratio: float = 1.0) -> Any:
    return run_ranks(_trained_as_defined, 1, model, folder, ratio)[0]


@pytest.mark.parametrize(
    ("variant", "method", "layout"),
    cases("lora", "rslora", "lora+", "dora", slow=("qwen3-moe", "lora", "EP2xTP2xETP1")),
)
def test_as_defined(models: Any, variant: str, method: str, layout: str) -> None:
    """Each module has an A of its own."""
    model, ratio = models(variant), RATIOS.get(method, 1.0)
    settings = METHODS.get(method, {})
    folder = expert_folder(model, model.parent / f"{variant}-experts-{'-'.join(settings)}", **settings)
    assert_trained(model, layout, folder, ratio, trained_as_defined(model, folder, ratio))


def _pissa_losses(model: Path) -> list[float]:
    """PiSSA's definition: the first singular values' part of each weight is trained, the rest stays."""
    base: Any = _opened(model)
    defined: Any = Defined(base, {}, ALPHA / RANK)
    tensors: Tensors = {}

    def taken_out(module: str, weight: torch.Tensor) -> torch.Tensor:
        if not module.rpartition(".")[2].endswith(("_proj", "w1", "w2", "w3")):
            return weight
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        root = (s[:RANK] / defined.scaling).sqrt()
        a, b = root[:, None] * v[:RANK], u[:, :RANK] * root
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = a, b
        return weight - defined.scaling * b @ a

    defined.adapted = taken_out
    rest: dict[str, torch.Tensor] = {}

    def remember(base: Any, args: Any, kwargs: Any) -> None:
        rest.update({name: value.detach().clone() for name, value in base.named_parameters()})

    handle = base.register_forward_pre_hook(remember, with_kwargs=True)
    with torch.no_grad():
        defined(torch.zeros(1, 2, dtype=torch.int64))
    handle.remove()
    started: Any = Defined(base, tensors, defined.scaling)
    started.weights = rest
    losses = []
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.1} for p in started.tensors.values()], lr=LEARNING_RATE, betas=(0.9, 0.95)
    )
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(started, base.config.vocab_size)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(started.tensors.values()), 0.1)
        optimizer.step()
        losses.append(float(loss))
    return losses


@functools.cache
def pissa_losses(model: Path) -> list[float]:
    return run_ranks(_pissa_losses, 1, model)[0]


@pytest.mark.parametrize(("variant", "method", "layout"), cases("pissa"))
def test_pissa(models: Any, variant: str, method: str, layout: str) -> None:
    """Singular vectors' signs are free, so what is compared is the losses of the steps."""
    model = models(variant)
    adapter = AdapterSection(name="lora", rank=RANK, alpha=ALPHA, targets=["all-linear"], init="pissa")
    losses, _, _ = run(model, layout, adapter)
    assert losses == pytest.approx(pissa_losses(model), rel=1e-6)
    assert losses[-1] < losses[0]


# --- what is written --------------------------------------------------------------------------------------------------

WRITTEN = {
    "own A": (expert_folder, {}),
    "rslora": (expert_folder, {"use_rslora": True}),
    "shared A": (peft_folder, {}),
    "gate_up alone": (peft_folder, {"target_parameters": ["layers.0.mlp.experts.gate_up_proj"]}),
    "down alone": (peft_folder, {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}),
}
WRITTEN_CASES = [
    ("qwen3-moe", "own A", "EP2xTP2xETP1"),
    ("qwen3-moe", "rslora", "EP2xTP2"),
    ("qwen3-moe", "shared A", "EP2xPP2"),
    ("qwen3-moe", "gate_up alone", "PP2"),
    ("qwen3-moe", "down alone", "TP2+SP"),
    ("mixtral", "own A", "TP2xPP2"),
    ("mixtral", "shared A", "EP2xTP2"),
    ("mixtral", "rslora", "one rank"),
    ("qwen2-moe", "own A", "EP2xTP2"),
]


@pytest.mark.parametrize(
    ("variant", "kind", "layout"),
    [
        pytest.param(*case, marks=pytest.mark.slow if number == 0 else pytest.mark.nightly, id="-".join(case))
        for number, case in enumerate(WRITTEN_CASES)
    ],
)
def test_peft_opens_what_is_written(models: Any, tmp_path: Path, variant: str, kind: str, layout: str) -> None:
    """Dense layers beside the experts, shared experts too. What is written is read again without a bit's difference."""
    model = models(variant)
    make, settings = WRITTEN[kind]
    folder = make(model, tmp_path / "given", **settings)
    place = LAYOUTS[layout]
    recipe = recipe_for(model, place, adapter=AdapterSection(name="lora", path=str(folder)))
    run_ranks(write_rank, parallel.resolve(place, world_size=None).world_size, recipe, tmp_path / "one")
    again = AdapterSection(name="lora", path=str(tmp_path / "one/adapter"))
    run_ranks(write_rank, 1, recipe_for(model, ParallelSection(), adapter=again), tmp_path / "two")
    one, two = (load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    merged, adapted, given = run_ranks(_logits, 1, tmp_path / "one/hf", model, tmp_path / "one/adapter", folder)[0]
    assert (merged - adapted).abs().max() <= 1e-5 * adapted.abs().max()
    if given is not None:
        assert (merged - given).abs().max() <= 1e-5 * adapted.abs().max()


def _logits(merged: Path, model: Path, *folders: Path) -> list[torch.Tensor | None]:
    """Of the merged model, and of PEFT's with each adapter; None for those that PEFT gives other numbers for: of single
    experts."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(40).view(2, 20)
    plain: Any = AutoModelForCausalLM.from_pretrained(merged)
    with torch.no_grad():
        found: list[torch.Tensor | None] = [plain(tokens).logits]
        for folder in folders:
            if json.loads((folder / "adapter_config.json").read_text()).get("target_modules") == ["all-linear"]:
                found.append(None)
                continue
            base: Any = AutoModelForCausalLM.from_pretrained(model)
            found.append(PeftModel.from_pretrained(base, str(folder))(tokens).logits)
    return found
