"""Against a real Slurm: what it accepts, what preflight finds on its nodes, and that nothing is left behind."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, ClusterError
from tests.slurm.conftest import LIMITS, ROOT

pytestmark = pytest.mark.slow
COMMAND = [sys.executable, "-m", "mcore_swift.cli", "launch", "slurm"]
CODE = {"PYTHONPATH": str(ROOT)}
JOBS = sorted(path.name for path in (ROOT / "slurm").glob("*.sh") if path.name != "with_site.sh")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(nodes=3, paper=1024) as cluster:
        yield cluster


def test_only_the_clusters_own_addresses_are_bound(cluster: Cluster) -> None:
    before = subprocess.run(["ss", "-ltnH"], capture_output=True, text=True, check=True).stdout
    if not cluster.plain:
        assert ":6817 " in cluster.run("ss", "-ltnH") and ":6817 " not in before and ":6818 " not in before


@pytest.mark.parametrize("job", JOBS)
def test_slurm_accepts_the_shipped_jobs(cluster: Cluster, job: str) -> None:
    words = ["--test-only", "--partition=paper", f"slurm/{job}"]
    assert "to start at" in cluster.run("bash", "-c", 'sbatch "$@" 2>&1', "bash", *words, cwd=ROOT)


@pytest.mark.nightly
def test_dry_run_asks_slurm_for_a_thousand_nodes(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "site.env").write_text("SBATCH_PARTITION=paper\n")
    recipe = str(ROOT / "launch" / "recipes" / "qwen2.5_72b_1024gpus.yaml")
    words = [recipe, "--schedule.global_batch_size", "4096", "--nodes", "1024", "--time", "7-0", "--run", "never"]
    text = cluster.run(*COMMAND, *words, "--site", str(tmp_path / "site.env"), "--dry-run", seconds=300, cwd=ROOT)
    assert "= 8,192 ranks on 1,024 nodes" in text
    assert "to start at" in text and "on nodes p[0001-1024] in partition paper" in text
    assert "  node 0001: ranks 2048-2055, stage 1, replica 0\n" in text
    assert not Path("never").exists()


@pytest.mark.nightly
def test_dry_run_says_why_slurm_refuses(cluster: Cluster, place: Path) -> None:
    words = ["recipe.yaml", "--nodes", "2", "--gpus-per-node", "1", "--time", "5-0", "--run", "never"]
    with pytest.raises(ClusterError, match=r"(?s)exit code 1.*slurm .*time limit"):
        cluster.run(*COMMAND, *words, "--site", "site.env", "--dry-run", seconds=300, cwd=place, environment=CODE)


@pytest.mark.nightly
def test_preflight_names_the_node_that_is_broken(cluster: Cluster, place: Path) -> None:
    """One step over three nodes; the second has no room in /dev/shm, which only its own mounts show."""
    if cluster.plain:
        pytest.skip("plain mode: the nodes share one /dev/shm")
    cluster.run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm", node="n02")
    folder = place / "reports"
    folder.mkdir()
    limits = [f"--limit={limit}" for limit in LIMITS.split()]
    clock = ["--clock", "head:1"]  # nothing listens there
    words = ["-N3", "--ntasks-per-node=1", sys.executable, "-m", "launch.preflight", "--folder", str(folder), *clock]
    try:
        cluster.run("srun", *words, "--hosts", "n01,n02,n03", *limits, seconds=400, cwd=ROOT)
    finally:
        cluster.run("umount", "/dev/shm", node="n02")
    reports = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert sorted(reports) == ["n01", "n02", "n03"]
    for name, report in reports.items():
        problems = [text for text in report["problems"] if "clock" not in text]
        assert len(problems) == (1 if name == "n02" else 0), problems
        assert len(report["problems"]) == len(problems) + 1  # nobody answers for the clock
        assert report["speeds"]["gemm"] > 0 and report["speeds"]["all_reduce"] > 0
    assert "/dev/shm: 0.00 GiB free" in reports["n02"]["problems"][0]
    assert {name: sorted(report["pairs"]) for name, report in reports.items()} == {
        "n01": ["n02"],
        "n02": ["n01", "n03"],
        "n03": ["n02"],
    }
    assert all(pair.get("all_reduce", 0) > 0 for report in reports.values() for pair in report["pairs"].values())


def test_everything_dies_with_the_cluster() -> None:
    with Cluster(nodes=2) as cluster:
        folder = cluster.folder
        job = cluster.sbatch("--wrap", "srun -N2 sleep 1000", "-N2", "--output=/dev/null")
        cluster.wait(job, states={"RUNNING"})
        if not cluster.plain:
            cluster.until(lambda: cluster.processes_on("n02", "sleep 1000"), seconds=20, what="the step runs")
    time.sleep(0.2)
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(folder) in _text(path)]
    assert left == [] and not folder.exists()


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


@pytest.mark.nightly
def test_a_power_cut_is_real(cluster: Cluster) -> None:
    if cluster.plain:
        pytest.skip("plain mode: nodes share this machine's processes and network")
    assert cluster.run("hostname", node="n02").strip() == "n02"
    cluster.power_cut("n03")
    cluster.until(lambda: "down" in _state(cluster, "n03"), seconds=60, what="n03 is down")
    cluster.boot("n03")
    cluster.until(lambda: _state(cluster, "n03") == "idle", seconds=60, what="n03 is back")


def _state(cluster: Cluster, node: str) -> str:
    return cluster.run("sinfo", "-h", "-n", node, "-p", "gpu", "-o", "%t").strip()
