"""A run that is killed and started again gives the same numbers as one that was left alone, through the real command.

Every run but the first is the command line's `main` in a fork of this process, whose libraries are imported already.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mcore_swift.training.metrics import read_metrics
from tests.distributed.harness import prepared
from tests.distributed.tiny_models import tiny_folder

pytestmark = pytest.mark.slow
STEPS, INTERVAL = 20, 5

RECIPE = """
model: {{path: {model}, tokenizer: {tokenizer}}}
data: {{train: [{data}], sequence_length: 48, cache_dir: {cache}}}
optimizer: {{clip_grad: 0.5}}
schedule: {{steps: 20, global_batch_size: 4, learning_rate: 0.003, warmup_steps: 3}}
checkpoint: {{interval: 5, keep: 0, export: false}}
logging: {{tensorboard: false}}
runtime: {{device: cpu, threads: 1}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_recipe(tmp_path_factory.mktemp("resume"))


def make_recipe(folder: Path) -> Path:
    """A recipe with a tiny model, a tokenizer of one token a word, and texts for two and a half epochs."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    prepared()
    model = tiny_folder(folder / "model", "qwen2-tied")
    words = {f"w{number}": number for number in range(90)} | {"<end>": 90}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder / "tokenizer")
    draw = random.Random(5)
    texts = [" ".join(f"w{draw.randrange(90)}" for _ in range(draw.randrange(20, 46))) for _ in range(36)]
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    path = folder / "recipe.yaml"
    places = {"tokenizer": folder / "tokenizer", "data": folder / "data.jsonl", "cache": folder / "cache"}
    path.write_text(RECIPE.format(model=model, **places))
    return path


def arguments(recipe: Path, run: Path, *more: str) -> list[str]:
    return ["train", str(recipe), "--checkpoint.dir", str(run), *(more or ("--parallel.tp", "2"))]


@pytest.fixture(scope="module")
def left_alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("left_alone")
    command = [sys.executable, "-m", "mcore_swift.cli", *arguments(recipe, run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return run


def train(words: list[str], *, before: Callable[[], None] = lambda: None) -> int:
    """Runs the command in a fork; its exit code, or minus the signal that ended it."""
    prepared()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            before()
            from mcore_swift.cli import main

            code = main(words) or 0
        except SystemExit as error:
            code = int(error.code or 0)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_everything() -> None:
    """A power cut: the launcher dies, and with it the ranks, whose parent it is."""
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_step(step: int) -> Callable[[], None]:
    """A power cut at the beginning of a step."""

    def patch() -> None:
        from mcore_swift.training import trainer

        train_step = trainer.train_step
        calls = []

        def dying(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == step and os.environ["RANK"] == "1":
                kill_everything()
            return train_step(*args, **kwargs)

        trainer.train_step = dying  # type: ignore[assignment]

    return patch


def kill_in_save(number: int) -> Callable[[], None]:
    """Rank 1 is killed when it has written its part of the save with this number; the launcher ends the others."""

    def patch() -> None:
        from mcore_swift.weights.dist_checkpoint import PendingWrite

        write = PendingWrite.write
        calls = []

        def dying(self: PendingWrite) -> None:
            calls.append(1)
            write(self)
            if len(calls) == number and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)

        PendingWrite.write = dying  # type: ignore[method-assign]

    return patch


def numbers(run: Path) -> list[tuple[Any, ...]]:
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in read_metrics(run / "metrics.jsonl")]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("kill", "code", "last"),
    [
        pytest.param(kill_at_step(13), -signal.SIGKILL, 10, id="in mid-run"),
        pytest.param(kill_in_save(2), 1, 5, id="during a save"),
        pytest.param(kill_in_save(1), 1, 0, id="during the first save", marks=pytest.mark.nightly),
    ],
)
def test_killed_and_resumed(
    recipe: Path, left_alone: Path, tmp_path: Path, kill: Callable[[], None], code: int, last: int
) -> None:
    assert train(arguments(recipe, tmp_path), before=kill) == code
    complete = [name for name in checkpoints(tmp_path) if not name.startswith(".")]
    assert complete == [f"step-{step:08d}" for step in range(INTERVAL, last + 1, INTERVAL)]
    assert train(arguments(recipe, tmp_path)) == 0
    assert [row[0] for row in numbers(tmp_path)] == list(range(1, STEPS + 1))
    assert numbers(tmp_path) == numbers(left_alone)  # doubles, bit for bit
    assert checkpoints(tmp_path) == checkpoints(left_alone)


@pytest.mark.nightly
@pytest.mark.parametrize("size", ["pp", "cp"])
def test_resumed_at_another_layout(recipe: Path, left_alone: Path, tmp_path: Path, size: str) -> None:
    for name in ("checkpoints/step-00000010", "metrics.jsonl"):
        target = tmp_path / name
        target.parent.mkdir(exist_ok=True)
        (shutil.copytree if (left_alone / name).is_dir() else shutil.copyfile)(left_alone / name, target)
    assert train(arguments(recipe, tmp_path, f"--parallel.{size}", "2")) == 0
    ours, theirs = numbers(tmp_path), numbers(left_alone)
    assert ours[:10] == theirs[:10] and [row[0] for row in ours] == [row[0] for row in theirs]
    assert ours[10:] != theirs[10:]  # it was computed again, in another order
    np.testing.assert_allclose(ours[10:], theirs[10:], rtol=1e-5)


GALORE = "--optimizer.name galore --optimizer.distributed false"
# Ways of training that keep something beside the model and Adam's moments; what they end with.
METHODS = {
    "freezing": ("--model.freeze [model.embed_tokens,model.layers.0.*]", "hf"),
    "lisa": ("--optimizer.lisa_layers 2 --optimizer.lisa_interval 2", "hf"),
    "galore": (f"{GALORE} --optimizer.galore_rank 8 --optimizer.galore_interval 3", "hf"),
    "bottleneck": ("--adapter.name bottleneck --adapter.rank 8", "adapter"),
    "reft": ("--adapter.name reft --adapter.rank 4", "adapter"),
}


@pytest.mark.parametrize("method", [pytest.param(method, marks=pytest.mark.nightly) for method in METHODS])
def test_other_methods_killed_and_resumed(recipe: Path, tmp_path: Path, method: str) -> None:
    words, end = METHODS[method]
    options = [*f"--parallel.tp 2 --schedule.steps 8 --checkpoint.export true {words}".split()]
    assert train(arguments(recipe, tmp_path / "alone", *options)) == 0
    assert train(arguments(recipe, tmp_path / "run", *options), before=kill_at_step(7)) == -signal.SIGKILL
    assert train(arguments(recipe, tmp_path / "run", *options)) == 0
    assert numbers(tmp_path / "run") == numbers(tmp_path / "alone")  # doubles, bit for bit
    assert len(numbers(tmp_path / "run")) == 8
    assert [name for name in ("hf", "adapter") if (tmp_path / "run" / name).exists()] == [end]
