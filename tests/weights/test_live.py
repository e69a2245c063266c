"""A Hugging Face folder in a running model: loaded and saved at any layout it is byte-equal; a rank reads its own part.

Bad folders are refused with the tensor's name, and a full disk is everybody's error, not a hang.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mcore_swift import parallel
from mcore_swift.errors import InputError
from mcore_swift.models.build import build_chunks, read_source, tensor_rules, transformer_config
from mcore_swift.recipe import ParallelSection
from mcore_swift.weights import live
from mcore_swift.weights.hf_folder import export
from mcore_swift.weights.safetensors_io import INDEX, SINGLE, SafetensorsFolder
from tests.distributed.harness import prepared, run_ranks
from tests.distributed.tiny_models import REPRESENTATIVES, tiny_folder

LAYOUTS = {
    "TP1": ParallelSection(),
    "TP2": ParallelSection(tp=2),
    "PP2": ParallelSection(pp=2),
    "PP2xVPP2": ParallelSection(pp=2, vpp=2),
    "TP2xPP2": ParallelSection(tp=2, pp=2),
    "TP2xPP2xDP2": ParallelSection(tp=2, pp=2, dp=2),
    "CP2xDP2": ParallelSection(cp=2, dp=2),
}
SMALL_FILES = 60_000  # bytes; the tiny models have 200,000 to 700,000
slow, nightly = pytest.mark.slow, pytest.mark.nightly


def open_chunks(folder: Path, layout: ParallelSection, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Joins the job; this rank's source, chunks without weights, and rules."""
    plan = parallel.resolve(layout, world_size=int(os.environ["WORLD_SIZE"]))
    parallel.initialize(plan, prepared(), seed=1)
    source = read_source(folder)
    config = transformer_config(source, plan, prepared(), dtype=dtype)
    return source, build_chunks(source, config, plan, prepared()), tensor_rules(source, config)


def load_and_export(
    folder: Path, destination: Path, layout: ParallelSection, dtype: torch.dtype, max_shard_bytes: int
) -> tuple[int, int]:
    """On each rank. Returns the bytes read and the bytes of this rank's shards, in the folder's dtype."""
    source, chunks, rules = open_chunks(folder, layout, dtype)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))  # what isn't loaded shows
    tensors = SafetensorsFolder(folder)
    live.load(chunks, rules, tensors, tied=source.tied)
    entries = tensors.entries
    export(chunks, rules, source, destination, dtype=lambda name: entries[name].dtype, max_shard_bytes=max_shard_bytes)
    item = next(iter(entries.values())).dtype
    own = sum(shard.data.numel() for shard in live.local_shards(chunks)) * {"F32": 4, "BF16": 2}[item]
    return tensors.bytes_read, own


def replicas_after_another_layout(folder: Path) -> set[int]:
    """On each rank: the data parallel replica numbers of all that a DP2 model holds, in a process that was TP2."""
    live.sharded_state(open_chunks(folder, ParallelSection(tp=2), torch.float32)[1][0])
    parallel.shutdown()
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    _, (chunk,), _ = open_chunks(folder, ParallelSection(dp=2), torch.float32)
    return {item.replica_id[-1] for item in live.sharded_state(chunk).values()}


