"""`mcore-swift launch local RECIPE`: the ranks of this machine under an agent and a supervisor of their own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.agent.attempt import Command, start_command
from launch.agent.job import Job, RunFolder, job_of
from launch.supervise import supervise
from mcore_swift.errors import InputError
from mcore_swift.recipe import Recipe
from mcore_swift.recipe_checks import check_recipe
from mcore_swift.recipe_io import check_files, dump_recipe, load_recipe

AGENT = ["-m", "launch.agent", "--run", "{run}", "--attempt", "{attempt}"]


def launch_local(path: Path, *, overrides: Sequence[str] = (), command: Command = start_command, **options: Any) -> int:
    """Trains the recipe, restarting it as often as is of use; returns the exit code (launch/README.md)."""
    from mcore_swift.platform import select
    from mcore_swift.training.run import plan_ranks

    recipe = checked_recipe(path, overrides)
    ranks = plan_ranks(recipe, select(recipe.runtime.device)).world_size
    folder = prepare(recipe, job_of(nodes=1, ranks_per_node=ranks, **options))
    words = [sys.executable, *AGENT, "--node", "local"]
    return supervise(folder.path, hosts=["local"], address="127.0.0.1", words=words, command=command)


def checked_recipe(path: Path, overrides: Sequence[str]) -> Recipe:
    """The recipe of a run that is to survive. Raises InputError, with its reason, for one that can't."""
    recipe = load_recipe(path, overrides)
    check_recipe(recipe)
    check_files(recipe)
    if recipe.checkpoint.dir is None:
        raise InputError("checkpoint.dir: a launched run needs a folder; set it")
    if recipe.checkpoint.resume == "never":
        raise InputError("checkpoint.resume: never can't be launched: an attempt goes on from the one before; use auto")
    return recipe


def prepare(recipe: Recipe, job: Job) -> RunFolder:
    """Writes recipe.yaml and job.json. Raises InputError when the run's folder can't be written."""
    folder = RunFolder(Path(recipe.checkpoint.dir or ""))
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        (folder.path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        folder.write_job(job)
    except OSError as error:
        raise InputError(f"checkpoint.dir: {folder.path} can't be written: {error.strerror}") from None
    return folder
