"""GGUF → Hugging Face folder: exact on files made from tiny transformers models, and on the real SmolLM2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckpt_tools.gguf import convert_gguf
from mcore_swift.errors import InputError
from tests.ckpt_tools.tiny_gguf import BYTES, MERGES, TINY, tiny_model, write_gguf

Edit = Callable[[dict[str, Any], dict[str, np.ndarray]], None]


def convert(tmp_path: Path, model: Any, edit: Edit | None = None, **kwargs: Any) -> Path:
    write_gguf(tmp_path / "model.gguf", model, edit)
    convert_gguf(tmp_path / "model.gguf", tmp_path / "hf", **kwargs)
    return tmp_path / "hf"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_weights_and_config_come_back_exactly(tmp_path: Path, model_type: str, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model(model_type, tie_word_embeddings=tied)
    folder = convert(tmp_path, model, dtype="fp32")
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert type(again) is type(model)
    assert again.dtype == torch.float32
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    for key, value in TINY.items():
        assert getattr(again.config, key) == value, key
    assert again.config.rope_parameters["rope_theta"] == 5000.0
    assert again.config.tie_word_embeddings is tied


def test_default_is_rounded_to_bf16_once(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = tiny_model("llama")
    loaded = load_file(convert(tmp_path, model) / "model.safetensors")
    expected = model.state_dict()
    assert "lm_head.weight" not in loaded  # tied
    assert all(torch.equal(tensor, expected[name].to(torch.bfloat16)) for name, tensor in loaded.items())


def test_tokenizer_special_tokens_and_padding(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(convert(tmp_path, tiny_model("llama")))
    assert len(tokenizer) == len(BYTES) + len(MERGES) + 3  # the rows that only pad the embedding are no tokens
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "<e>", "<e>")
    ids = tokenizer("<s>at a<u><e>").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "at", "Ġa", "<u>", "<e>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "at a<u>"  # user-defined tokens are text
    assert tokenizer.apply_chat_template([{"content": "a"}, {"content": "b"}], tokenize=False) == "<s>a<e><s>b<e>"


@pytest.mark.parametrize("pre", ["smollm", "qwen2"])
def test_digits_stand_alone(tmp_path: Path, pre: str) -> None:
    from tokenizers import Tokenizer

    def edit(fields: dict[str, Any], _: Any) -> None:
        fields["tokenizer.ggml.pre"] = pre

    folder = convert(tmp_path, tiny_model("llama"), edit)
    # The vocabulary has merges "1 2" and "Ġ 1", which the pre-tokenizer must keep from happening.
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode(" 12").tokens == ["Ġ", "1", "2"]


def _set(key: str, value: Any) -> Edit:
    def edit(fields: dict[str, Any], _: dict[str, np.ndarray]) -> None:
        if value is None:
            del fields[key]
        else:
            fields[key] = value

    return edit


def _tensor(name: str, change: Callable[[np.ndarray], np.ndarray | None]) -> Edit:
    def edit(_: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        changed = change(tensors.pop(name, np.zeros(1, np.float32)))
        if changed is not None:
            tensors[name] = changed

    return edit


BAD_FILES = {
    "architecture": (_set("general.architecture", "mamba"), r"architecture 'mamba' is not supported; allowed: llama"),
    "missing key": (_set("llama.block_count", None), r"metadata key 'llama.block_count' is missing"),
    "rope scaling": (_set("llama.rope.scaling.type", "yarn"), r"RoPE scaling in a GGUF file is not supported"),
    "experts": (_set("llama.expert_count", 8), r"experts in a GGUF file are not supported"),
    "partial rotary": (_set("llama.rope.dimension_count", 4), r"partial rotary embeddings .* not supported"),
    "pre-tokenizer": (_set("tokenizer.ggml.pre", "tekken"), r"tokenizer.ggml.pre 'tekken' .* allowed: smollm, qwen2"),
    "tokenizer model": (_set("tokenizer.ggml.model", "llama"), r"tokenizer.ggml.model 'llama' .* allowed: gpt2"),
    "bos added": (_set("tokenizer.ggml.add_bos_token", True), r"add_bos_token is true, which is not supported"),
    "token id": (_set("tokenizer.ggml.eos_token_id", 999), r"eos_token_id is 999, but there are 263 tokens"),
    "missing tensor": (_tensor("blk.1.ffn_up.weight", lambda _: None), r"it lacks tensors: blk.1.ffn_up.weight$"),
    "extra tensor": (_tensor("blk.0.extra", lambda t: t), r"it has unexpected tensors: blk.0.extra$"),
    "shape": (
        _tensor("blk.0.attn_k.weight", lambda t: t[:8]),
        r"'blk.0.attn_k.weight' has shape \[8, 48\]; the metadata imply \[32, 48\]",
    ),
    "NaN": (_tensor("output_norm.weight", lambda t: t * np.nan), r"'output_norm.weight' has NaN or infinite values"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_refuses_what_it_does_not_know(tmp_path: Path, case: str) -> None:
    edit, message = BAD_FILES[case]
    with pytest.raises(InputError, match=message):
        convert(tmp_path, tiny_model("llama"), edit)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]  # nothing half-written


def test_refuses_missing_foreign_and_truncated_files(tmp_path: Path) -> None:
    src, dst = tmp_path / "model.gguf", tmp_path / "hf"
    with pytest.raises(InputError, match=r"model.gguf: no such file"):
        convert_gguf(src, dst)
    for content in (b"", b"PK\x03\x04 not a model"):
        src.write_bytes(content)
        with pytest.raises(InputError, match=r"model.gguf: not a GGUF file"):
            convert_gguf(src, dst)
    write_gguf(src, tiny_model("llama"))
    whole = src.read_bytes()
    for length in (4, 11, 30, 500, len(whole) // 4, len(whole) // 2, len(whole) - 64):
        src.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"model.gguf: truncated or damaged GGUF file"):
            convert_gguf(src, dst)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_refuses_existing_output_and_unknown_dtype(tmp_path: Path) -> None:
    folder = convert(tmp_path, tiny_model("llama"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match=r"hf: exists already"):
        convert_gguf(tmp_path / "model.gguf", folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(InputError, match=r"dtype 'bf61' is unknown; allowed: bf16, fp16, fp32. Did you mean 'bf16'"):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "other", dtype="bf61")


def test_unwritable_output_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", tiny_model("llama"))
    with pytest.raises(InputError, match=r"model.gguf/hf: can't be written"):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "model.gguf" / "hf")


def test_smollm2_package_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ckpt_tools import smollm2

    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-package-as-this")
    with pytest.raises(InputError, match=r"no-such-package-as-this, .* is not installed: run `make setup`"):
        smollm2.smollm2_folder(tmp_path)


SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
# Token ids of the real tokenizer: every digit alone, special tokens recognised, bytes kept.
SMOLLM2_TOKENS = {
    "In 1984 there were 12345 cats.": [788, 216, 33, 41, 40, 36, 665, 592, 216, 33, 34, 35, 36, 37, 7680, 30],
    " x": [1792],
    "\n\n  def f(a1):\n\treturn 3.14": [8866, 753, 275, 24, 81, 33, 727, 198, 197, 5406, 216, 35, 30, 33, 36],
    "naïve 日本語 ½": [3546, 46494, 17097, 241, 115, 40993, 179, 120, 248, 216, 16738],
    "<|im_start|>user\nhi<|im_end|>\n": [1, 4093, 198, 6004, 2, 198],
}


@pytest.mark.slow
@pytest.mark.parametrize("text", SMOLLM2_TOKENS)
def test_smollm2_tokens(smollm2: Path, text: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer(text).input_ids == SMOLLM2_TOKENS[text]
    assert tokenizer.decode(SMOLLM2_TOKENS[text]) == text


@pytest.mark.slow
def test_smollm2_chat_template(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    chat = [{"role": "user", "content": "What is 12 + 7?"}, {"role": "assistant", "content": "19"}]
    question = SYSTEM + "<|im_start|>user\nWhat is 12 + 7?<|im_end|>\n"
    render = tokenizer.apply_chat_template
    assert render(chat, tokenize=False) == question + "<|im_start|>assistant\n19<|im_end|>\n"
    assert render(chat[:1], tokenize=False, add_generation_prompt=True) == question + "<|im_start|>assistant\n"
    ids = tokenizer(question).input_ids
    assert (ids[0], ids.count(1), ids.count(2)) == (tokenizer.bos_token_id, 2, 2)
    assert len(tokenizer) == 49152


@pytest.mark.nightly
def test_smollm2_likelihood_in_transformers(smollm2: Path, data_folder: Path) -> None:
    """Four of the 16 windows whose mean is the published 2.45158 nats a token; all 16 take over a minute."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    golden = json.loads((data_folder / "smollm2_window_nll.json").read_text())
    assert abs(np.mean(golden) - 2.45158) < 5e-6
    lines = (data_folder / "wikipedia_head.jsonl").read_text(encoding="utf-8").splitlines()
    text = "".join(json.loads(line)["text"] for line in lines)
    ids = torch.tensor(AutoTokenizer.from_pretrained(smollm2)(text, verbose=False).input_ids)
    windows = ids[: 16 * 1024].view(16, 1024)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    for i in (0, 5, 10, 15):
        with torch.no_grad():
            logits = model(windows[i : i + 1]).logits[0, :-1]
        # In float64: over 49,152 tokens torch's float32 log_softmax is 8e-6 too low, more than all else together.
        logps = logits.double().log_softmax(-1).gather(1, windows[i, 1:, None])
        assert abs(-logps.mean().item() - golden[i]) < 2e-6, i
