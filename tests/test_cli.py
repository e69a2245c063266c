"""The command line: exit codes, messages, what each verb passes on, and how fast it answers."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from mcore_swift.cli import main
from mcore_swift.errors import InputError, StopRequested
from mcore_swift.recipe_io import load_recipe

RECIPE = "model: {path: model}\ndata: {train: [rows.jsonl]}\nschedule: {steps: 4}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts `function` in the place of module.name, without importing the module."""

    def put(module: str, name: str, function: Callable[..., object]) -> None:
        replacement = ModuleType(module)
        setattr(replacement, name, function)
        monkeypatch.setitem(sys.modules, module, replacement)

    return put


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The message of a command that must end with exit code 2."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("mcore-swift: error: ")
    return captured.err.removeprefix("mcore-swift: error: ")


def test_train_runs_the_resolved_recipe(recipe: Path, stand_in: Callable[..., None]) -> None:
    seen = []
    stand_in("mcore_swift.training.run", "run", lambda resolved: seen.append(resolved) or 0)
    assert main(["train", "--schedule.steps", "7", str(recipe), "--parallel.pp=2"]) == 0
    assert seen == [load_recipe(recipe, ["--schedule.steps=7", "--parallel.pp", "2"])]
    assert (seen[0].schedule.steps, seen[0].parallel.pp) == (7, 2)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            InputError("data.train: rows.jsonl:3: not JSON"),
            2,
            "mcore-swift: error: data.train: rows.jsonl:3: not JSON\n",
        ),
        (StopRequested("saved at step 3"), 75, "mcore-swift: stopped: saved at step 3\n"),
        (KeyboardInterrupt(), 130, "mcore-swift: interrupted\n"),
    ],
)
def test_exit_codes(
    recipe: Path,
    stand_in: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    message: str,
) -> None:
    def run(_: object) -> int:
        raise error

    stand_in("mcore_swift.training.run", "run", run)
    assert main(["train", str(recipe)]) == code
    assert capsys.readouterr().err == message


