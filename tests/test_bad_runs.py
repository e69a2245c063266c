"""Bad input through the real command: one message that names what is wrong, exit code 2, and nothing half-written.

Each case runs `mcore-swift train` in a fork of the test process, which has imported torch and Megatron once.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data_pipeline.conftest import tokenizer_folder  # noqa: F401  (a fixture)
from tests.distributed.harness import prepared, run_ranks

CHATS = [
    {"messages": [{"role": "user", "content": f"What is {n} and {n}?"}, {"role": "assistant", "content": str(2 * n)}]}
    for n in range(40)
]
Change = Callable[[Path], object]


@pytest.fixture(scope="session")
def good_model(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:  # noqa: F811
    """A tiny Qwen2 with a tokenizer that fits it."""
    import datasets  # noqa: F401  (so that the forks need not import it each)
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM  # noqa: F401

    prepared()
    import mcore_swift.training.trainer  # noqa: F401

    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=640,
        max_position_embeddings=128,
    )
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    for path in tokenizer_folder.iterdir():
        shutil.copyfile(path, folder / path.name)
    return folder


@pytest.fixture
def place(tmp_path: Path, good_model: Path) -> Path:
    """A folder with model/, chats.jsonl and a recipe that works."""
    shutil.copytree(good_model, tmp_path / "model")
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{path: {tmp_path / 'model'}}}\n"
        f"data: {{train: {tmp_path / 'chats.jsonl'}, sequence_length: 64, cache_dir: {tmp_path / 'cache'}}}\n"
        "schedule: {steps: 2, global_batch_size: 2}\n"
        f"checkpoint: {{dir: {tmp_path / 'run'}, interval: 1}}\n"
        "logging: {tensorboard: false}\n"
        "runtime: {device: cpu, threads: 1}\n"
    )
    return tmp_path


def train(place: Path, *overrides: str, **environment: str) -> tuple[int, str]:
    """Runs the command; returns its exit code and what it wrote to standard error."""
    code, _, errors = run_ranks(command, 1, ["train", str(place / "recipe.yaml"), *overrides], environment)[0]
    return code, errors


def command(argv: list[str], environment: dict[str, str]) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        os.dup2(output.fileno(), 1)
        os.dup2(errors.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w") for number in (1, 2))
        from mcore_swift.cli import main

        try:
            code = main(argv)
        except SystemExit as leave:
            code = int(leave.code or 0)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for file in (output, errors):
            file.seek(0)
        return code, output.read().decode(), errors.read().decode()


def edit_json(name: str, **values: Any) -> Change:
    def change(place: Path) -> None:
        path = place / "model" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def edit_tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def change(place: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = place / "model" / "model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return change


def rows(*found: Any) -> Change:
    """Replaces the training rows; a string is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in found]
    return lambda place: (place / "chats.jsonl").write_text("".join(line + "\n" for line in lines))


def truncate(place: Path) -> None:
    path = place / "model" / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1000)


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.2.mlp.down_proj.weight"][3, 5] = float("nan")


def nothing(place: Path) -> None: ...


K_PROJ = "model.layers.1.self_attn.k_proj.weight"
NO_TP = ["--parallel.tp", "3"]
ASSISTANT_FIRST = {"messages": [{"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Hi"}]}
NO_ANSWER = {"messages": [{"role": "user", "content": "Is anybody there?"}]}
LONG = {"messages": [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "long " * 200}]}

