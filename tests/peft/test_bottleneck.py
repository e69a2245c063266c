"""Bottleneck adapters against their formula, hooked to transformers' model in float64."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcore_swift.errors import InputError
from mcore_swift.recipe import AdapterSection, RuntimeSection
from tests.distributed.harness import run_ranks
from tests.distributed.rank_model import assert_close, recipe_for
from tests.peft.method_run import LAYOUTS, Tensors, adapter_run, in_float64, write_rank

RANK = 6
SETTINGS = {"method": "bottleneck", "base_model": "b", "targets": ["attention", "mlp"], "rank": RANK}
ACTIVATIONS = {"gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}


def folder_of(model: Path, activation: str, *, halves: tuple[str, ...] = ("self_attn", "mlp")) -> Path:
    """A folder with random adapters on all layers, so that no gradient vanishes."""
    folder = model.parent / f"{model.name}-bottleneck-{activation}"
    if not folder.exists():
        size = json.loads((model / "config.json").read_text())["hidden_size"]
        generator = torch.Generator().manual_seed(3)
        shapes = {"down.weight": (RANK, size), "down.bias": (RANK,), "up.weight": (size, RANK), "up.bias": (size,)}
        tensors = {
            f"model.layers.{layer}.{half}.adapter_{kind}": 0.2 * torch.randn(shape, generator=generator)
            for layer in range(4)
            for half in halves
            for kind, shape in shapes.items()
        }
        folder.mkdir()
        save_file(tensors, folder / "adapter.safetensors")
        (folder / "adapter.json").write_text(json.dumps(SETTINGS | {"activation": activation}))
    return folder


def hang(activation: str, model: Any, tensors: Tensors) -> None:
    act = ACTIVATIONS[activation]

    def hook(name: str) -> Any:
        down, d, up, u = (
            tensors[f"{name}.adapter_{kind}"] for kind in ("down.weight", "down.bias", "up.weight", "up.bias")
        )

        def change(module: Any, args: Any, output: Any) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            h = h + act(h @ down.T + d) @ up.T + u
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return change

    for name in dict.fromkeys(name.split(".adapter_")[0] for name in tensors):
        model.get_submodule(name).register_forward_hook(hook(name))


@functools.cache
def expected(model: Path, activation: str) -> Any:
    start = load_file(folder_of(model, activation) / "adapter.safetensors")
    return run_ranks(in_float64, 1, model, start, functools.partial(hang, activation))[0]


def case(variant: str, place: str, activation: str = "gelu", **runtime: Any) -> Any:
    kept = (variant, place) in {("llama-biases", "PP2"), ("qwen3", "TP2+SP")}
    marks = pytest.mark.slow if kept or (variant, place) == ("qwen3", "TP2+SP") else pytest.mark.nightly
    return pytest.param(variant, place, activation, runtime, marks=marks, id=f"{variant}-{place}-{activation}")


@pytest.mark.parametrize(
    ("variant", "place", "activation", "runtime"),
    [
        *(case("qwen3", place) for place in LAYOUTS),
        case("llama-biases", "TP2+SP"),
        case("llama-biases", "PP2", "silu", recompute="full"),
        case("gemma2", "TP2+SP"),
        case("qwen3-moe", "TP2+SP"),
    ],
)
def test_as_defined(models: Any, variant: str, place: str, activation: str, runtime: dict[str, Any]) -> None:
    model = models(variant)
    losses, gradients, after = expected(model, activation)
    adapter = AdapterSection(name="bottleneck", path=str(folder_of(model, activation)))
    found = adapter_run(model, LAYOUTS[place], adapter, runtime=RuntimeSection(device="cpu", **runtime))
    assert found[0] == pytest.approx(losses, rel=1e-6)
    assert_close(found[1], gradients)
    assert_close(found[2], after)


@pytest.mark.nightly
def test_it_starts_as_the_model_and_at_every_layout_the_same(models: Any) -> None:
    model = models("qwen3")
    adapter = AdapterSection(name="bottleneck", rank=RANK, targets=["mlp", "model.layers.0.self_attn"])
    plain = run_ranks(in_float64, 1, model, {"unused": torch.zeros(1)}, add_nothing)[0][0][0]
    one, four = (adapter_run(model, LAYOUTS[place], adapter) for place in ("one rank", "TP2xPP2"))
    assert one[0][0] == pytest.approx(plain, rel=1e-6) and one[0][-1] < plain
    assert len(one[2]) == 5 * 4
    assert_close(four[2], one[2])


def add_nothing(model: Any, tensors: Tensors) -> None:
    model.get_submodule("model.norm").register_forward_hook(lambda module, args, output: output + tensors["unused"])


@pytest.mark.slow
def test_folder_written_and_read(models: Any, tmp_path: Path) -> None:
    model = models("qwen3")
    folder = folder_of(model, "silu")
    recipe = recipe_for(model, LAYOUTS["TP2xPP2"], adapter=AdapterSection(name="bottleneck", path=str(folder)))
    run_ranks(write_rank, 4, recipe, tmp_path)
    ours, theirs = (load_file(place / "adapter.safetensors") for place in (tmp_path / "adapter", folder))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    written = json.loads((tmp_path / "adapter" / "adapter.json").read_text())
    assert written == SETTINGS | {"activation": "silu", "base_model": str(model)}
    assert not (tmp_path / "hf").exists()  # nothing could hold them


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "reft"}, r"method: found 'reft', but adapter.name is bottleneck"),
        ({"more": 1}, "more is unknown; needed are"),
        ({"rank": 0}, "found rank 0, activation gelu; allowed: rank at least 1"),
        ({"activation": "tanh"}, "found rank 6, activation tanh; allowed: .* activation gelu, relu, silu"),
        ({"rank": "six"}, "rank: found 'six'; it must be"),
    ],
)
def test_folders_that_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    from mcore_swift.peft import bottleneck, own_folder

    (tmp_path / "adapter.json").write_text(json.dumps(SETTINGS | {"activation": "gelu"} | changes))
    with pytest.raises(InputError, match=message):
        own_folder.read_settings(tmp_path, "bottleneck", bottleneck.Settings)
