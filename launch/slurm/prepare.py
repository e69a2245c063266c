"""The run folder before its first attempt: recipe, code, environment, job.json, and the settings for Slurm."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from launch.agent.job import Job, RunFolder, read_json, write_json
from mcore_swift.errors import InputError
from mcore_swift.recipe import Recipe

SETTINGS = "slurm.json"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """slurm.json: what `launch.slurm.job` needs on the batch host, where it imports neither recipes nor torch."""

    nodes: int
    spares: int
    gpus_per_node: int
    order: list[int]  # of each node rank, the index along the leaf switches
    requeue: bool
    max_requeues: int = 50
    on_cpu: bool = False
    srun: list[str] = field(default_factory=list)  # options of the site's container
    python: list[str] = field(default_factory=list)  # words that start a Python on a node
    preflight: str | None = ""  # limits that differ; None: no preflight


def read_settings(run: Path) -> Settings:
    """Raises InputError when slurm.json is missing or not as `prepare` wrote it."""
    values = read_json(run / SETTINGS)
    try:
        return Settings(**(values or {}))
    except TypeError:
        raise InputError(f"{run / SETTINGS}: missing or damaged; `mcore-swift launch slurm` writes it") from None


def prepare(run: Path, recipe_text: str, settings: Settings, *, job: Job, command: str) -> None:
    """Writes one run's folder; a job may start it as soon as slurm.json is there."""
    run.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(run)
    (run / "recipe.yaml").write_text(f"# {command}\n{recipe_text}", encoding="utf-8")
    folder.write_job(job)
    write_json(run / SETTINGS, asdict(settings))  # last


def check_new(run: Path) -> None:
    if run.exists() and any(run.iterdir()):
        raise InputError(f"--run: {run} already holds something; name another folder, or remove it")


def absolute(recipe: Recipe, run: Path) -> Recipe:
    """The recipe with every path written out, because the job runs in another folder; its results go to `run`."""
    from mcore_swift.recipe_io import with_paths  # not on the batch host, which imports nothing heavy

    def path(text: str) -> str:
        return str(Path(text).absolute())

    found = with_paths(recipe, read=path, written=path)
    return replace(found, checkpoint=replace(found.checkpoint, dir=str(run)))


def sweep(words: Sequence[str]) -> list[list[str]]:
    """`KEY=[A, B, …]` words, all of one length, as the overrides of each task."""
    import yaml

    columns: list[list[str]] = []
    for word in words:
        key, _, text = word.partition("=")
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError:
            values = None
        if "." not in key or not isinstance(values, list) or not values:
            raise InputError(f"--sweep: found {word!r}; expected SECTION.KEY=[VALUE, VALUE, …]")
        columns.append([f"--{key}={json.dumps(value)}" for value in values])
    lengths = {len(column) for column in columns}
    if len(lengths) > 1:
        raise InputError(f"--sweep: the lists have {sorted(lengths)} values; they are taken together, task by task")
    return [list(row) for row in zip(*columns, strict=True)]