def test_other_failures_keep_their_traceback(recipe: Path, stand_in: Callable[..., None]) -> None:
    stand_in("mcore_swift.training.run", "run", lambda _: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main(["train", str(recipe)])


def test_print_recipe(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "--parallel.tp", "4", "--print-recipe"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load_recipe(tmp_path / "printed.yaml") == load_recipe(recipe, ["--parallel.tp", "4"])


def test_help_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help-recipe"]) == 0
    assert "  global_batch_size: 8  # samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--schedule.stpes", "4"], "command line: schedule.stpes: unknown key. Did you mean 'steps'?"),
        (["--schedule.steps", "many"], "command line: schedule.steps: found the text 'many'; allowed: a whole number"),
        (["--parallel.tp"], "command line: --parallel.tp needs a value"),
        (["--schedule.micro_batch_size", "3"], "schedule.global_batch_size: 8 is not a multiple of"),
        (["--model.path", "gone"], "model.path: no such file or folder: gone in the current directory"),
        (["--data.train", "gone.jsonl"], "data.train: no such file or folder: gone.jsonl"),
        (["--precision.fp8", "delayed", "--runtime.device", "cpu"], "precision.fp8: delayed needs a GPU"),
        (["--steps", "4"], "unrecognized arguments: --steps 4 (see mcore-swift --help)"),
        (["other.yaml"], "unrecognized arguments: other.yaml"),
        (["--print"], "unrecognized arguments: --print "),
    ],
)
def test_wrong_training(recipe: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert message in failure(capsys, "train", str(recipe), *words)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: VERB (see mcore-swift --help)"),
        (["trian"], "argument VERB: invalid choice: 'trian' (choose from 'train', "),
        (["train"], "train needs a RECIPE, a YAML file"),
        (["train", "gone.yaml"], "gone.yaml: the recipe can't be read: No such file or directory"),
        (["generate", "m"], "the following arguments are required: --prompt (see mcore-swift generate --help)"),
        (
            ["generate", "m", "--prompt", "x", "--top-p", "0"],
            "--top-p: found '0'; it must be a number greater than 0, at",
        ),
        (
            ["generate", "m", "--prompt", "x", "--temperature", "nan"],
            "--temperature: found 'nan'; it must be a number, at",
        ),
        (["generate", "m", "--prompt", "x", "--tp", "two"], "--tp: found 'two'; it must be a whole number, at least 1"),
        (["generate", "m", "--prompt", "x", "--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["data"], "the following arguments are required: VERB (see mcore-swift data --help)"),
        (["data", "validate", "x", "--format", "csv"], "argument --format: invalid choice: 'csv'"),
        (["data", "prepare", "x", "--tokenizer", "t"], "are required: --output (see mcore-swift data prepare --help)"),
        (["data", "prepare", "x", "--workers", "0"], "--workers: found '0'; it must be a whole number, at least 1"),
    ],
)
def test_wrong_command_lines(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert message in failure(capsys, *argv)


def test_generate_passes_its_options_on(stand_in: Callable[..., None]) -> None:
    seen = {}
    stand_in("mcore_swift.training.generate", "generate", lambda **options: seen.update(options) or 0)
    assert main(["generate", "model", "--prompt", "--raw.text 2 + 2?", "--top-p", "0.5", "--raw", "--tp", "3"]) == 0
    assert seen == {
        "model": Path("model"),
        "prompt": "--raw.text 2 + 2?",
        "adapter": None,
        "max_new_tokens": 128,
        "temperature": 0.0,
        "top_p": 0.5,
        "seed": 1234,
        "raw": True,
        "tp": 3,
        "pp": 1,
        "device": "auto",
    }


def test_data_validate_tells_each_problem_and_their_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text('{"text": "one"}\n')
    bad.write_text('{"text": "one"}\n{"text": \n{"text": ""}\n')
    assert main(["data", "validate", str(good), "--format", "text"]) == 0
    assert capsys.readouterr().out == "1 files checked: good\n"
    assert main(["data", "validate", str(good), str(bad)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines[:2]] == [f"{bad}:2", f"{bad}:3"]
    assert lines[2:] == ["2 files checked: 2 problems in 1 of them"]
    assert "--sequence-length counts tokens: it needs" in failure(
        capsys, "data", "validate", str(good), "--sequence-length", "5"
    )
    assert "gone: no such data file or folder" in failure(capsys, "data", "validate", str(tmp_path / "gone"))


def test_data_prepare_passes_its_options_on(
    recipe: Path, stand_in: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def prepare(*where: object, **how: object) -> dict[str, float]:
        seen.append((where, how))
        return {"documents": 2, "tokens": 1234567, "seconds": 0.25}

    stand_in("mcore_swift.data.prepare", "prepare", prepare)
    stand_in("mcore_swift.data.tokenizer", "load_tokenizer", lambda folder: f"tokenizer of {folder}")
    rows = recipe.parent / "rows.jsonl"
    assert main(["data", "prepare", str(rows), "--output", "out/c", "--tokenizer", "t", "--no-eod"]) == 0
    assert seen == [(([rows], Path("out/c")), {"tokenizer": "tokenizer of t", "append_eod": False, "workers": 1})]
    assert capsys.readouterr().out == "out/c.bin and out/c.idx: 2 documents, 1,234,567 tokens in 0.2 seconds\n"


def test_help_answers_in_half_a_second_without_importing_what_it_does_not_need() -> None:
    heavy = ["torch", "megatron", "transformers", "datasets", "numpy", "pydantic", "yaml", "mcore_swift.recipe"]
    code = f"import sys, mcore_swift.cli as c; c.build_parser(); print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.run([sys.executable, "-m", "mcore_swift.cli", "--help"], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode == 0 and "train a model as a recipe says" in process.stdout
    # Processor time, which is the wall time of a quiet machine: other tests run beside this one.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_a_real_process_ends_with_one_message_and_code_2(recipe: Path) -> None:
    command = [sys.executable, "-m", "mcore_swift.cli", "train", str(recipe), "--parallel.vpp", "2"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == (
        "mcore-swift: error: parallel.vpp: 2 model chunks a pipeline rank need parallel.pp > 1, found pp 1; "
        "raise pp or leave vpp out\n"
    )
