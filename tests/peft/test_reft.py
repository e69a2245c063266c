"""LoReFT against its formula in float64: hooked to transformers' model, reflections multiplied out one by one."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcore_swift.data.batch import MicroBatch
from mcore_swift.recipe import AdapterSection
from tests.distributed.harness import prepared, run_ranks
from tests.distributed.rank_model import assert_close, recipe_for
from tests.peft.method_run import LAYOUTS, Tensors, adapter_run, in_float64, write_rank

RANK, FIRST, LAST, LAYERS = 4, 3, 2, (0, 2, 3)
SETTINGS = {"method": "reft", "base_model": "b", "layers": list(LAYERS), "rank": RANK, "first_tokens": FIRST}
SETTINGS |= {"last_tokens": LAST}


def folder_of(model: Path) -> Path:
    folder = model.parent / f"{model.name}-reft"
    if not folder.exists():
        size = json.loads((model / "config.json").read_text())["hidden_size"]
        generator = torch.Generator().manual_seed(3)
        tensors = {}
        for layer in LAYERS:
            rows = torch.linalg.qr(torch.randn(size, RANK, generator=generator, dtype=torch.float64)).Q.T
            tensors[f"model.layers.{layer}.reft_r"] = rows.float().contiguous()
            tensors[f"model.layers.{layer}.reft_weight"] = 0.3 * torch.randn(RANK, size, generator=generator)
            tensors[f"model.layers.{layer}.reft_bias"] = torch.randn(RANK, generator=generator)
        folder.mkdir()
        save_file(tensors, folder / "adapter.safetensors")
        (folder / "adapter.json").write_text(json.dumps(SETTINGS))
    return folder


# --- the reference ----------------------------------------------------------------------------------------------------


def reflected(vectors: torch.Tensor) -> torch.Tensor:
    """The first columns of (I − τ v₁ v₁ᵀ) (I − τ v₂ v₂ᵀ) …; column i of `vectors` holds vᵢ below its 1 at place i."""
    size, rank = vectors.shape
    product = torch.eye(size, dtype=vectors.dtype)
    for i in range(rank):
        v = torch.cat([torch.zeros(i, dtype=vectors.dtype), torch.ones(1, dtype=vectors.dtype), vectors[i + 1 :, i]])
        product = product @ (torch.eye(size, dtype=vectors.dtype) - 2 / (v @ v) * torch.outer(v, v))
    return product[:, :rank]


def reflections_of(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Householder's own elimination: R [rank, hidden] → the vectors, and the signs of the rows that they give."""
    rest, vectors, signs = rows.T.clone(), torch.zeros_like(rows.T), []
    for i in range(len(rows)):
        x = rest[i:, i]
        goal = -x[0].sign() * x.norm()
        v = x - goal * torch.eye(len(x), dtype=x.dtype)[0]
        v = v / v[0]
        rest[i:] -= 2 / (v @ v) * torch.outer(v, v @ rest[i:])
        vectors[i + 1 :, i] = v[1:]
        signs.append(goal.sign())
    return vectors, torch.stack(signs)


def start_of(model: Path) -> Tensors:
    saved = {name: value.double() for name, value in load_file(folder_of(model) / "adapter.safetensors").items()}
    found = {}
    for place in (f"model.layers.{layer}" for layer in LAYERS):
        found[f"{place}.reft_rotation"], signs = reflections_of(saved[f"{place}.reft_r"])
        found[f"{place}.reft_weight"] = saved[f"{place}.reft_weight"] * signs[:, None]
        found[f"{place}.reft_bias"] = saved[f"{place}.reft_bias"] * signs
    return found


def hang(model: Any, tensors: Tensors) -> None:
    def hook(place: str) -> Any:
        def change(module: Any, args: Any, output: Any) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            r = reflected(tensors[f"{place}.reft_rotation"]).T
            changed = h + (h @ tensors[f"{place}.reft_weight"].T + tensors[f"{place}.reft_bias"] - h @ r.T) @ r
            position, length = torch.arange(h.size(1)), h.size(1)
            here = ((position < FIRST) | (position >= length - LAST))[None, :, None]
            h = torch.where(here, changed, h)
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return change

    for layer in LAYERS:
        model.get_submodule(f"model.layers.{layer}").register_forward_hook(hook(f"model.layers.{layer}"))


