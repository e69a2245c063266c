"""Wrong input to `convert`: one clear message, exit code 2, nothing left where DST should be, no code run."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tools import convert as convert_module
from ckpt_tools import partial
from ckpt_tools.convert import convert
from mcore_swift import cli
from tests.distributed.tiny_models import tiny_folder

WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"
Break = Callable[[Path], Any]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("originals")
    hf = tiny_folder(home / "hf", "qwen3")
    tied = tiny_folder(home / "tied", "qwen2-tied")
    convert(hf, home / "megatron", workers=1)
    sharded = home / "sharded"
    convert(home / "megatron", sharded, workers=1, max_shard_size=100_000)
    return {"hf": hf, "tied": tied, "megatron": home / "megatron", "sharded": sharded}


def refused(source: Path, capsys: pytest.CaptureFixture[str], *options: str, target: Path | None = None) -> str:
    """The message of a conversion that must fail with exit code 2 and leave nothing."""
    target = target or source.parent / "out"
    before = sorted(source.parent.iterdir())
    assert cli.main(["convert", str(source), str(target), "--workers", "2", *options]) == 2
    assert sorted(source.parent.iterdir()) == before
    message = capsys.readouterr().err
    assert message.startswith("mcore-swift: error: ") and "Traceback" not in message
    return message


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def layers(number: int) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update(num_hidden_layers=number, layer_types=["full_attention"] * number)


def config(change: Callable[[dict[str, Any]], Any]) -> Break:
    return lambda folder: edit_json(folder / "config.json", change)


def weight_map(change: Callable[[dict[str, Any]], Any]) -> Break:
    return lambda folder: edit_json(folder / f"{WEIGHTS}.index.json", lambda index: change(index["weight_map"]))


def state(change: Callable[[dict[str, torch.Tensor]], Any]) -> Break:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        (folder / WEIGHTS).unlink()
        save_file(tensors, folder / WEIGHTS)

    return apply


def header(change: Callable[[dict[str, Any]], Any]) -> Break:
    """Changes the header's JSON, its length kept true and the data as they are."""

    def apply(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        content = json.loads(data[8 : 8 + length])
        change(content)
        text = json.dumps(content).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return apply


def raw(change: Callable[[bytes], bytes], name: str = WEIGHTS) -> Break:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def replaced(name: str, content: str) -> Break:
    return lambda folder: (folder / name).write_text(content)


def removed(name: str) -> Break:
    return lambda folder: (folder / name).unlink()


def move(offset: int) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content[UP]["data_offsets"] = [at + offset for at in content[UP]["data_offsets"]]

    return change


def linked(name: str) -> Break:
    def apply(folder: Path) -> None:
        outside = folder.parent / "outside"
        outside.mkdir()
        (folder / name).rename(outside / name)
        (folder / name).symlink_to(outside / name)

    return apply


def scaled(folder: Path, *, scales: torch.Tensor | None) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[UP] = tensors[UP].to(torch.float8_e4m3fn)
    if scales is not None:
        tensors[f"{UP}_scale_inv"] = scales
    save_file(tensors, folder / WEIGHTS)


HF_CASES: dict[str, tuple[str, Break, str]] = {
    "no weights": ("hf", removed(WEIGHTS), "no model.safetensors and no model.safetensors.index.json"),
    "no config": ("hf", removed("config.json"), "not a model: found .*model.safetensors"),
    "config is not JSON": ("hf", replaced("config.json", "{"), "config.json: not valid JSON: line 1"),
    "config is a list": ("hf", replaced("config.json", "[]"), "found a list"),
    "unknown family": ("hf", config(lambda c: c.update(model_type="qwen9")), "'qwen9' is not a known family; known: "),
    "more layers": (
        "hf",
        config(layers(5)),
        "11 missing: model.layers.4.input_layernorm",
    ),
    "fewer layers": (
        "hf",
        config(layers(3)),
        "11 unexpected: model.layers.3.input_layer",
    ),
    "layers that disagree": ("hf", config(lambda c: c.update(num_hidden_layers=3)), "`num_hidden_layers` .3. must be"),
    "other heads": ("hf", config(lambda c: c.update(num_key_value_heads=4)), "48 rows, the config says 96"),
    "other hidden size": (
        "hf",
        config(lambda c: c.update(hidden_size=48)),
        r"64\], the config says \[101, 48\]",
    ),
    "other vocabulary": ("hf", config(lambda c: c.update(vocab_size=100)), r"\[101, 64\], the config says \[100, 64\]"),
    "other ffn size": ("hf", config(lambda c: c.update(intermediate_size=95)), "96 rows, the config says 95"),
    "other activation": ("hf", config(lambda c: c.update(hidden_act="gelu")), "hidden_act: 'gelu' is not supported"),
    "other quantization": (
        "hf",
        config(lambda c: c.update(quantization_config={"quant_method": "awq"})),
        "quant_method 'awq' .* allowed: 'fp8'",
    ),
    "tensor missing": ("hf", state(lambda t: t.pop(UP)), f"1 missing: {UP}"),
    "tensor too many": ("hf", state(lambda t: t.update(x=torch.ones(2))), "1 unexpected: x"),
    "tensor renamed": ("hf", state(lambda t: t.update({f"{UP}s": t.pop(UP)})), "Did you mean 'model.layers.1.mlp.up"),
    "tensor transposed": ("hf", state(lambda t: t.update({UP: t[UP].T.contiguous()})), f"{UP} has 64 rows"),
    "tensor too wide": ("hf", state(lambda t: t.update({UP: torch.ones(96, 65)})), r"up_proj.* shape \[96, 65\]"),
    "tensor of integers": (
        "hf",
        state(lambda t: t.update({UP: t[UP].long()})),
        f"{UP} is I64; allowed: F32",
    ),
    "norm of another length": ("hf", state(lambda t: t.update({"model.norm.weight": torch.ones(63)})), "model.norm"),
    "fused tensors of two dtypes": (
        "hf",
        state(lambda t: t.update({UP: t[UP].half()})),
        "one dtype; .* --dtype",
    ),
    "tied with another head": (
        "tied",
        state(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})),
        "tie_word_embeddings, but lm_head.weight has other values",
    ),
    "fp8 without scales": ("hf", lambda f: scaled(f, scales=None), "F8_E4M3, but there is no .*_scale_inv"),
    "fp8 with scales of another shape": ("hf", lambda f: scaled(f, scales=torch.ones(2, 1)), r"needs \[1, 1\]"),
    "fp8 with integer scales": ("hf", lambda f: scaled(f, scales=torch.ones(1, 1).int()), "needed are F32 scales"),
    "body truncated": ("hf", raw(lambda data: data[:-1]), "truncated: its header speaks of"),
    "header truncated": ("hf", raw(lambda data: data[:100]), "not a safetensors file, or truncated"),
    "empty file": ("hf", raw(lambda data: b""), "not a safetensors file, or truncated"),
    "header of garbage": ("hf", raw(lambda data: data[:8] + b"\xff" * (len(data) - 8)), "not a safetensors file"),
    "header's length is huge": ("hf", raw(lambda data: b"\xff" * 7 + b"\x00" + data[8:]), "its header would take"),
    "header is a list": ("hf", raw(lambda data: struct.pack("<Q", 2) + b"[]" + data), "not a table of tensors"),
    "ranges overlap": ("hf", header(move(-4)), "damaged header: .* overlaps"),
    "range in the header": ("hf", header(move(-(1 << 20))), "overlaps the header"),
    "range past the end": ("hf", header(move(1 << 20)), "truncated"),
    "range of another size": (
        "hf",
        header(lambda h: h[UP].update(shape=[1, 1])),
        r"\[1, 1\], but has 24576 bytes",
    ),
    "unknown dtype": ("hf", header(lambda h: h[UP].update(dtype="F7")), f"{UP} is F7; allowed"),
    "link to a file outside": ("hf", linked(WEIGHTS), "a link to .*, outside the folder"),
    "index is not JSON": ("sharded", replaced(f"{WEIGHTS}.index.json", "?"), "needs a table called weight_map"),
    "index without map": ("sharded", replaced(f"{WEIGHTS}.index.json", "{}"), "needs a table called weight_map"),
    "index names a missing file": ("sharded", weight_map(lambda m: m.update({UP: "no.safetensors"})), "no such file"),
    "index names another file": (
        "sharded",
        weight_map(lambda m: m.update({UP: next(file for file in m.values() if file != m[UP])})),
        "is listed in .*, but it is not there",
    ),
    "index leads out": ("sharded", weight_map(lambda m: m.update({UP: "../x"})), "'../x'; allowed are files inside"),
    "index is absolute": ("sharded", weight_map(lambda m: m.update({UP: "/etc/passwd"})), "'/etc/passwd'; allowed are"),
    "link of a shard": ("sharded", lambda f: linked(sorted(f.glob("model-*"))[1].name)(f), "outside the folder"),
}


