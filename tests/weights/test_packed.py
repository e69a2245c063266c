"""Hugging Face tensors that pack all experts of a layer, in a running model: gpt-oss, in float, bf16 and MXFP4.

What is written is byte-equal at any layout, and a rank reads its own experts only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcore_swift.recipe import ParallelSection
from mcore_swift.weights.rules import TensorRule
from mcore_swift.weights.safetensors_io import SINGLE
from tests.ckpt_tools.mxfp4_folder import mxfp4_folder
from tests.distributed.harness import run_ranks
from tests.distributed.tiny_models import tiny_folder
from tests.weights.test_live import assert_same_tensors, load_and_export, load_message, ranks_of, tensors_of

GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"
LAYOUTS = {
    "EP2": ParallelSection(ep=2, dp=2),
    "EP2xTP2xETP1": ParallelSection(ep=2, tp=2, etp=1),
    "TP2xETP1": ParallelSection(tp=2, etp=1),
    "EP4": ParallelSection(ep=4, dp=4),
    "EP2xPP2xVPP2": ParallelSection(ep=2, pp=2, vpp=2, dp=2),
    "EP2xTP2xETP1xPP2": ParallelSection(ep=2, tp=2, etp=1, pp=2, dp=2),
}
QUICK, SLOW = {"EP2"}, {"EP2xTP2xETP1"}


def case(layout: str) -> Any:
    marks = () if layout in QUICK else pytest.mark.slow if layout in SLOW else pytest.mark.nightly
    return pytest.param(layout, marks=marks, id=layout)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], Path]:
    folder = tmp_path_factory.mktemp("models")
    return lambda dtype: tiny_folder(folder / str(dtype), "gpt-oss", dtype=dtype)


def test_gate_and_up_alternate_in_transposed_experts() -> None:
    packed = torch.arange(3 * 8).view(3, 8)  # [columns, g₀ u₀ g₁ u₁ …]
    rule = TensorRule("fc1", ("gate_up_proj",), 1, (4, 4) * 5, False, stack=5, packed=True, transposed=True)
    whole = rule.of_expert(2).unpack(packed)
    assert torch.equal(whole, torch.cat([packed[:, 0::2].T, packed[:, 1::2].T]))
    assert torch.equal(rule.of_expert(2).pack(whole), packed)
    assert rule.of_expert(2).expert == 2
    assert rule.hf_shapes((5, 8, 3)) == ((5, 3, 8),)
    assert rule.global_shape([(5, 3, 8)]) == (5, 8, 3)


def test_a_bias_has_no_columns() -> None:
    packed = torch.arange(8)
    rule = TensorRule("bias", ("gate_up_proj_bias",), 1, (4, 4) * 5, False, stack=5, packed=True)
    assert torch.equal(rule.of_expert(0).unpack(packed), torch.cat([packed[0::2], packed[1::2]]))
    assert torch.equal(rule.of_expert(0).pack(rule.of_expert(0).unpack(packed)), packed)
    assert rule.hf_shapes((5, 8)) == ((5, 8),)
    assert rule.global_shape([(5, 8)]) == (5, 8)


@pytest.mark.parametrize("layout", [case(layout) for layout in LAYOUTS])
def test_round_trip_is_byte_equal(tmp_path: Path, models: Any, layout: str) -> None:
    place = LAYOUTS[layout]
    for stored, max_shard_bytes in ((torch.float32, 10**9), (torch.bfloat16, 60_000)):
        folder: Path = models(stored)
        out = tmp_path / str(stored)
        arguments = (folder, out, place, stored, max_shard_bytes)
        read = run_ranks(load_and_export, ranks_of(place), *arguments, timeout=240)
        assert_same_tensors(out, folder)
        for bytes_read, own in read:
            assert own / 1.1 <= bytes_read <= 1.1 * own  # vocabulary padding is in `own` only


@pytest.mark.slow
def test_mxfp4_is_decoded_where_it_is_used(tmp_path: Path) -> None:
    folder, decoded = mxfp4_folder(tmp_path / "hub")
    out = tmp_path / "out"
    read = run_ranks(load_bf16_and_export, 2, folder, out, timeout=240)
    found = tensors_of(out)
    assert found.keys() == decoded.keys()
    for name, tensor in decoded.items():
        assert torch.equal(found[name].view(torch.int16), tensor.contiguous().view(torch.int16)), name
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    experts = sum(tensor.numel() for name, tensor in decoded.items() if name.endswith(("gate_up_proj", "down_proj")))
    rest = 2 * (sum(tensor.numel() for tensor in decoded.values()) - experts)
    for bytes_read in read:
        assert bytes_read <= experts / 2 * (17 / 32) + rest


def load_bf16_and_export(folder: Path, destination: Path) -> int:
    from mcore_swift.weights import live
    from mcore_swift.weights.hf_folder import dtype_of, export
    from mcore_swift.weights.safetensors_io import SafetensorsFolder
    from tests.weights.test_live import open_chunks

    source, chunks, rules = open_chunks(folder, LAYOUTS["EP2"], torch.bfloat16)
    tensors = SafetensorsFolder(folder)
    live.load(chunks, rules, tensors, tied=source.tied)
    export(chunks, rules, source, destination, dtype=dtype_of(source, live.decoded(tensors), "F32"))
    return tensors.bytes_read


# --- bad folders ------------------------------------------------------------------------------------------------------


def not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors[GATE_UP][7, 0, 0] = float("nan")


def fewer_columns(tensors: dict[str, torch.Tensor]) -> None:
    tensors[GATE_UP] = tensors[GATE_UP][:, :-1].contiguous()


def fewer_experts(tensors: dict[str, torch.Tensor]) -> None:
    tensors[GATE_UP] = tensors[GATE_UP][:4].contiguous()


def not_transposed(tensors: dict[str, torch.Tensor]) -> None:
    tensors[GATE_UP] = tensors[GATE_UP].mT.contiguous()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        pytest.param(not_a_number, f"tensor {GATE_UP} has NaN or infinite values", marks=pytest.mark.slow),
        (fewer_columns, f"{GATE_UP}: shape [8, 63, 80] where the config needs [8, 64, 80]"),
        pytest.param(fewer_experts, f"{GATE_UP}: shape [4, 64, 80] where the config", marks=pytest.mark.nightly),
        pytest.param(not_transposed, f"{GATE_UP}: shape [8, 80, 64] where the config", marks=pytest.mark.nightly),
    ],
)
def test_bad_tensors(
    tmp_path: Path, models: Any, edit: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    """Every rank raises the same message, although only one may have met the bad expert."""
    folder: Path = models(torch.float32)
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    found = run_ranks(load_message, 2, tmp_path, LAYOUTS["EP2"], timeout=240)
    assert len(set(found)) == 1
    assert message in found[0]
    assert str(tmp_path) in found[0]