def ranks_of(layout: ParallelSection) -> int:
    return parallel.resolve(layout, world_size=None).world_size


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_tensors(found: Path, expected: Path) -> None:
    ours, theirs = tensors_of(found), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert ours[name].shape == tensor.shape
        assert torch.equal(ours[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("models")
    return lambda variant, dtype: tiny_folder(folder / f"{variant}-{dtype}".replace(".", "-"), variant, dtype=dtype)


SLOW = {"TP2xPP2xDP2"}  # for every variant; the other layouts for some
QUICK = {("qwen2-tied", "TP2xPP2")}
SOME = {("qwen3", "TP2"), ("llama-rope-llama3", "PP2xVPP2"), ("mistral-window", "TP1")}


def case(variant: str, layout: str) -> Any:
    marks = () if (variant, layout) in QUICK else slow if layout in SLOW or (variant, layout) in SOME else nightly
    return pytest.param(variant, layout, marks=marks, id=f"{variant}-{layout}")


@pytest.mark.parametrize(
    ("variant", "layout"),
    [case(variant, layout) for variant in (*REPRESENTATIVES, "llama-biases") for layout in LAYOUTS],
)
def test_round_trip_is_byte_equal(tmp_path: Path, models: Any, variant: str, layout: str) -> None:
    """Float32 in one file, bfloat16 in several, and a bfloat16 folder in a float32 model (training on the CPU)."""
    for stored, model_dtype, max_shard_bytes in (
        (torch.float32, torch.float32, 10**9),
        (torch.bfloat16, torch.bfloat16, SMALL_FILES),
        (torch.bfloat16, torch.float32, 10**9),
    ):
        folder: Path = models(variant, stored)
        out = tmp_path / f"{stored}-{model_dtype}"
        read = run_ranks(
            load_and_export, ranks_of(LAYOUTS[layout]), folder, out, LAYOUTS[layout], model_dtype, max_shard_bytes
        )
        assert_same_tensors(out, folder)
        for bytes_read, own in read:
            assert own / 1.1 <= bytes_read <= 1.1 * own  # vocabulary padding is in `own` only
        files = list(out.glob("*.safetensors"))
        assert len(files) == 1 if max_shard_bytes > SMALL_FILES else len(files) > 3
        assert (out / INDEX).exists() == (len(files) > 1)
        assert not list(tmp_path.glob(".*")), "nothing half-written stays"


def test_ranks_of_tp2_pp2_read_a_quarter(tmp_path: Path, models: Any) -> None:
    folder: Path = models("qwen3", torch.float32)
    total = sum(tensor.numel() for tensor in tensors_of(folder).values()) * 4
    layout = LAYOUTS["TP2xPP2"]
    for bytes_read, own in run_ranks(load_and_export, 4, folder, tmp_path / "out", layout, torch.float32, 10**9):
        assert bytes_read <= 1.1 * own
        assert bytes_read <= 0.3 * total


def test_a_folder_in_several_files_is_read(tmp_path: Path, models: Any) -> None:
    from transformers import AutoModelForCausalLM

    folder: Path = models("qwen3", torch.float32)
    sharded, out = tmp_path / "sharded", tmp_path / "out"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    run_ranks(load_and_export, 2, sharded, out, LAYOUTS["TP2"], torch.float32, 10**9)
    assert_same_tensors(out, folder)


@pytest.mark.parametrize("max_shard_bytes", [SMALL_FILES, 10**9])
def test_transformers_opens_what_was_written(tmp_path: Path, models: Any, max_shard_bytes: int) -> None:
    from transformers import AutoModelForCausalLM

    folder: Path = models("llama-rope-llama3", torch.float32)
    out = tmp_path / "out"
    run_ranks(load_and_export, 4, folder, out, LAYOUTS["TP2xPP2"], torch.float32, max_shard_bytes)
    for path in out.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    opened: Any = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    again, info = opened
    assert not any(info.values())
    original = AutoModelForCausalLM.from_pretrained(folder)
    assert again.config.to_dict() == original.config.to_dict() | {"_name_or_path": again.config._name_or_path}
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, original(tokens).logits)


def test_vocabulary_padding_is_zero(models: Any) -> None:
    folder: Path = models("qwen3", torch.float32)  # vocabulary 101, padded to 102
    first, second = run_ranks(last_vocabulary_row, 2, folder)
    assert first[1] > 0
    assert second == (51, 0.0)


def last_vocabulary_row(folder: Path) -> tuple[int, float]:
    source, chunks, rules = open_chunks(folder, LAYOUTS["TP2"], torch.float32)
    live.load(chunks, rules, SafetensorsFolder(folder), tied=source.tied)
    rows = chunks[0].output_layer.weight.data
    return len(rows), float(rows[-1].abs().max())


# --- bad folders ------------------------------------------------------------------------------------------------------

Tensors = dict[str, torch.Tensor]
UP = "model.layers.2.mlp.up_proj.weight"
Q = "model.layers.1.self_attn.q_proj.weight"
K = "model.layers.1.self_attn.k_proj.weight"
NORM = "model.layers.3.input_layernorm.weight"


def drop(tensors: Tensors) -> None:
    del tensors[UP]


def rename(tensors: Tensors) -> None:
    tensors["model.layers.2.mlp.upproj.weight"] = tensors.pop(UP)


def add(tensors: Tensors) -> None:
    tensors["model.layers.4.mlp.up_proj.weight"] = tensors[UP].clone()


def fewer_rows(tensors: Tensors) -> None:
    tensors[Q] = tensors[Q][:-1].clone()


def fewer_columns(tensors: Tensors) -> None:
    tensors[Q] = tensors[Q][:, :-1].clone()


def fewer_columns_in_second_part(tensors: Tensors) -> None:
    tensors[K] = tensors[K][:, :-1].clone()


def scalar(tensors: Tensors) -> None:
    tensors[NORM] = torch.tensor(1.0)


def one_dimension(tensors: Tensors) -> None:
    tensors[Q] = tensors[Q].flatten()


def longer_norm(tensors: Tensors) -> None:
    tensors[NORM] = torch.ones(len(tensors[NORM]) + 1)


def small_embedding(tensors: Tensors) -> None:
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:90].clone()