CASES: dict[str, tuple[Change, list[str], tuple[str, ...]]] = {
    "no recipe": (lambda p: (p / "recipe.yaml").unlink(), [], ("recipe.yaml",)),
    "no model folder": (nothing, ["--model.path", "no/such/model"], ("model.path", "no/such/model")),
    "no config": (lambda p: (p / "model" / "config.json").unlink(), [], ("config.json",)),
    "broken config": (lambda p: (p / "model" / "config.json").write_text("{"), [], ("config.json", "line 1")),
    "no weights": (lambda p: (p / "model" / "model.safetensors").unlink(), [], ("model.safetensors", "pickle")),
    "no tokenizer": (lambda p: (p / "model" / "tokenizer.json").unlink(), [], ("tokenizer",)),
    "unknown family": (edit_json("config.json", model_type="qwen22"), [], ("qwen22", "Did you mean 'qwen2'?")),
    "code in the folder": (
        edit_json("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]}),
        [],
        ("auto_map", "never executed"),
    ),
    "RoPE that changes with the length": (
        edit_json("config.json", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        [],
        ("rope_type", "dynamic", "yarn"),
    ),
    "wrong YAML type": (nothing, ["--schedule.global_batch_size", "two"], ("schedule.global_batch_size", "two")),
    "unknown key": (nothing, ["--schedule.learning_rat", "1"], ("learning_rat", "learning_rate")),
    "TP does not divide the heads": (nothing, NO_TP, ("parallel.tp", "3", "allowed: 1, 2")),
    "more stages than layers": (nothing, ["--parallel.pp", "8"], ("parallel.pp", "4 layers")),
    "stages that leave no layers for others": (
        nothing,
        ["--parallel.pp", "3", "--parallel.first_stage_layers", "3"],
        ("parallel.first_stage_layers", "1 of the model's 4 layers"),
    ),
    "a pipeline layout for another model": (
        nothing,
        ["--parallel.pp", "2", "--parallel.pipeline_layout", "Et*3|t*2L"],
        ("parallel.pipeline_layout", "Ettt|ttL", "4 layers"),
    ),
    "batch not divisible": (
        nothing,
        ["--schedule.micro_batch_size", "3"],
        ("schedule.global_batch_size", "micro_batch_size"),
    ),
    "batch not divisible over ranks": (nothing, ["--parallel.dp", "4"], ("schedule.global_batch_size", "4")),
    "ranks that do not fit the layout": (
        nothing,
        ["--parallel.pp", "2", "--runtime.ranks", "3"],
        ("runtime.ranks", "3", "pp 2"),
    ),
    "no GPU": (nothing, ["--runtime.device", "cuda"], ("runtime.device", "no GPU is visible")),
    "FP8 on the CPU": (nothing, ["--precision.fp8", "tensorwise"], ("precision.fp8", "GPU")),
    "FP8 on a CPU that was found": (
        nothing,
        ["--precision.fp8", "delayed", "--runtime.device", "auto"],
        ("precision.fp8", "GPU"),
    ),
    "missing tensor": (edit_tensors(lambda t: t.pop(K_PROJ)), [], ("1 missing", K_PROJ)),
    "extra tensor": (edit_tensors(lambda t: t.update(stray=torch.ones(2))), [], ("1 unexpected", "stray")),
    "mis-shaped tensor": (edit_tensors(lambda t: t.update({K_PROJ: torch.ones(16, 64)})), [], (K_PROJ, "16")),
    "NaN": (edit_tensors(poison), [], ("model.layers.2.mlp.down_proj.weight", "NaN")),
    "truncated weights": (truncate, [], ("model.safetensors", "truncated")),
    "tokenizer larger than the embedding": (
        edit_json("config.json", vocab_size=500),
        ["--model.init", "random"],
        ("model.tokenizer", "500 rows"),
    ),
    "no data file": (nothing, ["--data.train", "no/such.jsonl"], ("data.train", "no/such.jsonl")),
    "empty data": (rows(), [], ("chats.jsonl",)),
    "malformed line": (rows(CHATS[0], '{"messages": [', CHATS[1]), [], ("chats.jsonl", ":2:")),
    "assistant first": (rows(CHATS[0], ASSISTANT_FIRST), [], ("chats.jsonl", ":2:", "assistant")),
    "nothing to learn": (rows(CHATS[0], NO_ANSWER), [], ("chats.jsonl", ":2:", "assistant")),
    "row too long": (
        rows(*CHATS[:4], LONG),
        ["--data.too_long", "error"],
        ("chats.jsonl", ":5:", "sequence_length"),
    ),
    "micro-batches that can't be interleaved": (
        nothing,
        ["--parallel.pp", "2", "--parallel.vpp", "2", "--schedule.global_batch_size", "3"],
        ("schedule.global_batch_size", "3 micro-batches", "parallel.pp 2"),
    ),
    "lengths that can't be interleaved": (
        nothing,
        ["--parallel.pp", "2", "--parallel.vpp", "2", "--data.packing", "false"],
        ("parallel.vpp", "data.packing: true"),
    ),
    "evaluation without data": (nothing, ["--schedule.eval_interval", "1"], ("schedule.eval_interval", "validation")),
    "weights of sources that are not blended": (
        nothing,
        ["--data.train", "[{path: chats.jsonl, weight: 2.0}]"],
        ("weight",),
    ),
    "recomputation that dense layers don't have": (
        nothing,
        ["--runtime.recompute", "selective", "--runtime.recompute_modules", "[moe_act]"],
        ("runtime.recompute_modules", "core_attn"),
    ),
    "warm-up longer than the run": (nothing, ["--schedule.warmup_steps", "5"], ("schedule.warmup_steps", "5")),
    "heads that an all-to-all can't share out": (
        nothing,
        ["--parallel.cp", "4", "--parallel.cp_comm_type", "a2a"],
        ("parallel.cp_comm_type", "cp 4", "2 key-value heads"),
    ),
    "SGD, sharded": (nothing, ["--optimizer.name", "sgd"], ("optimizer.name", "optimizer.distributed")),
    "output is a file": (lambda p: (p / "run").write_text("mine"), [], ("checkpoint.dir", "run")),
}


@pytest.mark.parametrize("name", CASES)
def test_one_message_and_exit_code_2(place: Path, name: str) -> None:
    change, overrides, expected = CASES[name]
    change(place)
    code, errors = train(place, *overrides)
    assert code == 2, errors
    assert errors.startswith("mcore-swift: error: "), errors
    assert "Traceback" not in errors
    for part in expected:
        assert part in errors
    run = place / "run"
    assert not run.is_dir() or not [path for path in run.rglob("*") if path.is_file()], "something was left behind"


def test_world_size_of_torchrun_is_checked(place: Path) -> None:
    ranks = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    code, errors = train(place, "--parallel.pp", "2", **ranks)
    assert code == 2
    assert "3 ranks" in errors and "pp 2" in errors


def test_more_ranks_than_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from mcore_swift.errors import InputError
    from mcore_swift.platform import cuda
    from mcore_swift.recipe import DataSection, ModelSection, ParallelSection, Recipe
    from mcore_swift.training.run import plan_ranks

    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    recipe = Recipe(model=ModelSection(path="m"), data=DataSection(train=[]), parallel=ParallelSection(tp=2, dp=8))
    eight = replace(cuda.PLATFORM, device_count=lambda: 8)
    with pytest.raises(InputError, match="needs 16 ranks, but 8 GPUs are visible"):
        plan_ranks(recipe, eight)
    assert plan_ranks(replace(recipe, parallel=ParallelSection(tp=2)), eight).dp == 4


@pytest.mark.slow
def test_long_rows_are_cut_and_counted(place: Path) -> None:
    rows(*CHATS, LONG)(place)
    code, errors = train(place)
    assert code == 0, errors
    assert "| truncated | 1 |" in (place / "run" / "summary.md").read_text()


@pytest.mark.slow
def test_a_run_is_not_overwritten_by_another(place: Path) -> None:
    assert train(place)[0] == 0
    weights = (place / "run" / "hf" / "model.safetensors").read_bytes()
    code, errors = train(place, "--checkpoint.resume", "never")
    assert code == 2
    assert "checkpoint.dir" in errors and "overwrite" in errors
    assert (place / "run" / "hf" / "model.safetensors").read_bytes() == weights
    edit_json("config.json", rms_norm_eps=1e-4)(place)
    code, errors = train(place, "--schedule.steps", "4")
    assert code == 2
    assert "another model" in errors and "rms_norm_eps" in errors


def test_disk_full_while_exporting(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint that was complete stays; no folder looks like an exported model."""

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    code, errors = train(place)
    assert code == 2
    assert "No space left on device" in errors and str(place / "run" / "hf") in errors
    assert not (place / "run" / "hf").exists()
    assert not list((place / "run").glob(".hf*"))
    assert (place / "run" / "checkpoints" / "step-00000002" / "mcore_swift.json").is_file()


@pytest.mark.slow
def test_generate(place: Path) -> None:
    """A run's checkpoint and its exported folder answer alike; what the model can't hold is refused."""
    assert train(place)[0] == 0
    ask = ["--prompt", "What is 3 and 3?", "--max-new-tokens", "8", "--device", "cpu"]
    answers = [
        run_ranks(command, 1, ["generate", str(place / "run" / folder), *ask], {})[0]
        for folder in ("hf", "checkpoints/step-00000002")
    ]
    assert [code for code, _, _ in answers] == [0, 0], answers
    assert answers[0][1] == answers[1][1] != "\n"
    code, _, errors = run_ranks(command, 1, ["generate", str(place / "model"), *ask, "--max-new-tokens", "128"], {})[0]
    assert code == 2
    assert "--max-new-tokens" in errors and "exceed the model's 128" in errors


@pytest.mark.slow
def test_rows_of_several_adapters(place: Path) -> None:
    """A run that is right, then one with another adapter, and one with a row of none."""
    rows = [row | {"kind": ("math", "code")[number % 2]} for number, row in enumerate(CHATS)]
    data = place / "chats.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--data.adapter_field", "kind", "--adapter.name", "lora", "--parallel.pp", "2"]
    words += ["--adapter.several.math.rank", "4", "--adapter.several.code.targets", "[mlp]"]
    assert train(place, *words) == (0, "")
    adapters = place / "run" / "adapter"
    configs = {f.name: json.loads((f / "adapter_config.json").read_text()) for f in adapters.iterdir()}
    assert {name: config["r"] for name, config in configs.items()} == {"math": 4, "code": 16}
    assert configs["code"]["target_modules"] == ["down_proj", "gate_proj", "up_proj"]
    assert not (place / "run" / "hf").exists()
    code, said = train(place, *words, "--adapter.several.math.rank", "8", "--schedule.steps", "3")
    assert code == 2 and "step-00000002: adapter.several is" in said and "a run goes on with the adapters" in said
    rows[6]["kind"] = "maths"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, said = train(place, *words, "--checkpoint.dir", str(place / "other"))
    assert code == 2 and f"{data}:7: kind is 'maths', which is none of adapter.several. Did you mean 'math'?" in said
