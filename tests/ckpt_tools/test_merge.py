"""`mcore-swift merge` against peft's own merge, and everything an adapter can have wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tools.merge import merge
from ckpt_tools.peft_folder import CONFIG, WEIGHTS
from mcore_swift.cli import main
from mcore_swift.errors import InputError
from mcore_swift.weights.safetensors_io import INDEX, SafetensorsFolder
from tests.distributed.tiny_models import tiny_folder, tiny_model

SMALL: dict[str, Any] = {"num_hidden_layers": 2}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# name → (variant, LoraConfig's arguments)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": LINEAR}),
    "rslora": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    "regex": ("qwen3", {"target_modules": r".*layers\.1\.self_attn\.[qk]_proj"}),
    "all-linear": ("mistral-window", {"target_modules": "all-linear"}),
    "layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "patterns": (
        "llama",
        {
            "target_modules": LINEAR,
            "rank_pattern": {"o_proj": 2, r"layers\.0\.mlp\.up_proj": 6},
            "alpha_pattern": {"down_proj": 32, r"model\.layers\.1\.self_attn\.q_proj": 1},
        },
    ),
    "dora": ("llama", {"target_modules": LINEAR, "use_dora": True}),
    "dora and rslora": ("qwen3", {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "use_rslora": True}),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "saved modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "tied": ("llama-tied-odd-vocabulary", {"target_modules": LINEAR}),
}


def train_adapter(base: Path, folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Saves an adapter with random weights in `folder`; returns what peft merges, in float32."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | changes))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                values = 0.2 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(values.abs() + 0.5 if "magnitude" in name else values)
    wrapped.save_pretrained(str(folder))
    return wrapped.merge_and_unload().state_dict()  # type: ignore[operator]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("bases")
    return lambda variant: tiny_folder(folder / variant, variant, **SMALL)


@pytest.fixture(scope="module")
def plain(bases: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("plain") / "adapter"
    return folder, train_adapter(bases("llama"), folder, target_modules=LINEAR)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_equals_what_peft_merges(bases: Callable[[str], Path], tmp_path: Path, case: str) -> None:
    variant, changes = CASES[case]
    expected = train_adapter(bases(variant), tmp_path / "adapter", **changes)
    merge(bases(variant), tmp_path / "adapter", tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    before = load_file(bases(variant) / "model.safetensors")
    assert found.keys() == before.keys()
    for name, tensor in found.items():
        assert (tensor - expected[name]).abs().max() <= 2e-7 * expected[name].abs().max(), name
    assert any(not torch.equal(found[name], before[name]) for name in before)
    unchanged = [name for name in before if torch.equal(expected[name], before[name])]
    assert all(torch.equal(found[name], before[name]) for name in unchanged)


def test_experts(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """Adapters of single experts, as older transformers had them."""
    base, adapter = bases("qwen3-moe"), tmp_path / "adapter"
    before = load_file(base / "model.safetensors")
    modules = [f"model.layers.0.mlp.experts.{e}.{name}_proj" for e in range(8) for name in ("gate", "up", "down")]
    modules += [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]
    generator, lora = torch.Generator().manual_seed(5), {}
    for module in modules:
        rows, columns = before[f"{module}.weight"].shape
        lora[f"base_model.model.{module}.lora_A.weight"] = torch.randn(4, columns, generator=generator)
        lora[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, 4, generator=generator)
    adapter.mkdir()
    save_file(lora, adapter / WEIGHTS)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["gate_proj", "up_proj", "down_proj"]}
    (adapter / CONFIG).write_text(json.dumps(config))
    merge(base, adapter, tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    for name, weight in before.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in lora:
            weight = weight + 2.0 * (lora[f"{key}.lora_B.weight"] @ lora[f"{key}.lora_A.weight"])
        assert torch.equal(found[name], weight), name
    (adapter / CONFIG).write_text(json.dumps(config | {"target_parameters": ["mlp.experts.gate_up_proj"]}))
    with pytest.raises(InputError, match=r"gate_up_proj is among target_parameters, but the adapter has nothing for"):
        merge(base, adapter, tmp_path / "other")


STACKED: dict[str, dict[str, Any]] = {
    "both": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "gate_up in one layer": {"target_modules": [], "target_parameters": ["layers.0.mlp.experts.gate_up_proj"]},
    "down of another rank": {
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "rank_pattern": {r"experts\.down_proj": 7},
        "use_rslora": True,
    },
    "a dense layer's parameters": {"target_parameters": ["layers.1.mlp.up_proj.weight", "experts.down_proj"]},
}


def by_expert(name: str, merged: dict[str, torch.Tensor]) -> torch.Tensor:
    """A tensor of a folder, from transformers' own names."""
    name = name.replace("block_sparse_moe", "mlp")
    place, _, expert = name.partition(".experts.")
    if not expert:
        return merged[name]
    number, leaf, _ = expert.split(".")
    if leaf in ("down_proj", "w2"):
        return merged[f"{place}.experts.down_proj"][int(number)]
    both = merged[f"{place}.experts.gate_up_proj"][int(number)]
    return both.chunk(2)[leaf in ("up_proj", "w3")]


