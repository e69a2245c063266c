"""Imports point one way. Read from the sources, lazy and type-checking imports included; nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What each top-level package may import of the project.
PACKAGES = {
    "mcore_swift": {"mcore_swift"},
    "ckpt_tools": {"ckpt_tools", "mcore_swift"},
    "perf": {"perf", "mcore_swift"},
    "launch": {"launch", "ckpt_tools", "perf", "mcore_swift"},
}

# Inside mcore_swift, lowest first: a module imports from its own layer and from those below. A new name belongs here.
LAYERS = [
    {"errors"},
    {"flops", "parallel", "pipeline", "platform", "rank_env", "ranks", "recipe", "recipe_checks", "recipe_io", "stop"},
    {"data", "models", "objectives", "peft", "weights"},
    {"training"},
    {"cli", "__init__"},  # __init__ offers the adapters by name, when they are asked for
]

# Modules of others that only these files may import: (module, files), no files: never.
CONFINED = [
    ("megatron.training", ()),
    ("apex", ()),
    ("megatron.core.parallel_state", ("mcore_swift/parallel.py", "perf/plain_mcore.py")),  # plain: the yardstick
]

FILES = [path.relative_to(ROOT) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imports(source: str) -> Iterator[str]:
    """Every imported module; `from a import b` gives a.b, since b may be a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports in full, not relative"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(module: str) -> int:
    name = module.split(".")[1]
    found = [index for index, names in enumerate(LAYERS) if name in names]
    assert found, f"mcore_swift.{name} is in no layer: add it to LAYERS"
    return found[0]


def points_up(file: Path, module: str) -> bool:
    """Whether `file` may not import `module` because of where the two lie in the project."""
    here, package = file.with_suffix("").parts, module.split(".")[0]
    if package not in PACKAGES or here == ("mcore_swift", "cli"):  # cli may reach everything, inside its verbs
        return False
    if package not in PACKAGES[here[0]]:
        return True
    return here[0] == package == "mcore_swift" and layer(module) > layer(".".join(here))


def is_confined(file: Path, module: str) -> bool:
    """Whether `module` belongs to other files than `file`, or to none."""
    return any(f"{module}.".startswith(f"{name}.") and file.as_posix() not in files for name, files in CONFINED)


def wrong_arrows(file: Path, source: str) -> list[str]:
    return [module for module in imports(source) if points_up(file, module) or is_confined(file, module)]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_no_import_points_the_wrong_way(file: Path) -> None:
    assert wrong_arrows(file, (ROOT / file).read_text()) == []


@pytest.mark.parametrize(
    ("file", "source", "wrong"),
    [
        ("mcore_swift/models/llama.py", "from mcore_swift.training import step", ["mcore_swift.training.step"]),
        ("mcore_swift/parallel.py", "def f():\n  import mcore_swift.data.batch", ["mcore_swift.data.batch"]),
        ("mcore_swift/training/run.py", "from mcore_swift import parallel, cli", ["mcore_swift.cli"]),
        ("mcore_swift/training/run.py", "import launch.slurm", ["launch.slurm"]),
        ("mcore_swift/cli.py", "from launch.slurm import submit", []),
        ("ckpt_tools/gguf.py", "import perf.flops, mcore_swift.data.batch", ["perf.flops"]),
        ("perf/bench.py", "from megatron.training import get_args", ["megatron.training.get_args"]),
        (
            "mcore_swift/data/batch.py",
            "from megatron.core import mpu, parallel_state",
            ["megatron.core.parallel_state"],
        ),
        ("mcore_swift/parallel.py", "from megatron.core import parallel_state", []),
        ("launch/run.py", "import perf, ckpt_tools.gguf, torch, apex", ["apex"]),
    ],
)
def test_a_wrong_arrow_is_seen(file: str, source: str, wrong: list[str]) -> None:
    assert wrong_arrows(Path(file), source) == wrong
