"""`mcore-swift launch slurm RECIPE`: checks a recipe against the nodes, makes the run's folder, submits its script."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch.agent.job import Job, job_of
from launch.preflight.limits import read_limits
from launch.slurm import rank_map
from launch.slurm.prepare import SETTINGS, Settings, absolute, check_new, prepare, sweep
from launch.slurm.script import Request, render
from launch.slurm.site import Site, read_site
from launch.slurm.snapshot import record_environment, snapshot_code
from mcore_swift import recipe_io
from mcore_swift.errors import EXIT_FAILED, InputError
from mcore_swift.models.build import check_layout
from mcore_swift.parallel import ParallelPlan, resolve
from mcore_swift.recipe import Recipe
from mcore_swift.recipe_checks import check_recipe
from mcore_swift.recipe_checks.nodes import GIB, NODES, Nodes
from mcore_swift.recipe_checks.table import refuse
from perf.plan import Outline, outlined


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line; None: the site's file, the allocation or a default decides."""

    recipe: Path
    overrides: Sequence[str] = ()
    nodes: int | None = None
    gpus_per_node: int | None = None
    fast_domain: int | None = None
    spares: int = 0
    time: str | None = None
    requeue: bool = True
    array: str | None = None
    sweep: Sequence[str] = ()
    dependency: str | None = None
    name: str | None = None
    run_folder: Path | None = None
    site: Path | None = None
    max_restarts: int = 10
    step_timeout: int | None = None
    bad_steps: str = "stop"
    no_preflight: bool = False
    here: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Launch:
    """A checked request: everything that is to be written, before anything is."""

    request: Request
    site: Site
    outline: Outline
    recipes: tuple[str, ...]  # of the run, or of each task of a sweep
    settings: Settings
    job: Job
    script: str

    @property
    def runs(self) -> list[Path]:
        run = self.request.run
        return [run / f"task-{task}" for task in range(len(self.recipes))] if self.request.swept else [run]


def launch(options: Options) -> int:
    """Submits the run, says what would be done (dry_run), or runs it in this allocation (here); returns the code."""
    if options.here:
        return _here(options)
    found = _checked(options, run=_run_folder(options))
    if options.dry_run:
        return _dry_run(found)
    for run in [found.request.run, *found.runs]:
        check_new(run)
    if shutil.which("sbatch") is None:
        raise InputError("launch slurm: there is no sbatch on this machine; --dry-run shows what would be submitted")
    script = write(found)
    done = _sbatch(["--parsable", str(script)])
    if done.returncode:
        print(f"mcore-swift: sbatch refused {script}: {done.stderr.strip()}", file=sys.stderr)
        return EXIT_FAILED
    job = done.stdout.strip().split(";")[0]
    print(f"job {job}: {found.request.run}\nmcore-swift launch status {found.runs[0]}")
    return 0


def write(found: Launch) -> Path:
    """Makes the run's folder, or folders; returns the batch script."""
    run, command = found.request.run, shlex.join(["mcore-swift", *sys.argv[1:]])
    code = snapshot_code(run / "code")
    record_environment(run / "environment.json", code)
    script = run / "job.sh"
    script.write_text(found.script, encoding="utf-8")
    for place, text in zip(found.runs, found.recipes, strict=True):
        prepare(place, text, found.settings, job=found.job, command=command)
    return script


# --- checks -----------------------------------------------------------------------------------------------------------


def _checked(options: Options, *, run: Path) -> Launch:
    """Raises InputError for whatever a run of this request would stumble over, as far as it can be known here."""
    site = read_site(options.site)
    gpus = options.gpus_per_node or site.number("MCORE_SWIFT_GPUS_PER_NODE", 8)
    tasks = sweep(options.sweep) or [[]]
    nodes, texts, outlines = options.nodes, [], []
    for number, words in enumerate(tasks):
        place = run / f"task-{number}" if options.sweep else run
        recipe = recipe_of(options, words, place)
        nodes = nodes or fewest_nodes(recipe, gpus)
        outlines.append(check_nodes(recipe, options, site, nodes=nodes, gpus=gpus))
        recipe_io.check_files(recipe)
        texts.append(recipe_io.dump_recipe(absolute(recipe, place)))
    outline = outlines[0]
    request = Request(
        name=options.name or options.recipe.stem,
        run=run,
        nodes=nodes or 1,
        gpus_per_node=gpus,
        on_cpu=outline.recipe.runtime.device == "cpu",
        spares=options.spares,
        time=options.time,
        requeue=options.requeue,
        array=_array(options, len(tasks)),
        swept=bool(options.sweep),
        dependency=options.dependency,
        options=site.sbatch,
    )
    venv = _venv(site)
    settings = _settings(options, site, request, outline.plan, venv)
    job = job_of(
        nodes=request.nodes,
        ranks_per_node=gpus,
        spares=request.spares,
        max_restarts=options.max_restarts,
        step_timeout=options.step_timeout,
        bad_steps=options.bad_steps,
        environment=dict(site.exported),
    )
    return Launch(request, site, outline, tuple(texts), settings, job, render(request, site, venv=venv))