@pytest.mark.parametrize(
    ("variant", "case"),
    [
        pytest.param(variant, case, marks=() if (variant, case) == ("mixtral", "both") else pytest.mark.nightly)
        for variant in ("mixtral", "qwen3-moe")
        for case in STACKED
        if (variant, case) != ("mixtral", "a dense layer's parameters")
    ],
)
def test_stacked_experts(bases: Callable[[str], Path], tmp_path: Path, variant: str, case: str) -> None:
    """Adapters of all experts of a layer together, as PEFT makes them: what peft merges."""
    changes = {"target_modules": ["q_proj"]} | STACKED[case]
    expected = train_adapter(bases(variant), tmp_path / "adapter", **changes)
    merge(bases(variant), tmp_path / "adapter", tmp_path / "merged")
    found, before = (load_file(place / "model.safetensors") for place in (tmp_path / "merged", bases(variant)))
    assert found.keys() == before.keys()
    for name, tensor in found.items():
        wanted = by_expert(name, expected)
        assert (tensor - wanted).abs().max() <= 4e-7 * wanted.abs().max(), name
    changed = [name for name in found if not torch.equal(found[name], before[name])]
    assert sum(".experts." in name for name in changed) in (8 * 1, 8 * 2, 8 * 3, 8 * 4, 8 * 6)


