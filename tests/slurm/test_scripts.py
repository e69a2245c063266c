"""The shell scripts, written ones and rendered ones: linted, short, and with what Slurm must be told."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.slurm import job
from launch.slurm.prepare import absolute
from launch.slurm.script import Request, directives, render
from launch.slurm.site import Site, read_site
from mcore_swift.cli import main
from mcore_swift.errors import InputError
from mcore_swift.recipe_io import dump_recipe, load_recipe

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(ROOT.glob("slurm/*.sh"))
JOBS = [path for path in SHIPPED if path.name != "with_site.sh"]
SCRIPTS = [*SHIPPED, *ROOT.glob("launch/*.sh"), *ROOT.glob("tests/slurm/*.sh"), ROOT / ".ci" / "run"]
SITE = Site(
    {
        "SBATCH_PARTITION": "gpu",
        "MCORE_SWIFT_INTERFACE": "ib0",
        "MCORE_SWIFT_SCRATCH": "/local scratch",
        "NCCL_IB_HCA": "mlx5_0,mlx5_1",
    }
)


def request(**changes: object) -> Request:
    values = {"name": "demo", "run": Path("/shared/my runs/demo"), "nodes": 4, "gpus_per_node": 8, "time": "24:00:00"}
    return Request(**(values | changes))  # type: ignore[arg-type]


RENDERED = {
    "plain": request(),
    "spares": request(spares=2, requeue=False, dependency="singleton"),
    "sweep": request(array="0-3%2", swept=True),
    "cpu": request(on_cpu=True, time=None),
}


def shellcheck(script: str) -> str:
    program = Path(sys.executable).with_name("shellcheck")
    command = [str(program), "--shell=bash", "--severity=style", "--enable=check-unassigned-uppercase", "-"]
    return subprocess.run(command, input=script, capture_output=True, text=True, cwd=ROOT, check=False).stdout


def early_variables(script: str) -> list[str]:
    """Slurm's variables of a task in a double-quoted command: the batch shell fills them in, the same for all tasks."""
    task = r"(?<!\\)\$\{?(SLURM_(?:PROCID|LOCALID|NODEID|TASK_PID|GTIDS|STEP_\w+|TOPOLOGY_ADDR)|SLURMD_NODENAME)"
    commands = re.findall(r"\b(?:ba)?sh\s+-\w*c\s+\"((?:[^\"\\]|\\.)*)\"", script)
    steps = re.findall(r"^[^#\n]*\bsrun\b(?:[^\n\\]|\\.|\\\n)*", script, flags=re.MULTILINE)
    return sorted({name for text in [*commands, *steps] for name in re.findall(task, _without_single_quotes(text))})


def _without_single_quotes(text: str) -> str:
    return re.sub(r"'[^']*'", "", text)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_pass_shellcheck(path: Path) -> None:
    text = path.read_text()
    assert shellcheck(text) == ""
    assert early_variables(text) == []
    assert path.stat().st_mode & 0o111, "not executable"


@pytest.mark.parametrize("name", RENDERED)
def test_rendered_scripts_pass_shellcheck(name: str) -> None:
    text = render(RENDERED[name], SITE, venv=Path("/shared/my venv"))
    assert shellcheck(text) == ""
    assert early_variables(text) == []


def test_what_the_lints_find() -> None:
    assert "SC2086" in shellcheck("#!/usr/bin/env bash\nls $1\n")
    assert early_variables('srun bash -c "echo $SLURM_PROCID"') == ["SLURM_PROCID"]
    assert early_variables('srun --nodes=2 \\\n  prog "--rank=${SLURM_NODEID}"') == ["SLURM_NODEID"]
    assert early_variables("srun bash -c 'echo $SLURM_PROCID'") == []
    assert early_variables('srun bash -c "echo \\$SLURM_PROCID"') == []
    assert early_variables('echo "$SLURM_JOB_ID" "$SLURM_PROCID"') == []  # the batch shell is a task, too


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_shipped_jobs_are_options_and_one_exec(path: Path) -> None:
    lines = [line for line in path.read_text().replace("\\\n", " ").splitlines() if not re.match(r"#(?!SBATCH)", line)]
    *options, command = lines
    assert all(line.startswith("#SBATCH --") for line in options)
    assert command.startswith("exec ") and command.endswith('"$@"')
    for recipe in re.findall(r"launch/recipes/\S+\.yaml", command):
        assert (ROOT / recipe).is_file()


