"""`mcore-swift inspect` tells what lies there, from headers alone, in a moment."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tools.convert import convert
from ckpt_tools.inspect import look
from mcore_swift.cli import main
from tests.distributed.tiny_models import tiny_folder, tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")
    return lambda variant: tiny_folder(folder / variant, variant, dtype=torch.bfloat16)


def inspected(capsys: pytest.CaptureFixture[str], path: Path) -> dict[str, Any]:
    assert main(["inspect", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# What the four layers of the tiny qwen3 hold: hidden 64, 4 heads and 2 key-value heads of 24, ffn 96, vocabulary 101.
QWEN3 = {
    "norms": 4 * (2 * 64 + 2 * 24) + 64,
    "embedding": 101 * 64,
    "head": 101 * 64,
    "attention": 4 * (2 * 4 + 2 * 2) * 24 * 64,
    "mlp": 4 * 3 * 64 * 96,
}


def test_hugging_face_folder(models: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = inspected(capsys, models("qwen3"))
    assert (found["kind"], found["family"], found["tied"]) == ("Hugging Face folder", "qwen3", False)
    assert {part: size["parameters"] for part, size in found["parts"].items()} == QWEN3
    assert found["parameters"] == found["active"] == sum(QWEN3.values())
    assert found["dtypes"] == {
        "BF16": {"tensors": 47, "parameters": sum(QWEN3.values()), "bytes": 2 * sum(QWEN3.values())}
    }
    assert found["shape"] == {
        "layers": 4,
        "hidden": 64,
        "ffn": 96,
        "heads": 4,
        "key-value heads": 2,
        "head dim": 24,
        "vocabulary": 101,
        "context": 64,
    }
    assert found["details"]["RoPE"] == {"rope_type": "default", "rope_theta": 1000.0}
    assert found["files"] == {"model.safetensors": (models("qwen3") / "model.safetensors").stat().st_size}


def test_sharded_folder_and_tied(tmp_path: Path) -> None:
    tiny_model("llama-tied-odd-vocabulary").save_pretrained(tmp_path / "model", max_shard_size="100KB")
    found = look(tmp_path / "model")
    assert found.tied is True and "head" not in found.parts and len(found.files) > 2
    assert found.bytes == 4 * found.parameters < sum(found.files.values())


def test_checkpoint_has_the_folder_s_sizes(models: Callable[[str], Path], tmp_path: Path) -> None:
    """Also one in an iteration's folder, as Megatron-LM leaves it, and without a configuration."""
    folder = look(models("qwen3"))
    convert(models("qwen3"), tmp_path / "run" / "iter_0000007")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("7")
    for path in (tmp_path / "run" / "iter_0000007", tmp_path / "run"):
        found = look(path)
        assert (found.kind, found.family, found.tied) == ("Megatron checkpoint", "qwen3", False)
        assert {part: size.parameters for part, size in found.parts.items()} == QWEN3
        assert (found.bytes, found.shape) == (folder.bytes, folder.shape)
        assert found.details["written by"] == "mcore-swift" and found.details["step"] == 0
        assert found.details["optimizer"] == "not saved"
        assert found.files and all(name.endswith(".distcp") for name in found.files)
    (tmp_path / "run" / "iter_0000007" / "hf" / "config.json").unlink()
    (tmp_path / "run" / "iter_0000007" / "mcore_swift.json").unlink()
    found = look(tmp_path / "run")
    assert (found.family, found.tied, found.details["written by"]) == ("unknown", False, "another program")
    assert "so the family is not known" in found.details["config"]