def test_bf16_base_is_merged_in_fp32_and_rounded_once(plain: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    adapter, _ = plain
    base = tiny_folder(tmp_path / "base", "llama", dtype=torch.bfloat16, **SMALL)
    merge(base, adapter, tmp_path / "merged")
    found, lora = load_file(tmp_path / "merged" / "model.safetensors"), load_file(adapter / WEIGHTS)
    for name, weight in load_file(base / "model.safetensors").items():
        key = "base_model.model." + name.removesuffix(".weight")
        if f"{key}.lora_A.weight" in lora:
            delta = 2.0 * (lora[f"{key}.lora_B.weight"] @ lora[f"{key}.lora_A.weight"])
            assert torch.equal(found[name], (weight.float() + delta).bfloat16()), name
        else:
            assert torch.equal(found[name], weight)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


def test_dtype_sharded_base_and_metadata(plain: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """A base in several files, written in another dtype; configuration and tokenizer come along, code doesn't."""
    adapter, expected = plain
    tiny_model("llama", **SMALL).save_pretrained(tmp_path / "base", max_shard_size="100KB")
    assert (tmp_path / "base" / INDEX).is_file()
    for name in ("tokenizer.json", "modeling_own.py"):
        (tmp_path / "base" / name).write_text("{}")
    assert main(["merge", *map(str, (tmp_path / "base", adapter, tmp_path / "out" / "m")), "--dtype", "bf16"]) == 0
    merged = SafetensorsFolder(tmp_path / "out" / "m")
    assert {entry.dtype for entry in merged.entries.values()} == {"BF16"}
    assert all(torch.equal(merged.read(name), expected[name].bfloat16()) for name in merged.entries)
    assert sorted(path.name for path in (tmp_path / "out" / "m").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert json.loads((tmp_path / "out" / "m" / "config.json").read_text())["dtype"] == "bfloat16"


# --- bad input --------------------------------------------------------------------------------------------------------


def _edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(adapter: Path) -> None:
        config = json.loads((adapter / CONFIG).read_text()) | changes
        (adapter / CONFIG).write_text(json.dumps(config))

    return edit


def _edit_tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(adapter: Path) -> None:
        tensors = load_file(adapter / WEIGHTS)
        edit(tensors)
        save_file(tensors, adapter / WEIGHTS)

    return rewrite


def _both(*edits: Callable[[Path], None]) -> Callable[[Path], None]:
    def edit_all(adapter: Path) -> None:
        for edit in edits:
            edit(adapter)

    return edit_all


def _pickled(adapter: Path) -> None:
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")


def _truncated(adapter: Path) -> None:
    data = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(data[:-10])


Q = "base_model.model.model.layers.0.self_attn.q_proj"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda a: (a / CONFIG).unlink(), f"there is no {CONFIG}; a PEFT adapter folder is needed"),
    "config is not JSON": (lambda a: (a / CONFIG).write_text("{"), f"{CONFIG}: not valid JSON"),
    "config is a list": (lambda a: (a / CONFIG).write_text("[]"), "found a list, needed is a JSON object"),
    "another method": (_edit_config(peft_type="LOHA"), "peft_type: 'LOHA' is not supported; allowed: ['LORA']"),
    "no method": (_edit_config(peft_type=None), "peft_type: None is not supported"),
    "biases": (_edit_config(bias="all"), "bias: 'all' is not supported; allowed: ['none']"),
    "pissa": (_edit_config(init_lora_weights="pissa"), "init_lora_weights: 'pissa' is not supported"),
    "fan_in_fan_out": (_edit_config(fan_in_fan_out=True), "fan_in_fan_out: True is not supported"),
    "lora_bias": (_edit_config(lora_bias=True), "lora_bias: True is not supported"),
    "qalora": (_edit_config(use_qalora=True), "use_qalora: True is not supported"),
    "replicated layers": (_edit_config(layer_replication=[[0, 2]]), "layer_replication: [[0, 2]] is not supported"),
    "target_parameters": (_edit_config(target_parameters=["w"]), "target_parameters: w is not in the base"),
    "of the future": (_edit_config(use_xlora=1), "use_xlora: 1 is not supported; allowed: it is left out or off"),
    "rank 0": (_edit_config(r=0), "r: found 0; it must be a whole number, at least 1"),
    "alpha a text": (_edit_config(lora_alpha="8"), "lora_alpha: found '8'; it must be a number"),
    "no targets": (_edit_config(target_modules=None), "target_modules: found None; it must be a regular expression"),
    "bad pattern": (_edit_config(target_modules="(q_proj"), "'(q_proj' is not a pattern of module names"),
    "rank_pattern a list": (_edit_config(rank_pattern=[4]), "rank_pattern: found [4]; it must be a table"),
    "alpha_pattern's values": (_edit_config(alpha_pattern={"q_proj": "x"}), "alpha_pattern: found {'q_proj': 'x'}"),
    "another rank": (_edit_config(r=5), f"{Q}.lora_A.weight has shape [4, 64], [5, 64] is needed"),
    "no weights": (lambda a: (a / WEIGHTS).unlink(), f"there is no {WEIGHTS}"),
    "pickled weights": (_pickled, "a pickled adapter_model.bin could execute code"),
    "truncated": (_truncated, "truncated: its header speaks of"),
    "no tensors": (
        _both(_edit_tensors(lambda t: t.clear()), _edit_config(target_modules=[])),
        "it holds no tensors; there is nothing to merge",
    ),
    "B is lost": (
        _edit_tensors(lambda t: t.pop(f"{Q}.lora_B.weight")),
        "model.layers.0.self_attn.q_proj has A where A, B are needed",
    ),
    "a module is lost": (
        _edit_tensors(lambda t: [t.pop(f"{Q}.lora_{part}.weight") for part in "AB"]),
        "model.layers.0.self_attn.q_proj is among target_modules, but the adapter has nothing for it",
    ),
    "DoRA without magnitudes": (_edit_config(use_dora=True), "has A, B where A, B, magnitude_vector are needed"),
    "magnitudes without DoRA": (
        _edit_tensors(lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(64)})),
        "has A, B, magnitude_vector where A, B are needed",
    ),
    "not a target": (
        _edit_config(target_modules=["k_proj"]),
        "model.layers.0.self_attn.q_proj is not among adapter_config.json's target_modules",
    ),
    "module of another model": (
        _both(
            _edit_tensors(lambda t: t.update({f"{Q}x.lora_{p}.weight": torch.ones(4, 4) for p in "AB"})),
            _edit_config(target_modules=[*LINEAR, "q_projx"]),
        ),
        "model.layers.0.self_attn.q_projx is not in the base. Did you mean 'model.layers.0.self_attn.q_proj.weight'?",
    ),
    "tensor of no use": (
        _edit_tensors(lambda t: t.update({f"{Q}.extra": torch.ones(4)})),
        f"{Q}.extra is no LoRA A or B of a linear layer, and modules_to_save does not name it",
    ),
    "embedding LoRA": (
        _edit_tensors(lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 112)})),
        "lora_embedding_A is no LoRA A or B of a linear layer",
    ),
    "integers": (
        _edit_tensors(lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 64, dtype=torch.int8)})),
        "q_proj.lora_A.weight is I8, allowed: F32, BF16, F16",
    ),
    "saved module of another shape": (
        _both(
            _edit_tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(7, 64)})),
            _edit_config(modules_to_save=["lm_head"]),
        ),
        "lm_head.weight has shape [7, 64], the base's has [112, 64]",
    ),
    "NaN": (
        _edit_tensors(lambda t: t[f"{Q}.lora_A.weight"].fill_(float("nan"))),
        "merged into model.layers.0.self_attn.q_proj.weight it gives NaN or infinite values",
    ),
}