def _settings(options: Options, site: Site, request: Request, plan: ParallelPlan, venv: Path) -> Settings:
    srun, python = site.wrap(f"{venv}/bin/python")
    limits = site.get("MCORE_SWIFT_PREFLIGHT")
    if limits != "off":
        read_limits(limits.split())
    return Settings(
        nodes=request.nodes,
        spares=request.spares,
        gpus_per_node=request.gpus_per_node,
        order=rank_map.node_order(plan, gpus_per_node=request.gpus_per_node),
        requeue=request.requeue,
        on_cpu=request.on_cpu,
        srun=srun,
        python=python,
        preflight=None if options.no_preflight or limits == "off" else limits,
    )


def recipe_of(options: Options, words: Sequence[str], run: Path) -> Recipe:
    """The recipe, whose results go to the run's folder."""
    recipe = recipe_io.load_recipe(options.recipe, [*options.overrides, *words])
    given = recipe.checkpoint.dir
    if given is not None and Path(given).absolute() != run:
        raise InputError(
            f"checkpoint.dir: found {given!r}, but a launched run lies in its own folder, {run}; leave it out, or give"
            " the same folder with --run"
        )
    return replace(recipe, checkpoint=replace(recipe.checkpoint, dir=str(run)))


def check_nodes(recipe: Recipe, options: Options, site: Site, *, nodes: int, gpus: int) -> Outline:
    """The plan of the recipe on these nodes."""
    outline = outlined(recipe, gpus=nodes * gpus)
    on_cpu = recipe.runtime.device == "cpu"
    memory = site.number("MCORE_SWIFT_GPU_MEMORY_GIB", 80) * GIB
    subject = Nodes(
        outline.plan,
        gpus_per_node=gpus,
        fast_domain=options.fast_domain or site.number("MCORE_SWIFT_FAST_DOMAIN", gpus),
        rank_bytes=_held(outline),
        gpu_bytes=None if on_cpu else memory,
    )
    refuse(NODES, subject)
    check_layout(outline.source, outline.plan)
    return outline


def _held(outline: Outline) -> int:
    """Most bytes that a rank holds throughout."""
    return max(stage.bytes.total for stage in outline.stages)