def test_experts_that_a_token_is_not_sent_to_are_not_active(tmp_path: Path) -> None:
    """A family that is not known here is looked at all the same."""
    config = {"model_type": "some_moe", "num_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {f"model.layers.0.mlp.experts.{i}.up_proj.weight": torch.ones(4, 4) for i in range(8)}
    save_file(tensors | {"model.embed_tokens.weight": torch.ones(10, 4)}, tmp_path / "model.safetensors")
    found = look(tmp_path)
    assert (found.parameters, found.active) == (8 * 16 + 40, 2 * 16 + 40)
    assert found.family == "some_moe (not a family that mcore-swift trains)"


def test_shared_experts_and_layers_that_predict_further_tokens(tmp_path: Path) -> None:
    """DeepSeek's parts: all tokens pass shared experts, and none needs the layer after the model's own."""
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 1, "n_routed_experts": 4, "num_experts_per_tok": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {
        f"model.layers.{layer}.mlp.{name}.up_proj.weight": torch.ones(4, 4)
        for layer in range(2)
        for name in ("shared_experts", *(f"experts.{i}" for i in range(4)))
    }
    save_file(tensors, tmp_path / "model.safetensors")
    found = look(tmp_path)
    assert {part: size.parameters for part, size in found.parts.items()} == {
        "multi-token prediction": 80,
        "shared experts": 16,
        "experts": 64,
    }
    assert (found.parameters, found.active) == (160, 16 + 16)


@pytest.mark.parametrize("variant", ["qwen3-moe"])
def test_a_checkpoint_counts_as_its_folder_does(tmp_path: Path, variant: str) -> None:
    folder = tiny_folder(tmp_path / "hf", variant)
    convert(folder, tmp_path / "megatron", workers=1)
    a, b = look(folder), look(tmp_path / "megatron")
    assert (a.parameters, a.active, a.shape["experts"]) == (b.parameters, b.active, b.shape["experts"])
    assert a.shape["experts"] == 8 and a.active == a.parameters - 3 * 5 * 3 * 40 * 64  # 3 layers, 3 of 8 experts


def test_adapter_and_single_file(tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    save_file({f"{name}{part}.weight": torch.ones(4, 8) for part in "AB"}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    found = look(tmp_path)
    assert (found.kind, found.parameters, list(found.parts)) == ("PEFT adapter", 64, ["adapter"])
    assert found.details == {"method": "LORA", "rank": 4, "alpha": 8}
    found = look(tmp_path / "adapter_model.safetensors")
    assert (found.kind, found.parameters, found.tied) == ("safetensors file", 64, None)


def test_adapter_that_peft_has_no_format_for(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.adapter_"
    save_file(
        {f"{name}down.weight": torch.ones(4, 8), f"{name}up.bias": torch.ones(8)}, tmp_path / "adapter.safetensors"
    )
    (tmp_path / "adapter.json").write_text('{"method": "bottleneck", "base_model": "b", "rank": 4}')
    found = look(tmp_path)
    assert (found.kind, found.parameters, list(found.parts)) == ("adapter", 40, ["adapter"])
    assert found.details == {"method": "bottleneck", "base": "b", "rank": 4}


def test_gguf(tmp_path: Path) -> None:
    from tests.ckpt_tools import tiny_gguf

    path = tmp_path / "model.gguf"
    model = tiny_gguf.tiny_model("llama")
    tiny_gguf.write_gguf(path, model)
    found = look(path)
    assert (found.kind, found.family) == ("GGUF file", "llama")
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.shape["layers"] == model.config.num_hidden_layers and found.tied is True
    assert list(found.dtypes) == ["F32"] and "other" not in found.parts


def test_tables(models: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(models("qwen3"))]) == 0
    shown = capsys.readouterr().out
    total = sum(QWEN3.values())
    for text in ("Hugging Face folder", "not tied", f"{total / 1000:.2f} k ({total:,})", "BF16", "attention", "101"):
        assert text in shown


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing": (lambda p: p / "none", "none: no such file or folder"),
    "empty folder": (lambda p: p, "not known what this is; allowed: a Hugging Face folder"),
    "another file": (lambda p: _write(p / "a.txt", b"hello"), "a.txt: not known what this is"),
    "no weights": (lambda p: _write(p / "config.json", b"{}").parent, "no model.safetensors"),
    "config is no object": (lambda p: _write(p / "config.json", b"[]").parent, "needed is a JSON object"),
    "config is not JSON": (lambda p: _write(p / "config.json", b"{").parent, "config.json: not valid JSON"),
    "truncated": (lambda p: _write(p / "a.safetensors", struct.pack("<Q", 99)), "not a safetensors file, or truncated"),
    "empty file": (lambda p: _write(p / "a.safetensors", b""), "not a safetensors file, or truncated"),
    "damaged GGUF": (lambda p: _write(p / "a.gguf", b"GGUF123"), "truncated or damaged GGUF file"),
    "adapter without weights": (lambda p: _write(p / "adapter_config.json", b"{}").parent, "no such file"),
    "damaged index": (lambda p: _write(p / ".metadata", b"\x80\x04").parent, ".metadata: this checkpoint's index is"),
    "index with code": (
        lambda p: _write(p / ".metadata", b"cos\nsystem\n(S'true'\ntR.").parent,
        "it names os.system, which no checkpoint needs",
    ),
}


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("case", BAD)
def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    make, message = BAD[case]
    assert main(["inspect", str(make(tmp_path))]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err


@pytest.mark.slow
def test_fast_and_without_megatron(models: Callable[[str], Path], tmp_path: Path) -> None:
    """In a process of its own: what is imported, and the time that looking takes after that."""
    convert(models("qwen3"), tmp_path / "checkpoint")
    load_file(models("qwen3") / "model.safetensors")
    code = (
        "import sys; from pathlib import Path; from ckpt_tools.inspect import look\n"
        "look(Path(sys.argv[1])); assert 'torch' not in sys.modules\n"
        "look(Path(sys.argv[2])); assert not {'megatron', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, models("qwen3"), tmp_path / "checkpoint"], check=True)
    for path in (models("qwen3"), tmp_path / "checkpoint"):
        start = time.process_time()
        look(path)
        assert time.process_time() - start < 0.3
