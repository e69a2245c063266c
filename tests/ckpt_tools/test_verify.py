"""`mcore-swift verify` sees what is the same and every fault that was planted, and says what it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tools.convert import convert
from ckpt_tools.difference import distance
from mcore_swift.cli import main
from tests.distributed.tiny_models import tiny_folder

SMALL: dict[str, Any] = {"num_hidden_layers": 2}
Q, K = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"
GATE, UP = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("models")

    def make(variant: str, **changes: Any) -> Path:
        return tiny_folder(folder / "-".join([variant, *changes]), variant, **SMALL, **changes)

    return make


@pytest.fixture
def altered(models: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a folder whose tensors or configuration were changed."""

    def make(source: Path, edit: Callable[[Tensors], Any] = lambda tensors: None, **config: Any) -> Path:
        folder = tmp_path / "altered"
        shutil.copytree(source, folder)
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw | config))
        return folder

    return make


def result(capsys: pytest.CaptureFixture[str], code: int, *argv: object) -> dict[str, Any]:
    """What `verify --json` says; its exit code must be `code`."""
    assert main(["verify", *map(str, argv), "--json"]) == code
    report = json.loads(capsys.readouterr().out)
    assert report["equal"] == (code == 0)
    return report


def failure(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main(["verify", *map(str, argv)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("mcore-swift: error: ")
    return captured.err


# --- the same ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["llama-biases", "qwen2-tied", "qwen3", "qwen3-moe"])
def test_a_folder_and_its_checkpoint_are_the_same(
    models: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], variant: str
) -> None:
    folder, checkpoint = models(variant), tmp_path / "checkpoint"
    convert(folder, checkpoint)
    stored = load_file(folder / "model.safetensors")
    capsys.readouterr()
    for pair in ((folder, checkpoint), (checkpoint, folder), (checkpoint, checkpoint)):
        report = result(capsys, 0, *pair)
        assert report["tensors"] == len(stored)
        assert report["elements"] == sum(tensor.numel() for tensor in stored.values())
        assert (report["differing_elements"], report["differences"]) == (0, [])


def test_a_checkpoint_without_a_configuration_borrows_one(
    models: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, checkpoint = models("llama"), tmp_path / "checkpoint"
    convert(folder, checkpoint)
    shutil.rmtree(checkpoint / "hf")
    capsys.readouterr()
    assert "name a Hugging Face folder of the same model with --config FOLDER" in failure(capsys, checkpoint, folder)
    result(capsys, 0, checkpoint, folder, "--config", folder)


def test_a_tied_embedding_may_be_saved_twice(
    models: Callable[..., Path], altered: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tied = models("qwen2-tied")
    twice = altered(tied, lambda t: t.update({HEAD: t[EMBEDDING]}), tie_word_embeddings=False)
    result(capsys, 0, tied, twice)
    result(capsys, 0, twice, tied)


def test_keys_that_do_not_change_logits_may_differ(
    models: Callable[..., Path], altered: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    result(capsys, 0, models("llama"), altered(models("llama"), initializer_range=0.5, eos_token_id=3, use_cache=False))


def test_other_dtypes_are_allowed_when_asked_for(
    models: Callable[..., Path], altered: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = models("llama")
    rounded = altered(folder, lambda t: t.update({name: tensor.bfloat16() for name, tensor in t.items()}))
    report = result(capsys, 1, folder, rounded)
    assert {item["kind"] for item in report["differences"]} == {"dtype"}
    assert report["differences"][0]["message"].startswith("F32 in A, BF16 in B")
    report = result(capsys, 0, folder, rounded, "--any-dtype")
    assert report["max_ulp"] == 0 and report["differing_elements"] > 0.9 * report["elements"]


# --- planted faults ---------------------------------------------------------------------------------------------------


def _flip_bit(tensors: Tensors) -> None:
    tensors[UP].view(torch.int32)[3, 5] ^= 1


def _swap(one: str, other: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return edit


def _llama_cpp_order(tensors: Tensors) -> None:
    for name, heads in ((Q, 4), (K, 2)):
        rows = tensors[name].view(heads, 2, -1, tensors[name].size(1))
        tensors[name] = rows.transpose(1, 2).reshape(tensors[name].shape)


def _add(name: str, value: float) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensors[name] + value})


def _drop(part: str) -> Callable[[Tensors], list[Any]]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name]


EXPERT = "model.layers.0.mlp.experts.{}.{}_proj.weight"
PROJECTIONS = ("gate", "up", "down")


def _move_experts(moves: dict[int, int]) -> Callable[[Tensors], None]:
    """Expert `to` gets what expert `old` had, for each old: to."""

    def edit(tensors: Tensors) -> None:
        moved = {EXPERT.format(to, p): tensors[EXPERT.format(old, p)] for old, to in moves.items() for p in PROJECTIONS}
        tensors.update(moved)

    return edit


def _where_experts_are(moves: dict[int, int], word: str) -> dict[str, str]:
    return {
        EXPERT.format(old, p): f"{word}: it is {EXPERT.format(to, p)} in B"
        for old, to in moves.items()
        for p in PROJECTIONS
    }


NEXT_EXPERT = {expert: (expert + 1) % 8 for expert in range(8)}
NORM = "model.layers.1.input_layernorm.weight"
EQUAL_HEADS = {"num_key_value_heads": 4}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}

# name → (variant, its changes, edit of the tensors, config keys, {tensor: what is said of it})
FAULTS: dict[str, tuple[str, dict[str, Any], Callable[[Tensors], Any], dict[str, Any], dict[str, str]]] = {
    "one flipped bit": ("llama", {}, _flip_bit, {}, {UP: "1 of 6,144 elements differ, the worst by 1 ulp at [3, 5]"}),
    "q and k swapped": (
        "llama",
        EQUAL_HEADS,
        _swap(Q, K),
        {},
        {Q: f"swapped: it is {K} in B", K: f"swapped: it is {Q} in B"},
    ),
    "q and k swapped, of other sizes": ("llama", {}, _swap(Q, K), {}, {Q: "swapped: it is", K: "swapped: it is"}),
    "gate and up swapped": (
        "qwen3",
        {},
        _swap(GATE, UP),
        {},
        {GATE: f"swapped: it is {UP} in B", UP: f"swapped: it is {GATE} in B"},
    ),
    "experts off by one": ("qwen3-moe", {}, _move_experts(NEXT_EXPERT), {}, _where_experts_are(NEXT_EXPERT, "moved")),
    "two experts swapped": (
        "qwen3-moe",
        {},
        _move_experts({2: 7, 7: 2}),
        {},
        _where_experts_are({2: 7, 7: 2}, "swapped"),
    ),
    "one flipped bit of an expert": (
        "qwen3-moe",
        {},
        lambda t: t[EXPERT.format(5, "up")].view(torch.int32)[3, 5].bitwise_xor_(1),
        {},
        {EXPERT.format(5, "up"): "1 of 2,560 elements differ, the worst by 1 ulp at [3, 5]"},
    ),
    "RoPE permutation": (
        "llama",
        {},
        _llama_cpp_order,
        {},
        dict.fromkeys((Q, K), "wrong RoPE permutation: its rows are in llama.cpp's order in B"),
    ),
    "RoPE base": (
        "llama",
        {},
        lambda t: None,
        ROPE,
        {"config.json: rope_parameters.rope_theta": "1000.0 in A, 10000.0 in B"},
    ),
    "norm epsilon": (
        "llama",
        {},
        lambda t: None,
        {"rms_norm_eps": 1e-6},
        {"config.json: rms_norm_eps": "1e-05 in A, 1e-06 in B"},
    ),
    "missing QKV bias": (
        "qwen2",
        {},
        _drop("_proj.bias"),
        {},
        {f"model.layers.{i}.self_attn.{x}_proj.bias": "missing: it is not in B" for i in range(2) for x in "qkv"},
    ),
    "tied embedding saved untied with other values": (
        "qwen2-tied",
        {},
        lambda t: t.update({HEAD: t[EMBEDDING] + 1e-3}),
        {"tie_word_embeddings": False},
        {HEAD: f"elements differ ({EMBEDDING} of A, {HEAD} of B)"},
    ),
    "tied embedding saved twice with other values": (
        "qwen2-tied",
        {},
        lambda t: t.update({HEAD: t[EMBEDDING] + 1e-3}),
        {},
        {HEAD: "B ties its embeddings, but saved another lm_head.weight too"},
    ),
    "untied head lost": (
        "llama",
        {},
        _drop(HEAD),
        {"tie_word_embeddings": True},
        {HEAD: f"elements differ ({HEAD} of A, {EMBEDDING} of B)"},
    ),
    "norm off by one": ("llama", {}, _add(NORM, -1.0), {}, {NORM: "off by one: each element is 1 smaller in B"}),
    "zero-centred norm off by one": (
        "gemma2",
        {},
        _add(NORM, 1.0),
        {},
        {NORM: "off by one: each element is 1 larger in B (a zero-centred norm stores weight − 1)"},
    ),
    "NaN": ("llama", {}, lambda t: t[UP].fill_(float("nan")), {}, {UP: "6,144 NaN or infinite values in B"}),
    "extra tensor": (
        "llama",
        {},
        lambda t: t.update({"model.extra": torch.ones(2)}),
        {},
        {"model.extra": "extra: it is not in A"},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_named(
    models: Callable[..., Path], altered: Callable[..., Path], capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    variant, changes, edit, config, expected = FAULTS[fault]
    folder = models(variant, **changes)
    report = result(capsys, 1, folder, altered(folder, edit, **config))
    said: dict[str, str] = {}
    for item in report["differences"]:
        said[item["name"]] = f"{said.get(item['name'], '')}{item['message']} — {item['hint']}"
    assert said.keys() == expected.keys()
    for name, message in expected.items():
        assert message in said[name]


def test_a_fault_in_a_checkpoint_is_named_in_hugging_face_terms(
    models: Callable[..., Path], altered: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = models("llama")
    convert(altered(folder, _flip_bit), tmp_path / "checkpoint")
    capsys.readouterr()
    assert main(["verify", str(folder), str(tmp_path / "checkpoint")]) == 1
    shown = capsys.readouterr().out
    assert f"{UP}: 1 of 6,144 elements differ, the worst by 1 ulp at [3, 5]" in shown
    assert shown.endswith(f"1 elements differ, the worst by 1 ulp, in {UP}\nNOT the same\n")


def test_experts_off_by_one_in_a_checkpoint(
    models: Callable[..., Path], altered: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint holds all experts of a layer in one tensor; they are told apart, and so is where each one went."""
    folder = models("qwen3-moe")
    convert(altered(folder, _move_experts(NEXT_EXPERT)), tmp_path / "checkpoint")
    capsys.readouterr()
    report = result(capsys, 1, folder, tmp_path / "checkpoint")
    expected = _where_experts_are(NEXT_EXPERT, "moved")
    assert {item["name"]: item["hint"] for item in report["differences"]} == expected


def test_ulp() -> None:
    one = torch.tensor([1.0])
    for dtype, step in ((torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10), (torch.float32, 2.0**-23)):
        assert distance(one.to(dtype), (one + step).to(dtype)).ulp == 1
        assert distance(one.to(dtype), (one - step).to(dtype)).ulp == 2  # below 1 they are half as far apart
        assert distance(torch.tensor([0.0], dtype=dtype), torch.tensor([-0.0], dtype=dtype)).ulp == 1
    assert distance(one.bfloat16(), one + 2**-9).ulp == 0 and distance(one.bfloat16(), one + 2**-9).elements == 1
    values = torch.zeros(5, 3)
    values[3, 1] = 1e-45
    found = distance(torch.zeros(5, 3), values)
    assert (found.elements, found.ulp, found.worst) == (1, 1, 10)


def test_blocks_are_all_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt_tools.difference.BLOCK", 4)
    a, b = torch.zeros(11), torch.zeros(11)
    b[2], b[10], a[7] = 1e-45, 3e-45, float("inf")
    found = distance(a, b)
    assert (found.elements, found.bad_a, found.bad_b, found.worst) == (3, 1, 0, 7)


def test_a_tolerance_in_ulp(
    models: Callable[..., Path], altered: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flipped = altered(models("llama"), _flip_bit)
    report = result(capsys, 0, models("llama"), flipped, "--max-ulp", 1)
    assert (report["max_ulp"], report["worst"], report["differing_elements"]) == (1, UP, 1)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input(models: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, checkpoint = models("llama"), tmp_path / "checkpoint"
    (tmp_path / "empty").mkdir()
    shutil.copytree(folder, tmp_path / "cut")
    data = (folder / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(data[: len(data) // 2])
    shutil.copytree(folder, tmp_path / "unknown")
    (tmp_path / "unknown" / "config.json").write_text('{"model_type": "lama"}')
    convert(folder, checkpoint)
    (checkpoint / "metadata.json").write_text("{}")
    capsys.readouterr()
    for argv, message in (
        ((folder, tmp_path / "none"), "none: no such file or folder"),
        ((folder, tmp_path / "empty"), "empty: not a model: found nothing"),
        ((folder, folder / "model.safetensors"), "a file; allowed: a Hugging Face folder"),
        ((tmp_path / "cut", folder), "truncated"),
        ((folder, tmp_path / "unknown"), "model_type 'lama' is not a known family"),
        ((folder, checkpoint), "metadata.json: damaged"),
        ((folder,), "the following arguments are required: B"),
        ((folder, folder, "--max-ulp", -1), "found '-1'; it must be a whole number, at least 0"),
        ((folder, folder, "--logits"), "--logits and --text FILE go together"),
        ((folder, folder, "--text", "x"), "--logits and --text FILE go together"),
        ((folder, folder, "--min-top1", 1.5), "found '1.5'; it must be a number between 0 and 1"),
        ((folder, folder, "--logits", "--text", tmp_path / "none"), "can't be read as UTF-8 text"),
    ):
        assert message in failure(capsys, *argv)


# --- logits -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spoken(models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Model folders with a tokenizer: a token a byte."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(kinds.BPE({byte: number for number, byte in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)

    def make(variant: str) -> Path:
        folder = models(variant, vocab_size=270)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        "The quick brown fox jumps over 13 lazy dogs. Why? It was late, & nobody had told them: run away!"[:96]
    )
    return path


WINDOWS = ("--windows", 3, "--window-length", 32)


@pytest.mark.parametrize("variant", ["llama-rope-llama3", "mistral-window", "qwen2-tied", "qwen3", "qwen3-moe"])
def test_logits_of_both_engines_agree(
    spoken: Callable[[str], Path], text: Path, capsys: pytest.CaptureFixture[str], variant: str
) -> None:
    """A folder against itself: transformers and Megatron-Core give the same logits within float32's noise."""
    found = result(capsys, 0, spoken(variant), spoken(variant), "--logits", "--text", text, *WINDOWS)["logits"]
    assert (found["engine_a"], found["engine_b"]) == ("transformers", "Megatron-Core")
    assert found["positions"] == len(found["per_position"]) == 96
    assert found["relative"] <= 1e-5 and found["top1"] == 1.0 and found["max_kl"] < 1e-8
    assert 0 < found["mean_difference"] < found["max_difference"]
    assert len({round(position["kl"], 20) for position in found["per_position"]}) > 40  # the text is no single token


@pytest.mark.slow
def test_logits_of_a_checkpoint_and_of_two(
    spoken: Callable[[str], Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, checkpoint = spoken("qwen3"), tmp_path / "checkpoint"
    convert(folder, checkpoint)
    capsys.readouterr()
    options = ("--logits", "--text", text, *WINDOWS)
    found = result(capsys, 0, checkpoint, folder, *options)["logits"]
    assert (found["engine_a"], found["engine_b"]) == ("Megatron-Core", "transformers")
    found = result(capsys, 0, checkpoint, checkpoint, *options)["logits"]
    assert (found["engine_a"], found["engine_b"]) == ("Megatron-Core", "Megatron-Core")
    assert found["max_difference"] == 0 and found["max_kl"] == 0


def test_logits_show_a_wrong_rope_base(
    spoken: Callable[[str], Path],
    altered: Callable[..., Path],
    text: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = altered(spoken("llama-rope-llama3"), rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    argv = (spoken("llama-rope-llama3"), wrong, "--logits", "--text", text, *WINDOWS)
    found = result(capsys, 1, *argv)["logits"]
    assert found["relative"] > 1e-2 and found["top1"] < 1 and found["max_kl"] > 1e-3
    assert [failure.split()[0] for failure in found["failures"]] == ["difference", "top-1", "KL"]
    assert found["per_position"][0]["max_difference"] < 1e-4  # the first token has nothing to look back at
    assert main(["verify", *map(str, argv)]) == 1
    shown = capsys.readouterr().out
    assert "failed: top-1 agreement" in shown and "--min-top1 1" in shown


def test_bad_input_for_logits(
    spoken: Callable[[str], Path], altered: Callable[..., Path], text: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = spoken("qwen3")
    silent = altered(folder)
    for path in silent.glob("tokenizer*"):
        path.unlink()
    (tmp_path / "rows.jsonl").write_text('{"text": "w1"}\n{"txt": "w2"}\n')
    for argv, message in (
        ((folder, folder, "--text", text), "the text has 96 tokens, but 4 windows of 256 need 1,024"),
        ((folder, folder, "--text", text, "--windows", 1, "--window-length", 65), "65 tokens are more than the 64 of"),
        ((folder, folder, "--text", tmp_path / "rows.jsonl"), 'line 2: not a row with a text: expected {"text": "…"}'),
        ((silent, silent, "--text", text), "is a tokenizer; logits are compared on its tokens"),
    ):
        assert message in failure(capsys, *argv, "--logits")


@pytest.mark.nightly
def test_a_real_model_through_both_engines(smollm2: Path, data_folder: Path, capsys: Any) -> None:
    """SmolLM2's own tokens of Wikipedia, within the default limits."""
    text = data_folder / "wikipedia_head.jsonl"
    argv = (smollm2, smollm2, "--logits", "--text", text, "--windows", 2, "--window-length", 128)
    found = result(capsys, 0, *argv)["logits"]
    assert found["positions"] == 256 and 0 < found["relative"] < 5e-6 and found["max_kl"] < 1e-9