def not_a_number(tensors: Tensors) -> None:
    tensors[UP][-1, -1] = float("nan")


def infinite(tensors: Tensors) -> None:
    tensors[NORM][0] = float("inf")


def integers(tensors: Tensors) -> None:
    tensors[Q] = tensors[Q].to(torch.int8)


BAD = [
    (drop, f"1 missing: {UP}"),
    (rename, f"1 missing: {UP} | 1 unexpected: model.layers.2.mlp.upproj.weight Did you mean"),
    (add, "1 unexpected: model.layers.4.mlp.up_proj.weight"),
    (fewer_rows, f"{Q} has 95 rows, the config says 96"),
    (fewer_columns, Q),
    (fewer_columns_in_second_part, K),
    (one_dimension, Q),
    (scalar, NORM),
    (longer_norm, NORM),
    (small_embedding, "model.embed_tokens.weight"),
    (not_a_number, f"tensor {UP} has NaN or infinite values"),
    (infinite, f"tensor {NORM} has NaN or infinite values"),
    (integers, f"{Q} is I8; allowed: F32, BF16, F16"),
]


def load_message(folder: Path, layout: ParallelSection) -> str:
    """The InputError of this rank's load; every rank leaves together."""
    source, chunks, rules = open_chunks(folder, layout, torch.float32)
    try:
        live.load(chunks, rules, SafetensorsFolder(folder), tied=source.tied)
    except InputError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize(("edit", "message"), BAD, ids=[edit.__name__ for edit, _ in BAD])
@pytest.mark.parametrize("layout", ["TP1", pytest.param("TP2xPP2", marks=slow)])
def test_bad_tensors(tmp_path: Path, models: Any, layout: str, edit: Callable[[Tensors], None], message: str) -> None:
    """Every rank raises the same message, although only one may have met the bad tensor."""
    folder: Path = models("qwen3", torch.float32)
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    found = run_ranks(load_message, ranks_of(LAYOUTS[layout]), tmp_path, LAYOUTS[layout])
    assert len(set(found)) == 1
    assert message in found[0]
    assert str(tmp_path) in found[0]
    assert re.match(r"(?s)[^\n]{,600}$", found[0])


# --- a full disk ------------------------------------------------------------------------------------------------------


def export_on_full_disk(folder: Path, destination: Path, call: str, rank: str) -> tuple[str, list[str]]:
    """Exports with `os.<call>` failing on one rank; the error's message, and what is beside the destination then."""
    source, chunks, rules = open_chunks(folder, LAYOUTS["TP2xPP2"], torch.float32)
    live.load(chunks, rules, SafetensorsFolder(folder), tied=source.tied)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if os.environ["RANK"] == rank:
        setattr(os, call, full)
    try:
        export(chunks, rules, source, destination, dtype=lambda name: "F32")
    except InputError as error:
        torch.distributed.barrier()
        return str(error), sorted(path.name for path in destination.parent.iterdir())
    return "exported", []


@pytest.mark.parametrize(("call", "rank"), [("posix_fallocate", "0"), ("pwrite", "0"), ("pwrite", "3")])
def test_disk_full(tmp_path: Path, models: Any, call: str, rank: str) -> None:
    destination = tmp_path / "hf"
    destination.mkdir()
    (destination / "earlier").write_text("stays")
    found = run_ranks(export_on_full_disk, 4, models("qwen3", torch.float32), destination, call, rank, timeout=60)
    for message, left in found:
        assert message == f"{destination}: could not be written: No space left on device; nothing was left there"
        assert left == ["hf"]
    assert [path.name for path in destination.iterdir()] == ["earlier"]


def test_a_process_may_change_its_layout(models: Any) -> None:
    """Megatron keeps the data parallel group in the metadata it is given: a later layout must not find it there."""
    assert run_ranks(replicas_after_another_layout, 2, models("qwen3", torch.float32)) == [{0}, {1}]