def fewest_nodes(recipe: Recipe, gpus: int) -> int:
    """Nodes that one copy of the model fills, or as many as parallel.dp asks for."""
    check_recipe(recipe)
    return -(-resolve(recipe.parallel, world_size=None).world_size // gpus)


def _array(options: Options, tasks: int) -> str | None:
    """The array to submit: the one asked for, or all tasks of the sweep."""
    if options.array is None or not options.sweep:
        return f"0-{tasks - 1}" if options.sweep else options.array
    numbers = [int(number) for number in re.findall(r"\d+", options.array.partition("%")[0])]
    if max(numbers, default=0) >= tasks:
        raise InputError(f"--array: found {options.array!r}, but --sweep gives values to the tasks 0 to {tasks - 1}")
    return options.array


def _venv(site: Site) -> Path:
    return Path(site.get("MCORE_SWIFT_VENV", sys.prefix)).absolute()


def _run_folder(options: Options) -> Path:
    if options.run_folder is not None:
        return options.run_folder.absolute()
    runs = Path(read_site(options.site).get("MCORE_SWIFT_RUNS", "runs"))
    return (runs / f"{options.name or options.recipe.stem}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()


# --- the three ways to go on ------------------------------------------------------------------------------------------


def _dry_run(found: Launch) -> int:
    """Prints all that would be written and run, and what Slurm says of it; writes nothing."""
    request, plan = found.request, found.outline.plan
    print(f"run       {request.run}" + (f" (task-0 to task-{len(found.recipes) - 1})" if request.swept else ""))
    print(f"layout    {plan} = {plan.world_size:,} ranks on {request.nodes:,} nodes, {request.spares} spare")
    print(f"memory    {_held(found.outline) / GIB:.1f} GiB held by a rank at most, activations come on top")
    print(f"files     {' '.join(['code/', 'environment.json', 'job.sh', 'recipe.yaml', 'job.json', SETTINGS])}")
    from launch.slurm.job import agent_words, preflight_words

    if found.settings.preflight is not None:
        print(f"preflight {shlex.join(preflight_words(found.settings, request.run, ['HOSTS'], 'BATCH_HOST:PORT'))}")
    print(f"attempts  {shlex.join(agent_words(found.settings))}")
    print("ranks     (nodes along the leaf switches)")
    print(_rank_table(plan, request))
    print(f"--- job.sh\n{found.script}--- recipe.yaml\n{found.recipes[0]}---")
    if shutil.which("sbatch") is None:
        print("slurm     not asked: there is no sbatch on this machine")
        return 0
    done = _sbatch(["--test-only"], script=found.script)
    print(f"slurm     {done.stderr.strip() or 'accepts it'}")
    return 0 if done.returncode == 0 else EXIT_FAILED


def _rank_table(plan: ParallelPlan, request: Request) -> str:
    width = len(str(request.nodes - 1))
    hosts = [f"node {number:0{width}d}" for number in range(request.nodes)]
    return rank_map.table(plan, hosts, gpus_per_node=request.gpus_per_node)


def _sbatch(words: list[str], script: str | None = None) -> subprocess.CompletedProcess[str]:
    # SBATCH_… variables of the shell go before a script's own lines: the site's file has decided already.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SBATCH_")}
    return subprocess.run(["sbatch", *words], input=script, env=inherited, capture_output=True, text=True, check=False)


def _here(options: Options) -> int:
    """Inside an allocation: prepares the run once for all times that Slurm starts this job, and becomes its job."""
    environment = os.environ
    if "SLURM_JOB_ID" not in environment:
        raise InputError("--here: this is no Slurm job; submit a script of slurm/ with sbatch, or leave --here out")
    total = int(environment["SLURM_JOB_NUM_NODES"])
    nodes = options.nodes or total - options.spares
    if nodes + options.spares != total:
        raise InputError(f"--nodes {nodes} and --spares {options.spares} are not this job's {total} nodes")
    name = options.name or environment.get("SLURM_JOB_NAME", options.recipe.stem)
    job = environment.get("SLURM_ARRAY_JOB_ID", environment["SLURM_JOB_ID"])
    task = environment.get("SLURM_ARRAY_TASK_ID")
    runs = Path(read_site(options.site).get("MCORE_SWIFT_RUNS", "runs"))
    run = (options.run_folder or runs / (f"{name}-{job}" + (f"-{task}" if task and options.sweep else ""))).absolute()
    overrides = [*options.overrides, *(sweep(options.sweep)[int(task)] if task and options.sweep else [])]
    if not (run / SETTINGS).is_file():
        on_node = re.match(r"\d+", environment.get("SLURM_GPUS_ON_NODE", ""))
        gpus = options.gpus_per_node or (int(on_node[0]) if on_node else None)
        asked = replace(
            options, nodes=nodes, gpus_per_node=gpus, name=name, overrides=overrides, sweep=(), array=None, here=False
        )
        found = _checked(asked, run=run)
        own = options.run_folder is None and "SLURM_ARRAY_JOB_ID" not in environment
        if own and run.exists():  # Slurm stopped this job before its folder was complete
            shutil.rmtree(run)
        check_new(run)
        write(found)
        print(f"mcore-swift: run {run}", flush=True)
        os.environ.update(found.site.exported)
    os.environ["PYTHONPATH"] = str(run / "code")
    os.chdir(run)
    os.execv(sys.executable, [sys.executable, "-m", "launch.slurm.job", "--run", str(run)])