def test_rendered_options() -> None:
    assert directives(request(spares=2, options={"partition": "gpu", "account": "a b"})) == [
        "--job-name=demo",
        "--nodes=6",
        "--ntasks-per-node=1",
        "--gpus-per-node=8",
        "--exclusive",
        "--mem=0",
        "--time=24:00:00",
        "--signal=B:USR1@300",
        "--no-kill",
        "--requeue",
        "--open-mode=append",
        "--output=/shared/my runs/demo/slurm-%j.log",
        "--partition=gpu",
        "--account=a b",
    ]
    assert "--gpus-per-node=8" not in directives(request(on_cpu=True))
    assert "--no-requeue" in directives(request(requeue=False))
    # The signal must not come as soon as the job starts.
    for time, signal in (("5", 30), ("0:10:00", 30), ("11", 300), ("1-0", 300), ("59:59", 300), (None, 300)):
        assert f"--signal=B:USR1@{signal}" in directives(request(time=time)), time


def test_rendered_script() -> None:
    text = render(request(array="0-3%2", swept=True), SITE, venv=Path("/shared/venv"))
    assert [line for line in text.splitlines() if not line.startswith("#")] == [
        "set -euo pipefail",
        "run='/shared/my runs/demo'/task-\"${SLURM_ARRAY_TASK_ID:?}\"",
        "export GLOO_SOCKET_IFNAME=ib0",
        "export NCCL_IB_HCA=mlx5_0,mlx5_1",
        "export NCCL_SOCKET_IFNAME=ib0",
        "export TMPDIR='/local scratch'",
        "export TRITON_CACHE_DIR='/local scratch/triton'",
        "export PYTHONPATH='/shared/my runs/demo'/code",
        'cd "$run"',
        'exec /shared/venv/bin/python -m launch.slurm.job --run "$run"',
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time": "soon"}, "--time: found 'soon'; it must be minutes, hours:minutes:seconds or days-hours"),
        ({"array": "a-b"}, "--array: found 'a-b'"),
        ({"array": "0-3"}, "the tasks of '0-3' would train one run at the same time"),
    ],
)
def test_requests_that_slurm_would_misread(changes: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        request(**changes)


def test_a_successor_is_this_job_without_the_nodes_at_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = "JobId=7 JobName=demo Account=(null) QOS=(null) TimeLimit=1-00:00:00 Partition=gpu ExcNodeList=n[03-04]\n"
    monkeypatch.setattr(job, "shown_job", lambda: shown)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    (tmp_path / "job.sh").touch()
    assert job.successor_of(tmp_path, []) == []
    words = ["sbatch", "--parsable", "--exclude=n01,n03,n04"]
    words += ["--partition=gpu", "--time=1-00:00:00", "--job-name=demo"]
    assert job.successor_of(tmp_path, ["n01"]) == [*words, f"{tmp_path}/job.sh"]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")  # of a sweep
    assert job.successor_of(tmp_path / "task-2", ["n01"]) == [*words, "--array=2", f"{tmp_path}/job.sh"]


# --- site.env ---------------------------------------------------------------------------------------------------------


def test_the_shipped_example_reads_as_the_shell_reads_it(tmp_path: Path) -> None:
    example = ROOT / "slurm" / "site.env.example"
    site = read_site(example)
    script = f"set -a; source '{example}'; env -0"
    shell = subprocess.run(["env", "-i", "bash", "-c", script], capture_output=True, text=True, check=True).stdout
    seen = dict(item.split("=", 1) for item in shell.split("\0") if "=" in item)
    assert {name: seen[name] for name in site.values} == dict(site.values)
    assert site.exported["TMPDIR"] == "/tmp" and "MCORE_SWIFT_SCRATCH" not in site.exported
    assert site.sbatch == {}
    # Each variable that is exported says why, above it.
    lines = example.read_text().splitlines()
    for number, line in enumerate(lines):
        if re.match(r"#?(NCCL|TORCH|PYTORCH)_", line):
            above = next(text for text in reversed(lines[:number]) if not re.match(r"#?[A-Z_]+=", text))
            assert above.startswith("# "), line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("NCCL_DEBUG=$HOME", "site.env:1: NCCL_DEBUG: found '$HOME'; write the value out, no shell reads it"),
        ("\nsource other", "site.env:2: found 'source other'; expected NAME=value"),
        ("SBATCH_PARTITON=gpu", "site.env:1: unknown name SBATCH_PARTITON. Did you mean 'SBATCH_PARTITION'?"),
        ("NCCL_IB_HCA=a b", "site.env:1: NCCL_IB_HCA: found 'a b'; a value with blanks needs quotes"),
        ("MCORE_SWIFT_CONTAINER=docker", "MCORE_SWIFT_CONTAINER: found 'docker'; allowed: "),
        ("MCORE_SWIFT_CONTAINER=pyxis", "MCORE_SWIFT_CONTAINER is pyxis, so MCORE_SWIFT_IMAGE must name the image"),
    ],
)
def test_site_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "site.env").write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        read_site(tmp_path / "site.env")


