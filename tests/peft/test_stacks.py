"""Adapters on all of a layer's experts at once: names, places, and what a folder can have wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mcore_swift.errors import InputError
from mcore_swift.peft import fused
from mcore_swift.peft.peft_folder import read_settings
from mcore_swift.recipe import AdapterSection
from mcore_swift.training.adapters import settings_of

MODULES = [
    f"model.layers.{i}.block_sparse_moe.experts.{e}.{leaf}"
    for i in (0, 2)
    for e in range(3)
    for leaf in ("w1", "w2", "w3")
]
GATED = "model.layers.0.mlp.experts.gate_up_proj"


def test_names() -> None:
    stacks = fused.stacks_of(["model.layers.0.self_attn.q_proj", *MODULES])
    assert list(stacks) == [
        f"model.layers.{i}.mlp.experts.{leaf}" for i in (0, 2) for leaf in ("gate_up_proj", "down_proj")
    ]
    assert stacks[GATED].modules[1] == tuple(f"model.layers.0.block_sparse_moe.experts.1.w{n}" for n in (1, 3))
    place = "model.layers.0.mlp.experts"
    both = fused.stack_names([place, f"{place}.base_layer", "model.layers.0.mlp.up_proj"], [])
    assert both == {place: f"{place}.down_proj", f"{place}.base_layer": f"{place}.gate_up_proj"}
    assert fused.stack_names([place], ["experts.gate_up_proj"]) == {place: GATED}
    for targets, message in ((["q_proj"], "names none"), (["gate_up_proj", "down_proj"], "names both")):
        with pytest.raises(InputError, match=message):
            fused.stack_names([place], targets)


@pytest.mark.parametrize("apart", [False, True])
def test_places_are_pefts(apart: bool) -> None:
    """Every piece is what ParamWrapper's reshapes say, and together the pieces' products are the stack's."""
    stack = fused.stacks_of(MODULES)[GATED]
    adapter = fused.StackAdapter(stack, "experts", "F32", rank=4, columns=5, rows=6, apart=apart)
    generator = torch.Generator().manual_seed(1)
    file = {name: torch.randn(shape, generator=generator) for name, shape in adapter.shapes().items()}
    a, b = (file[f"experts.lora_{which}.weight"] for which in "AB")
    if apart:  # B's blocks off the diagonal
        b.view(2, 3, 2, 2, 3)[0, :, 1] = 0
        b.view(2, 3, 2, 2, 3)[1, :, 0] = 0
    pieces = dict(adapter.pieces())
    wanted = torch.einsum("ore,eri->eoi", b.reshape(6, 4, 3), a.reshape(3, 4, 5))
    for e, modules in enumerate(stack.modules):
        found = []
        for module in modules:
            own = [pieces[f"{module}.lora_{which}.weight"] for which in "AB"]
            read = [piece.read(lambda name, rows: file[name][rows]) for piece in own]
            assert [tuple(tensor.shape) for tensor in read] == [piece.shape for piece in own]
            assert all(
                torch.equal(tensor, piece.of(file[piece.source])) for tensor, piece in zip(read, own, strict=True)
            )
            part = own[1].read(lambda name, rows: file[name][rows], slice(1, 3), slice(1, 2))
            assert torch.equal(part, read[1][1:3, 1:2])
            found.append(read[1] @ read[0])
        assert torch.allclose(torch.cat(found), wanted[e], atol=1e-6)
    if apart:
        b[0, 7] = 1e-9
        with pytest.raises(InputError, match=r"lora_B.weight mixes what gate and up have of A"):
            pieces[f"{stack.modules[1][0]}.lora_B.weight"].read(lambda name, rows: file[name][rows])


def folder_of(folder: Path, **changes: Any) -> Path:
    place = "base_model.model.model.layers.0.mlp.experts"
    shapes = {"base_layer.lora_A": (12, 5), "base_layer.lora_B": (6, 12), "lora_A": (12, 3), "lora_B": (5, 12)}
    save_file(
        {f"{place}.{name}.weight": torch.ones(shape) for name, shape in shapes.items()},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_parameters": ["gate_up_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return folder


def test_settings(tmp_path: Path) -> None:
    settings, targets = read_settings(folder_of(tmp_path))
    assert (settings.rank, settings.share_experts_a, settings.share_a) == (4, True, False)
    for dropout in (0.0, 0.1):  # the folder can't have any
        section = AdapterSection(name="lora", path=str(tmp_path), dropout=dropout)
        assert settings_of(section, seed=1)[0].dropout == dropout
    assert sorted(targets) == ["model.layers.0.mlp.experts.down_proj", GATED]
    twice = {"rank_pattern": {"gate_up_proj": 8}, "alpha_pattern": {"gate_up_proj": 16}}
    settings, _ = read_settings(folder_of(tmp_path, **twice))
    assert (settings.rank, settings.share_experts_a) == (4, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rank_pattern": {"gate_up_proj": 8}},
            r"alpha_pattern: None .* rank 8 and scaling 1; allowed: rank 4 or 8 and",
        ),
        ({"rank_pattern": {"gate_up_proj": 3}}, r"rank_pattern: .*\.gate_up_proj rank 3 .*; allowed: rank 4 or 8"),
        ({"rank_pattern": {"down_proj": 8}}, r"rank_pattern: .*\.down_proj rank 8 .*; allowed: rank 4 and scaling 2"),
    ],
)
def test_what_training_cannot_take(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_settings(folder_of(tmp_path, **changes))


def test_shapes_of_another_model(tmp_path: Path) -> None:
    stack = fused.stacks_of(MODULES)[GATED]
    entries = {"experts.lora_A.weight": torch.ones(16, 5), "experts.lora_B.weight": torch.ones(6, 16)}

    class Entry:
        dtype = "F32"

        def __init__(self, shape: Any) -> None:
            self.shape = tuple(shape)

    with pytest.raises(InputError, match=r"lora_A.weight has shape \[16, 5\]; 3 experts at rank 4 give \[12, 5\]"):
        fused.adapter_in_file(stack, "experts", 4, apart=False, entries={n: Entry(t.shape) for n, t in entries.items()})
    del entries["experts.lora_B.weight"]
    with pytest.raises(InputError, match=r"experts has lora_A alone"):
        fused.adapter_in_file(stack, "experts", 4, apart=False, entries={n: Entry(t.shape) for n, t in entries.items()})