@functools.cache
def expected(model: Path) -> Any:
    return run_ranks(in_float64, 1, model, start_of(model), hang, ("reft_rotation",))[0]


# --- as defined -------------------------------------------------------------------------------------------------------


def case(variant: str, place: str, packing: bool = True) -> Any:
    marks = () if (variant, place, packing) == ("qwen3", "TP2+SP", True) else pytest.mark.nightly
    return pytest.param(variant, place, packing, marks=marks, id=f"{variant}-{place}-{'packed' if packing else 'rows'}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "place", "packing"),
    [
        *(case("qwen3", place) for place in LAYOUTS),
        case("qwen3", "TP2+SP", packing=False),
        case("qwen3", "CP2", packing=False),
        case("gemma2", "TP2+SP"),
        case("qwen3-moe", "TP2+SP"),
    ],
)
def test_as_defined(models: Any, variant: str, place: str, packing: bool) -> None:
    model = models(variant)
    losses, gradients, after = expected(model)
    adapter = AdapterSection(name="reft", path=str(folder_of(model)))
    found = adapter_run(model, LAYOUTS[place], adapter, packing=packing)
    assert found[0] == pytest.approx(losses, rel=1e-6)
    assert_close(found[1], gradients)
    assert_close(found[2], after)


@pytest.mark.nightly
def test_every_layout_starts_the_same(models: Any) -> None:
    adapter = AdapterSection(name="reft", rank=RANK, layers=[1, 3])
    one, four = (adapter_run(models("qwen3"), LAYOUTS[place], adapter) for place in ("one rank", "TP2xPP2"))
    assert four[0] == pytest.approx(one[0], rel=1e-6) and len(one[2]) == 2 * 3
    assert_close(four[2], one[2])


def test_chosen_positions() -> None:
    prepared()
    from mcore_swift.peft.reft import choose

    def batch(real: list[list[int]], cu_seqlens: list[int] | None) -> MicroBatch:
        whole = torch.tensor(real)
        return MicroBatch(
            tokens=whole,
            labels=whole,
            loss_mask=whole.float(),
            position_ids=whole,
            cu_seqlens=None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32),
            real=whole.bool(),
        )

    packed = choose(batch([[1] * 5 + [1] * 2 + [1] * 3 + [0] * 2], [0, 5, 7, 10, 12]), first=1, last=2)
    assert packed.int().tolist() == [[1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0]]
    rows = choose(batch([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], None), first=2, last=1)
    assert rows.int().tolist() == [[1, 1, 0, 1, 0, 0], [1, 1, 0, 0, 0, 1]]


# --- folders and checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_folder_written_and_read(models: Any, tmp_path: Path) -> None:
    """What is read is written again, up to the signs of the rows of R, W and b together."""
    model = models("qwen3")
    recipe = recipe_for(model, LAYOUTS["TP2xPP2"], adapter=AdapterSection(name="reft", path=str(folder_of(model))))
    run_ranks(write_rank, 4, recipe, tmp_path)
    ours, theirs = (load_file(place / "adapter.safetensors") for place in (tmp_path / "adapter", folder_of(model)))
    assert ours.keys() == theirs.keys()
    for layer in LAYERS:
        r, w, b = (f"model.layers.{layer}.reft_{kind}" for kind in ("r", "weight", "bias"))
        signs = (ours[b] * theirs[b]).sign()
        assert_close({r: ours[r] * signs[:, None]}, {r: theirs[r]}, tolerance=1e-6)
        assert torch.equal(ours[w] * signs[:, None], theirs[w]) and torch.equal(ours[b] * signs, theirs[b])
    assert json.loads((tmp_path / "adapter" / "adapter.json").read_text()) == SETTINGS | {"base_model": str(model)}