def test_containers() -> None:
    image = {"MCORE_SWIFT_IMAGE": "/images/torch.sif", "MCORE_SWIFT_MOUNTS": "/scratch:/scratch,/models:/models"}
    assert Site().wrap("/venv/bin/python") == ([], ["/venv/bin/python"])
    assert Site({"MCORE_SWIFT_CONTAINER": "apptainer", **image}).wrap("/venv/bin/python") == (
        [],
        [
            "apptainer",
            "exec",
            "--nv",
            "--bind=/scratch:/scratch",
            "--bind=/models:/models",
            "/images/torch.sif",
            "python",
        ],
    )
    options, python = Site({"MCORE_SWIFT_CONTAINER": "pyxis", **image}).wrap("/venv/bin/python")
    assert python == ["python"]
    assert options[0] == "--container-image=/images/torch.sif"
    assert options[-1] == "--container-mounts=/scratch:/scratch,/models:/models"


# --- the verb, without a Slurm ----------------------------------------------------------------------------------------

RECIPE = """\
model: {path: model, init: random}
data: {train: synthetic, format: synthetic, sequence_length: 32}
parallel: {tp: 2, pp: 2}
schedule: {steps: 4, global_batch_size: 4}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe of Qwen3-0.6B's shape; no sbatch to be found."""
    (tmp_path / "model").mkdir()
    shutil.copy(ROOT / "launch" / "recipes" / "models" / "qwen3-0.6b" / "config.json", tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def launch(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(["launch", "slurm", "recipe.yaml", *words])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_dry_run_prints_everything_and_writes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--nodes", "2", "--gpus-per-node", "4", "--spares", "1", "--run", "out", "--schedule.steps", "9"]
    code, text = launch(capsys, *words, "--dry-run")
    assert code == 0, text
    assert f"run       {place}/out" in text
    assert "layout    TP2+SP PP2 DP2 = 8 ranks on 2 nodes, 1 spare" in text
    assert "  node 0: ranks 0-3, stage 0, replicas 0-1\n  node 1: ranks 4-7, stage 1, replicas 0-1\n" in text
    assert "#SBATCH --nodes=3" in text and "  steps: 9" in text
    assert f"  path: {place}/model" in text and f"  dir: {place}/out" in text
    assert "-m launch.agent '--run={run}' '--attempt={attempt}'" in text
    assert "slurm     not asked: there is no sbatch on this machine" in text
    assert sorted(path.name for path in place.iterdir()) == ["model", "recipe.yaml"]


def test_a_sweep_has_a_recipe_for_each_task(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--gpus-per-node", "4", "--run", "out", "--sweep", "schedule.learning_rate=[1.0e-5, 2.0e-5]"]
    code, text = launch(capsys, *words, "--dry-run")
    assert code == 0, text
    assert "#SBATCH --array=0-1\n" in text and f"  dir: {place}/out/task-0" in text and "learning_rate: 1.0e-05" in text


def test_no_path_of_a_recipe_depends_on_where_the_job_runs(tmp_path: Path) -> None:
    """Every key that recipe_io resolves, all relative."""
    (tmp_path / "recipe.yaml").write_text(
        "model: {path: rel/model, tokenizer: rel/tokenizer}\n"
        "data: {train: [rel/a], validation: [{path: rel/b}], chat_template: rel/c, cache_dir: rel/d}\n"
        "adapter: {path: rel/e, several: {x: {path: rel/f}}}\n"
        "objective: {reference_path: rel/g, teacher: rel/i}\n"
        "checkpoint: {dir: rel/h}\n"
    )
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert dump_recipe(recipe).count(": rel/") == 11
    text = dump_recipe(absolute(recipe, tmp_path / "run"))
    assert text.count(f": {Path.cwd()}/rel/") == 10 and f"dir: {tmp_path}/run" in text and ": rel/" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus-per-node", "1"], "parallel.tp: groups of tp 2 don't lie within nodes of 1 GPUs"),
        (["--nodes", "1", "--gpus-per-node", "6"], "do not divide the job's 6 ranks"),
        (["--schedule.global_batch_size", "3", "--nodes", "2"], "schedule.global_batch_size: 3 is not a multiple"),
        (["--checkpoint.dir", "elsewhere"], "checkpoint.dir: found 'elsewhere', but a launched run lies in its own"),
        (["--sweep", "schedule.steps=4"], "--sweep: found 'schedule.steps=4'; expected SECTION.KEY=[VALUE, VALUE, …]"),
        (["--sweep", "schedule.steps=[4,5]", "--array", "0-2"], "--sweep gives values to the tasks 0 to 1"),
        (["--time", "tomorrow"], "--time: found 'tomorrow'"),
        (["--model.path", "gone"], "gone"),
        (["--here"], "--here: this is no Slurm job"),
        ([], "there is no sbatch on this machine; --dry-run shows what would be submitted"),
    ],
)
def test_requests_that_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    code, text = launch(capsys, *(["--gpus-per-node", "4"] if "--gpus-per-node" not in words else []), *words)
    assert code == 2 and message in text
    assert sorted(path.name for path in place.iterdir()) == ["model", "recipe.yaml"]


def test_memory_and_fast_links(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "site.env").write_text("MCORE_SWIFT_GPU_MEMORY_GIB=2\n")
    code, text = launch(capsys, "--gpus-per-node", "4", "--site", "site.env", "--dry-run")
    assert code == 2 and "parallel: a rank holds 3.2" in text and "a GPU 2.0 GiB; raise tp or pp" in text
    recipe = str(ROOT / "launch" / "recipes" / "qwen3_235b_a22b_1024gpus.yaml")
    assert main(["launch", "slurm", recipe, "--nodes", "128", "--dry-run"]) == 2
    assert "fast links join 8 GPUs; lower ep, or say with --fast-domain that 32" in capsys.readouterr().err
    assert main(["launch", "slurm", recipe, "--nodes", "128", "--fast-domain", "32", "--dry-run"]) == 0