@pytest.mark.parametrize("case", HF_CASES)
def test_hugging_face_folder(
    originals: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    kind, damage, message = HF_CASES[case]
    source = tmp_path / "source"
    shutil.copytree(originals[kind], source)
    damage(source)
    assert re.search(message, text := refused(source, capsys)), text


def test_a_dtype_makes_fused_tensors_agree(originals: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(originals["hf"], source)
    state(lambda t: t.update({UP: t[UP].half()}))(source)
    convert(source, tmp_path / "out", dtype="bf16", workers=1)


# --- Megatron checkpoints ---------------------------------------------------------------------------------------------


def index(change: Callable[[Any], Any]) -> Break:
    def apply(folder: Path) -> None:
        content = pickle.loads((folder / ".metadata").read_bytes())
        change(content)
        (folder / ".metadata").write_bytes(pickle.dumps(content))

    return apply


def place(**fields: Any) -> Break:
    """Changes where the index says that one tensor lies."""

    def change(content: Any) -> None:
        for key, info in content.storage_data.items():
            if key.fqn == "decoder.final_layernorm.weight":
                for name, value in fields.items():
                    object.__setattr__(info, name, value)

    return index(change)


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def forget(content: Any) -> None:
    del content.state_dict_metadata["decoder.final_layernorm.weight"]


def stretch(content: Any) -> None:
    content.state_dict_metadata["decoder.final_layernorm.weight"].size = torch.Size([65])


def without_vocabulary(content: Any) -> None:
    item = content.state_dict_metadata["embedding.word_embeddings.weight"]
    item.size = torch.Size([100, 64])
    item.chunks[0].sizes = torch.Size([100, 64])


MEGATRON_CASES: dict[str, tuple[Break, str]] = {
    "no metadata.json": (removed("metadata.json"), "incomplete Megatron checkpoint"),
    "no .metadata": (removed(".metadata"), "not a Megatron checkpoint: it has no .metadata"),
    "metadata.json damaged": (replaced("metadata.json", "{"), "metadata.json: damaged"),
    "another backend": (replaced("metadata.json", '{"sharded_backend": "zarr"}'), "'zarr' is not supported"),
    "index truncated": (raw(lambda data: data[:-9], ".metadata"), "index is damaged"),
    "index of garbage": (raw(lambda data: b"\xff" * 30, ".metadata"), "index is damaged"),
    "index with code": (
        lambda f: (f / ".metadata").write_bytes(pickle.dumps(Evil(f.parent / "evil"))),
        "posix.mkdir, which no checkpoint needs",
    ),
    "data file missing": (removed("__0_0.distcp"), "__0_0.distcp: no such file"),
    "data file truncated": (raw(lambda data: data[: len(data) // 2], "__0_0.distcp"), "truncated"),
    "data file of zeros": (raw(lambda data: bytes(len(data)), "__0_0.distcp"), "not a file of torch.save, or damaged"),
    "data outside": (place(relative_path="../x.distcp"), "outside the folder"),
    "data absolute": (place(relative_path="/etc/passwd"), "outside the folder"),
    "data of another tensor": (place(offset=0), "not a file of torch.save|not the part of"),
    "data compressed": (place(transform_descriptors=["zstd"]), "compressed or encoded"),
    "tensor missing": (index(forget), "1 missing: decoder.final_layernorm.weight"),
    "tensor of another shape": (index(stretch), r"parts don't make up its shape \[65\]"),
    "vocabulary too small": (index(without_vocabulary), "not the part of embedding.word_embeddings.weight"),
    "config of another model": (
        lambda f: edit_json(f / "hf" / "config.json", layers(2)),
        "unexpected: decoder.layers.2",
    ),
    "no config": (lambda f: shutil.rmtree(f / "hf"), "name a Hugging Face folder of the same model with --config"),
    "link of the data": (linked("__0_0.distcp"), "outside the folder"),
}


@pytest.mark.parametrize("case", MEGATRON_CASES)
def test_megatron_checkpoint(
    originals: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    damage, message = MEGATRON_CASES[case]
    source = tmp_path / "source"
    shutil.copytree(originals["megatron"], source)
    damage(source)
    assert re.search(message, text := refused(source, capsys)), text
    assert not (tmp_path / "evil").exists()


# --- .bin -------------------------------------------------------------------------------------------------------------


def legacy(tensors: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


BIN_CASES: dict[str, tuple[Callable[[dict[str, torch.Tensor], Path], Any], str]] = {
    "code": (lambda t, p: torch.save(t | {"x": Evil(p.parents[1] / "evil")}, p), "posix.mkdir.* it was not run"),
    "plain pickle": (lambda t, p: p.write_bytes(pickle.dumps(Evil(p.parents[1] / "evil"))), "not a file of torch.save"),
    "torch < 1.6": (legacy, "files of torch < 1.6 are not zip archives"),
    "truncated": (lambda t, p: (torch.save(t, p), p.write_bytes(p.read_bytes()[:-500])), "not a file of torch.save"),
    "no tensors": (lambda t, p: torch.save({}, p), "no table of tensors"),
    "not contiguous": (lambda t, p: torch.save(t | {UP: torch.ones(64, 96).T}, p), "not contiguous"),
    "an optimizer": (lambda t, p: torch.save({"step": 3}, p), "no table of tensors"),
}


@pytest.mark.parametrize("case", BIN_CASES)
def test_bin(originals: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    save, message = BIN_CASES[case]
    source = tmp_path / "source"
    shutil.copytree(originals["hf"], source)
    save(load_file(source / WEIGHTS), source / "pytorch_model.bin")
    (source / WEIGHTS).unlink()
    assert re.search(message, text := refused(source, capsys)), text
    assert not (tmp_path / "evil").exists()


# --- the command, the destination, the disk ---------------------------------------------------------------------------

OPTION_CASES: dict[str, tuple[list[str], str]] = {
    "size without number": (["--max-shard-size", "big"], "found 'big'; allowed is a size"),
    "size too small": (["--max-shard-size", "10KB"], "at least 1MB"),
    "config for a Hugging Face folder": (["--config", "."], "--config goes with a Megatron checkpoint"),
    "unknown dtype": (["--dtype", "fp8"], "invalid choice: 'fp8'"),
    "no workers": (["--workers", "0"], "found '0'; it must be a whole number, at least 1"),
}


@pytest.mark.parametrize("case", OPTION_CASES)
def test_options(originals: dict[str, Path], capsys: pytest.CaptureFixture[str], case: str) -> None:
    options, message = OPTION_CASES[case]
    assert message in refused(originals["hf"], capsys, *options)


def test_gguf_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF....")
    assert "can't be used with a GGUF file" in refused(tmp_path / "x.gguf", capsys, "--max-shard-size", "1GB")
    assert "GGUF" in refused(tmp_path / "x.gguf", capsys)


def test_sources_that_are_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such file or folder; allowed: " in refused(tmp_path / "nothing", capsys)
    (tmp_path / "file").write_text("x")
    assert "a file; allowed: a Hugging Face folder" in refused(tmp_path / "file", capsys)
    (tmp_path / "empty").mkdir()
    assert "not a model: found nothing" in refused(tmp_path / "empty", capsys)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("release")
    assert "expected an iteration's number" in refused(tmp_path / "run", capsys)


def test_destinations(originals: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = originals["hf"]
    assert "lies inside the source" in refused(source, capsys, target=source / "deep" / "out")
    assert "exists already" in refused(source, capsys, target=source)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "exists already" in refused(source, capsys, target=tmp_path / "link")
    (tmp_path / "file").write_text("x")
    assert "can't be written" in refused(source, capsys, target=tmp_path / "file" / "out")


def test_two_conversions_into_one_folder(
    originals: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial, "LOCK_PATIENCE", 0.1)
    lock = os.open(tmp_path / ".out.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    message = refused(originals["hf"], capsys, target=tmp_path / "out")
    assert "another conversion is writing it" in message
    assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]
    os.close(lock)
    convert(originals["hf"], tmp_path / "out", workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("moment", ["posix_fallocate", "pwrite"])
def test_full_disk(
    originals: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, moment, full)
    message = refused(originals["hf"], capsys, target=tmp_path / "out")
    assert "No space left on device: 0.7 MB are needed" in message and "nothing was left" in message
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_shrinks_meanwhile(
    originals: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    shutil.copytree(originals["hf"], source)
    prepare = convert_module.prepare

    def shrink(*arguments: Any) -> None:
        prepare(*arguments)
        os.truncate(source / WEIGHTS, 100_000)

    monkeypatch.setattr(convert_module, "prepare", shrink)
    assert "bytes too early: truncated" in refused(source, capsys)


def test_copies_of_one_tensor_that_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_folder(tmp_path / "hf", "deepseek-v3")
    tensors = load_file(folder / WEIGHTS)
    copy = max(name for name in tensors if name.endswith("shared_head.head.weight"))
    tensors[copy][3, 5] += 1
    save_file(tensors, folder / WEIGHTS)
    capsys.readouterr()  # transformers' progress
    message = refused(folder, capsys)
    assert f"{copy} has other values than lm_head.weight; Megatron-Core holds one tensor for both" in message


def test_optimizer_state_where_there_is_none(originals: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("hf", "megatron"):
        assert "holds no optimizer state (--optimizer)" in refused(originals[name], capsys, "--optimizer")
