"""Headers are checked, slices read only their bytes, and files that ranks write piece by piece are ordinary ones."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mcore_swift.errors import InputError
from mcore_swift.weights.live import DTYPE_NAMES
from mcore_swift.weights.safetensors_io import (
    INDEX,
    SINGLE,
    SafetensorsFolder,
    TensorSpec,
    create_files,
    plan_output,
    read_header,
    write_tensor,
)

TENSORS = {
    "small": torch.arange(3, dtype=torch.bfloat16),
    "matrix": torch.arange(70, dtype=torch.float32).reshape(10, 7),
    "halves": torch.arange(8, dtype=torch.float16).reshape(2, 2, 2),
    "empty": torch.empty(0, 4),
}
SPECS = {name: TensorSpec(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def write(folder: Path, max_shard_bytes: int) -> None:
    plan = plan_output(SPECS, max_shard_bytes=max_shard_bytes)
    create_files(folder, plan)
    for name, tensor in reversed(TENSORS.items()):  # any order
        write_tensor(folder, plan, name, tensor)


@pytest.mark.parametrize(("max_shard_bytes", "files"), [(10**9, 1), (300, 2), (1, 4)])
def test_written_files_are_read_by_the_library(tmp_path: Path, max_shard_bytes: int, files: int) -> None:
    write(tmp_path, max_shard_bytes)
    paths = sorted(tmp_path.glob("*.safetensors"))
    assert len(paths) == files
    found = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert (tmp_path / INDEX).exists() == (files > 1)
    if files > 1:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(spec.nbytes for spec in SPECS.values())
        assert {path.name for path in paths} == set(index["weight_map"].values())
    else:
        assert paths[0].name == SINGLE


@pytest.mark.parametrize("max_shard_bytes", [10**9, 1])
def test_folder_reads_back_what_was_written(tmp_path: Path, max_shard_bytes: int) -> None:
    write(tmp_path, max_shard_bytes)
    folder = SafetensorsFolder(tmp_path)
    assert {name: (e.dtype, e.shape) for name, e in folder.entries.items()} == {
        name: (spec.dtype, spec.shape) for name, spec in SPECS.items()
    }
    for name, tensor in TENSORS.items():
        assert torch.equal(folder.read(name), tensor)


def test_tensors_are_aligned_to_their_items() -> None:
    plan = plan_output(
        {"odd": TensorSpec("BF16", (3,)), "wide": TensorSpec("F64", (2,)), "byte": TensorSpec("U8", (1,))}
    )
    assert {name: offset % 8 for name, (_, offset) in plan.places.items()} == {"wide": 0, "odd": 0, "byte": 6}


def test_a_slice_reads_only_its_bytes(tmp_path: Path) -> None:
    write(tmp_path, 10**9)
    folder = SafetensorsFolder(tmp_path)
    assert torch.equal(folder.read("matrix", slice(2, 5), slice(1, 7)), TENSORS["matrix"][2:5, 1:7])
    assert folder.bytes_read == 3 * 6 * 4


# --- bad files --------------------------------------------------------------------------------------------------------


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(4, 4), "b": torch.ones(8)}, tmp_path / SINGLE)
    return tmp_path / SINGLE


@pytest.mark.parametrize(
    ("keep", "message"), [(-1, "truncated"), (60, "truncated"), (7, "truncated"), (0, "truncated")]
)
def test_truncated_file(single: Path, keep: int, message: str) -> None:
    single.write_bytes(single.read_bytes()[:keep])
    with pytest.raises(InputError, match=message) as error:
        SafetensorsFolder(single.parent)
    assert str(single) in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04\x95not a safetensors file",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"{,,}",
        struct.pack("<Q", 10) + b'{"a":{}}  ',
        struct.pack("<Q", 8) + b'{"a": 1}',
        struct.pack("<Q", 54) + b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]' + b"}}" + b" " * 8,
    ],
    ids=["pickle", "huge-header", "list", "not-json", "no-dtype", "not-a-table", "wrong-size"],
)
def test_not_a_safetensors_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / SINGLE
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a safetensors file, or truncated") as error:
        read_header(path)
    assert str(path) in str(error.value)


def test_no_weights_at_all(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"no model\.safetensors .*pickled \.bin files could execute code"):
        SafetensorsFolder(tmp_path)


def test_index_names_a_file_that_is_not_there(single: Path) -> None:
    (single.parent / INDEX).write_text(json.dumps({"weight_map": {"a": SINGLE, "c": "model-2.safetensors"}}))
    with pytest.raises(InputError, match=r"model-2\.safetensors: no such file"):
        SafetensorsFolder(single.parent)


def test_index_names_a_tensor_that_is_not_in_its_file(single: Path) -> None:
    (single.parent / INDEX).write_text(json.dumps({"weight_map": {"a": SINGLE, "c": SINGLE}}))
    with pytest.raises(InputError, match=r"tensor c is listed in model\.safetensors, but it is not there"):
        SafetensorsFolder(single.parent)


@pytest.mark.parametrize("text", ["{", "[]", '{"metadata": {}}'], ids=["not-json", "list", "no-map"])
def test_malformed_index(single: Path, text: str) -> None:
    (single.parent / INDEX).write_text(text)
    with pytest.raises(InputError, match=INDEX):
        SafetensorsFolder(single.parent)