def failure(tmp_path: Path, *argv: object) -> str:
    """The message of a merge that must be refused, having left nothing in `tmp_path`."""
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(InputError) as caught:
        merge(*argv)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    return str(caught.value)


@pytest.mark.parametrize("case", BAD)
def test_bad_adapter(bases: Callable[[str], Path], plain: tuple[Path, Any], tmp_path: Path, case: str) -> None:
    break_it, message = BAD[case]
    adapter = tmp_path / "adapter"
    shutil.copytree(plain[0], adapter)
    break_it(adapter)
    found = failure(tmp_path, bases("llama"), adapter, tmp_path / "merged")
    assert message in found and str(adapter) in found


def test_adapter_of_another_base_lists_every_misfit(
    bases: Callable[[str], Path], plain: tuple[Path, Any], tmp_path: Path
) -> None:
    message = failure(tmp_path, bases("mistral-head-dim"), plain[0], tmp_path / "merged")  # heads of 24, not 16
    assert "self_attn.q_proj.lora_B.weight has shape [64, 4], [96, 4] is needed" in message
    assert message.count("is needed") == 8  # q, k, v and o of both layers; the MLPs fit


def test_tied_embeddings_are_not_torn_apart(bases: Callable[[str], Path], plain: Any, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(plain[0], adapter)
    saved = {"base_model.model.model.embed_tokens.weight": torch.ones(101, 64)}
    _both(_edit_tensors(lambda t: t.update(saved)), _edit_config(modules_to_save=["embed_tokens"]))(adapter)
    message = failure(tmp_path, bases("llama-tied-odd-vocabulary"), adapter, tmp_path / "merged")
    assert "embed_tokens.weight is half of an embedding that the base ties to its head" in message


def test_what_is_no_weight_is_not_merged(bases: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    for method in ("bottleneck", "reft"):
        (tmp_path / "adapter/adapter.json").write_text(json.dumps({"method": method, "rank": 4}))
        assert f"{method} changes what layers give" in failure(
            tmp_path, bases("llama"), tmp_path / "adapter", tmp_path / "merged"
        )


def test_places(bases: Callable[[str], Path], plain: tuple[Path, Any], tmp_path: Path) -> None:
    base, adapter = bases("llama"), plain[0]
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text('{"model_type": "lama"}')
    for arguments, message in (
        ((base, adapter, tmp_path / "there"), "there: exists already; name a folder that doesn't"),
        ((base, adapter, base / "merged"), f"lies inside {base}, which is read from"),
        ((base, adapter, adapter / "merged"), f"lies inside {adapter}, which is read from"),
        ((base, adapter, tmp_path / "file" / "merged"), "can't be written"),
        ((tmp_path / "none", adapter, tmp_path / "m"), "there is no config.json; a Hugging Face model folder"),
        ((tmp_path / "unknown", adapter, tmp_path / "m"), "'lama' is not a known family"),
        ((base, tmp_path / "none", tmp_path / "m"), f"there is no {CONFIG}; a PEFT adapter folder is needed"),
    ):
        assert message in failure(tmp_path, *arguments)
    with pytest.raises(InputError, match="--dtype: 'int8' is unknown; allowed: bf16, fp16, fp32"):
        merge(base, adapter, tmp_path / "m", dtype="int8")


def test_a_full_disk_leaves_nothing(
    bases: Callable[[str], Path], plain: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mcore_swift.weights.safetensors_io.write_tensor", full)
    message = failure(tmp_path, bases("llama"), plain[0], tmp_path / "merged")
    assert "could not be written: No space left on device; nothing was left there" in message
