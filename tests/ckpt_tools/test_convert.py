"""Hugging Face → Megatron → Hugging Face is byte-equal, from every source format; interrupted runs are taken up."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tools import convert as convert_module
from ckpt_tools import transfer
from ckpt_tools.convert import convert, parse_size
from ckpt_tools.decode import decode_fp8
from ckpt_tools.source import open_source
from mcore_swift import cli
from mcore_swift.errors import InputError
from tests.distributed.tiny_models import VARIANTS, tiny_folder

Tensors = dict[str, torch.Tensor]


def tensors(folder: Path) -> Tensors:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(a: Tensors, b: Tensors) -> bool:
    """The same names, dtypes, shapes, and bits (so that NaN equals NaN)."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and bits(a[n]).equal(bits(b[n])) for n in a
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_folder(tmp_path_factory.mktemp("model") / "qwen3", "qwen3", dtype=torch.bfloat16)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    return folder


QUICK = {"llama", "qwen2-tied", "qwen3-moe"}


@pytest.mark.parametrize("variant", [pytest.param(v, marks=[pytest.mark.slow] * (v not in QUICK)) for v in VARIANTS])
def test_round_trip(tmp_path: Path, variant: str) -> None:
    folder = tiny_folder(tmp_path / "hf", variant)
    expected = tensors(folder)
    for workers in (1, 4):
        convert(folder, tmp_path / f"megatron-{workers}", workers=workers)
        convert(tmp_path / f"megatron-{workers}", tmp_path / f"back-{workers}", workers=workers)
        back = tmp_path / f"back-{workers}"
        assert same(tensors(back), expected)
        assert json.loads((back / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
        opened = open_source(tmp_path / f"megatron-{workers}")
        assert same({name: opened.read(name) for name in opened.specs}, expected)
    assert files(tmp_path / "megatron-1") == files(tmp_path / "megatron-4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back-1", "back-4", "hf", "megatron-1", "megatron-4"]


@pytest.mark.slow
def test_a_real_model_goes_there_and_back(smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2 is byte-equal, file by file, with one worker and with four, from checkpoints that are byte-equal too."""
    for workers in (1, 4):
        megatron, back = tmp_path / f"megatron-{workers}", tmp_path / f"back-{workers}"
        convert(smollm2, megatron, workers=workers)
        convert(megatron, back, workers=workers)
        assert same(tensors(back), tensors(smollm2))
        changed = {"config.json", "model.safetensors"}  # written anew: the header may be spaced otherwise
        for name, content in files(smollm2).items():
            assert name in changed or (back / name).read_bytes() == content, name
    assert (tmp_path / "back-1" / "model.safetensors").read_bytes() == (back / "model.safetensors").read_bytes()
    assert files(tmp_path / "megatron-1") == files(tmp_path / "megatron-4")


def test_shards_and_what_comes_along(qwen3: Path, tmp_path: Path) -> None:
    convert(qwen3, tmp_path / "megatron", workers=1)
    convert(tmp_path / "megatron", tmp_path / "back", workers=2, max_shard_size=50_000)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 3
    assert same(tensors(tmp_path / "back"), tensors(qwen3))
    assert (tmp_path / "megatron" / "hf" / "tokenizer.json").exists() and (
        tmp_path / "back" / "tokenizer.json"
    ).exists()
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".py"]
    convert(tmp_path / "back", tmp_path / "again", workers=1, max_shard_size=50_000)  # many files in, many out
    assert len(list((tmp_path / "again").glob("*.distcp"))) > 3
    convert(tmp_path / "again", tmp_path / "hf", workers=1)
    assert same(tensors(tmp_path / "hf"), tensors(qwen3))


@pytest.mark.parametrize(("option", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16)])
def test_dtype(qwen3: Path, tmp_path: Path, option: str, dtype: torch.dtype) -> None:
    convert(qwen3, tmp_path / "megatron", dtype=option, workers=2)
    convert(tmp_path / "megatron", tmp_path / "back", workers=1)
    assert same(tensors(tmp_path / "back"), {name: tensor.to(dtype) for name, tensor in tensors(qwen3).items()})
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_large_tensors_go_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path / "hf", "qwen2")
    monkeypatch.setattr(transfer, "PIECE_BYTES", 1000)
    monkeypatch.setattr("ckpt_tools.plan.TASK_BYTES", 3000)
    from ckpt_tools.torch_dist import plan_checkpoint

    def chunked(*arguments: Any, **options: Any) -> Any:
        return plan_checkpoint(*arguments, **options, chunk_bytes=7000)

    monkeypatch.setattr("ckpt_tools.plan.plan_checkpoint", chunked)
    convert(folder, tmp_path / "megatron", workers=2)
    assert max(len(stored.blocks) for stored in open_source(tmp_path / "megatron").stored.values()) > 3
    convert(tmp_path / "megatron", tmp_path / "back", workers=2)
    assert same(tensors(tmp_path / "back"), tensors(folder))


@pytest.mark.parametrize("shards", [1, 2])
def test_bin_files(qwen3: Path, tmp_path: Path, shards: int) -> None:
    source = tmp_path / "bin"
    source.mkdir()
    (source / "config.json").write_bytes((qwen3 / "config.json").read_bytes())
    state = tensors(qwen3)
    if shards == 1:
        torch.save(state, source / "pytorch_model.bin")
    else:
        parts = [{n: t for i, (n, t) in enumerate(state.items()) if i % 2 == part} for part in range(2)]
        for part, content in enumerate(parts):
            torch.save(content, source / f"pytorch_model-{part}.bin")
        names = {name: f"pytorch_model-{part}.bin" for part, content in enumerate(parts) for name in content}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    convert(source, tmp_path / "megatron", workers=1)
    convert(tmp_path / "megatron", tmp_path / "back", workers=1)
    assert same(tensors(tmp_path / "back"), state)


def quantize(folder: Path, target: Path) -> Tensors:
    """Writes `folder` with block-scaled FP8 projections to `target`; returns what they stand for, in bf16."""
    target.mkdir()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (target / "config.json").write_text(json.dumps(config))
    stored, meant = {}, {}
    for name, tensor in tensors(folder).items():
        if "_proj" not in name:
            stored[name] = meant[name] = tensor.to(torch.bfloat16)
            continue
        rows, columns = (-(-size // 128) for size in tensor.shape)
        scales = 0.001 + torch.rand(rows, columns, generator=torch.Generator().manual_seed(len(name))) / 100
        wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: tensor.size(0), : tensor.size(1)]
        values = (tensor.float() / wide).to(torch.float8_e4m3fn)
        stored |= {name: values, f"{name}_scale_inv": scales}
        meant[name] = (values.float() * wide).to(torch.bfloat16)
    save_file(stored, target / "model.safetensors")
    return meant


def test_fp8_blocks_are_decoded_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large: dict[str, Any] = {"hidden_size": 160, "intermediate_size": 300, "num_attention_heads": 8, "head_dim": 24}
    folder = tiny_folder(tmp_path / "hf", "qwen3", **large)
    meant = quantize(folder, tmp_path / "fp8")
    monkeypatch.setattr(transfer, "PIECE_BYTES", 5000)  # pieces that don't end where blocks do
    convert(tmp_path / "fp8", tmp_path / "megatron", workers=1)
    convert(tmp_path / "megatron", tmp_path / "back", workers=1)
    assert same(tensors(tmp_path / "back"), meant)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    opened = open_source(tmp_path / "fp8")
    assert same({name: opened.read(name) for name in opened.specs}, meant)


def test_fp8_rows_of_a_later_block() -> None:
    values = torch.ones(3, 130).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    decoded = decode_fp8(values, scales, first_row=127)
    assert decoded[0, [0, 128]].tolist() == [1, 2] and decoded[1, [0, 128]].tolist() == [4, 8]


def test_snapshot_of_the_hub_cache(qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id is found in the cache, whose snapshots are links into blobs; nothing is downloaded unasked."""
    home = tmp_path / "hub" / "models--org--tiny"
    snapshot = home / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    for path in qwen3.iterdir():
        (home / "blobs" / path.name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(home / "blobs" / path.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    convert("org/tiny", tmp_path / "megatron", workers=1)
    convert(tmp_path / "megatron", tmp_path / "back", workers=1)
    assert same(tensors(tmp_path / "back"), tensors(qwen3))
    with pytest.raises(InputError, match=r"org/other: no such folder, and no model .* --download fetches it"):
        convert("org/other", tmp_path / "x")


def test_gguf(tmp_path: Path) -> None:
    from tests.ckpt_tools.tiny_gguf import tiny_model, write_gguf

    path = tmp_path / "m.gguf"
    write_gguf(path, tiny_model("qwen2"))
    assert convert(path, tmp_path / "dry", dry_run=True).bytes_written > 0 and not (tmp_path / "dry").exists()
    convert(path, tmp_path / "hf")
    assert convert(tmp_path / "hf", tmp_path / "megatron", workers=1).tensors > 5


def test_command(qwen3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "megatron"
    assert cli.main(["convert", str(qwen3), str(target), "--dry-run"]) == 0
    assert "would read 0.3 MB and write 0.3 MB (35 tensors in 1 files)" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert cli.main(["convert", str(qwen3), str(target), "--workers", "2", "--max-shard-size", "1GB"]) == 0
    assert "Hugging Face → Megatron: 35 tensors" in capsys.readouterr().out
    assert cli.main(["convert", str(qwen3), str(target)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_nonfinite_values_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_folder(tmp_path / "hf", "qwen3")
    state = tensors(folder)
    state["model.layers.1.mlp.up_proj.weight"][5, 3] = float("nan")
    state["model.layers.1.mlp.up_proj.weight"][6, 3] = -float("inf")
    state["model.norm.weight"][0] = float("inf")
    save_file(state, folder / "model.safetensors")
    found = convert(folder, tmp_path / "megatron", workers=2)
    assert found.nonfinite == {"decoder.layers.1.mlp.linear_fc1.weight": 2, "decoder.final_layernorm.weight": 1}
    assert cli.main(["convert", str(tmp_path / "megatron"), str(tmp_path / "back"), "--workers", "1"]) == 0
    assert "model.layers.1.mlp.up_proj.weight has 2 NaN or infinite values" in capsys.readouterr().err
    assert same(tensors(tmp_path / "back"), state)
    with pytest.raises(InputError, match=r"tensor .* has [12] NaN or infinite values \(--strict\)"):
        convert(folder, tmp_path / "strict", strict=True, workers=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "megatron"]
    assert convert(folder, tmp_path / "half", dtype="fp16", workers=1).nonfinite


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "BF16")])
def test_count_nonfinite(dtype: torch.dtype, name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    for bad in ([], [float("nan")], [float("inf")], [-float("inf")], [-float("nan")] * 3):
        values = torch.randn(1000, generator=generator).to(dtype)
        values[:2] = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min]).to(dtype)
        values[100 : 100 + len(bad)] = torch.tensor(bad).to(dtype)
        assert transfer.count_nonfinite(values.view(torch.uint8).numpy(), name) == len(bad)


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("2GiB", 2 << 30), ("1.5G", 15 * 10**8)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


# --- interruptions ----------------------------------------------------------------------------------------------------


def slow_worker(worker: Any, number: int, *, run: Any = transfer.Worker.run) -> Any:
    time.sleep(0.008)
    done = run(worker, number)
    time.sleep(0.004)
    return done


def killed_conversion(source: Path, target: Path, workers: int, after: float, *, copying: bool) -> bool:
    """Converts in a forked process that is killed `after` seconds; whether it had finished before.

    copying: the seconds count from the moment that it has begun to copy tensors.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            transfer.Worker.run = slow_worker  # type: ignore[method-assign]
            convert(source, target, workers=workers)
            code = 0
        finally:
            os._exit(code)
    while copying and not (target.exists() or list(target.parent.glob(f".{target.name}.partial/journal/worker-*"))):
        time.sleep(0.002)
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1] == 0


@pytest.mark.slow
def test_killed_runs_are_finished_by_the_same_command(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "hf", "qwen2")
    convert(folder, tmp_path / "expected", workers=1)
    expected = files(tmp_path / "expected")
    generator, resumed = random.Random(5), 0
    for number in range(20):
        target = tmp_path / f"target-{number}"
        workers = 1 + number % 2
        after = generator.uniform(0, 0.4)
        finished = killed_conversion(folder, target, workers, after, copying=number % 4 > 0)
        assert target.exists() or not finished
        if not target.exists():  # else the signal came after the end, or it appeared whole just before
            report = convert(folder, target, workers=workers)
            resumed += report.resumed > 0
        assert files(target) == expected
    assert resumed >= 8
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_finished_tensors_are_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path / "hf", "llama")
    run, numbers = transfer.Worker.run, []

    def failing(worker: Any, number: int) -> Any:
        if len(numbers) == 10:
            raise RuntimeError("stop")
        numbers.append(number)
        return run(worker, number)

    monkeypatch.setattr(transfer.Worker, "run", failing)
    with pytest.raises(RuntimeError):
        convert(folder, tmp_path / "out", workers=1)
    first = list(numbers)
    monkeypatch.setattr(transfer.Worker, "run", lambda worker, number: numbers.append(number) or run(worker, number))
    report = convert(folder, tmp_path / "out", workers=1)
    assert sorted(numbers) == list(range(report.tensors)) and first == numbers[:10] and report.resumed > 0


def test_a_changed_source_is_converted_from_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path / "hf", "llama")
    finish = convert_module.finish
    monkeypatch.setattr(convert_module, "finish", lambda job: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(folder, tmp_path / "out", workers=1)
    monkeypatch.setattr(convert_module, "finish", finish)
    state = {name: tensor + 1 for name, tensor in tensors(folder).items()}
    save_file(state, folder / "model.safetensors")
    assert convert(folder, tmp_path / "out", workers=1).resumed == 0
    convert(tmp_path / "out", tmp_path / "back", workers=1)
    assert same(tensors(tmp_path / "back"), state)


def test_a_worker_that_dies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path / "hf", "llama")
    monkeypatch.setattr(transfer.Worker, "run", lambda worker, number: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RuntimeError, match="a worker died"):
        convert(folder, tmp_path / "out", workers=2)
    assert not (tmp_path / "out").exists()
