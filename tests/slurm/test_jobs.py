"""Real training on a real Slurm, disturbed in every way that can be thought of: it ends with the numbers of a run that
was left alone, to the last bit, or it stops and says why.

Nodes are namespaces: a power cut kills all that runs there, a partition takes the network alone. Agents and ranks are
forks of this process (forks.py), except in the last tests, where all is started as in life.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from mcore_swift.training.checkpoint_folder import read_manifest
from tests.launch.forked import Disturbance, at_step, crash
from tests.slurm.cluster import ENDED, NETWORK, Cluster, ClusterError, namespaces_allowed
from tests.slurm.conftest import ROOT, make_place
from tests.slurm.forks import Forks
from tests.slurm.jobs import Submitted, noting_starts, submit, undisturbed
from tests.training.test_resume import checkpoints, numbers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not namespaces_allowed(), reason="plain mode: nodes can't be told apart, and can't die"),
]
STEPS, INTERVAL, FAULT_AT = 24, 4, 14  # the fault comes at the beginning of this step, or soon after
WORDS = ["--schedule.steps", str(STEPS), "--checkpoint.interval", str(INTERVAL)]
PACE = 0.15  # seconds that a step takes at least: time for a fault
Deed = Callable[[Submitted], object]


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """The numbers of every step."""
    return undisturbed(make_place(tmp_path_factory.mktemp("left_alone")), *WORDS)


def on(attempt: int, rank: int, step: int, deed: Callable[[], object]) -> Disturbance:
    """One rank of one attempt does something at the beginning of a step."""

    def disturb(this: int, me: int) -> None:
        if (this, me) == (attempt, rank):
            at_step(step, deed)

    return disturb


def assert_as_left_alone(job: Submitted, left_alone: list[tuple[Any, ...]]) -> None:
    """Every number, every checkpoint (and perhaps one of the step that the run was stopped at), nobody on any node."""
    assert numbers(job.run) == left_alone, job.told()
    assert {f"step-{step:08d}" for step in range(INTERVAL, STEPS + 1, INTERVAL)} <= set(checkpoints(job.run))
    for path in (job.run / "checkpoints").glob("step-*"):
        read_manifest(path)  # raises where a file is not whole
    assert_nobody_left(job)


def assert_nobody_left(job: Submitted) -> None:
    for node in job.cluster.names:
        job.until(lambda node=node: not job.ranks_on(node), f"no rank is left on {node}", seconds=15)


def without_shared_memory(cluster: Cluster, node: str) -> None:
    cluster.run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm", node=node)


def fail() -> None:
    raise RuntimeError("planted")


def test_one_fault_after_another(place: Path, left_alone: list[tuple[Any, ...]]) -> None:
    """Preflight leaves a broken node out, a rank fails, the node of a rank loses its power; two spares are enough."""
    with Cluster(nodes=4) as cluster, Forks(noting_starts(place, on(1, 1, 6, fail), pace=PACE)) as forks:
        without_shared_memory(cluster, "n02")
        job = submit(cluster, place, forks, "--nodes", "2", "--spares", "2", "--time", "0:30:00", *WORDS)
        job.until(lambda: (place / "starts" / "2-1").exists(), "the second attempt has begun")
        job.reach(FAULT_AT)
        cut = time.time()
        cluster.power_cut("n03")
        assert job.finish() == "COMPLETED", job.told()
        text = (job.run / f"slurm-{job.number}.log").read_text()
        assert "preflight: n02 is left out: /dev/shm: 0.00 GiB free, at least 0.03 are needed" in text
        first, second, third = job.lines()
        assert first == "attempt 1 died: rank 1 on n03, exit code 1 at step 5; restarting"
        assert second.startswith("attempt 2 died: n03, node lost at step ") and second.endswith("; restarting on n04")
        assert third == f"attempt 3 is done: step {STEPS}"
        assert [verdict["hosts"] for verdict in job.folder.verdicts()] == [
            ["n01", "n03"],
            ["n01", "n03"],
            ["n01", "n04"],
        ]
        assert_as_left_alone(job, left_alone)
        assert job.started(2) - job.folder.verdicts()[0]["ended"] < 5
        assert job.started(3) - cut < 10
        # Frozen: the code that ran is the run's own.
        assert (job.run / "code" / "launch" / "slurm" / "job.py").is_file()
        record = json.loads((job.run / "environment.json").read_text())
        assert record["code"]["commit"] and record["packages"]["torch"].startswith("2.")


# --- faults after which the run goes on -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to rank 1, which is on n02, or to a node; and what must come of it."""

    at_step: Callable[[], object] | None = None  # done by rank 1 itself
    deed: Deed | None = None  # done by the test when step FAULT_AT is made
    nodes: int = 3  # of the cluster; two train
    spares: int = 1
    line: str = ""  # how the first verdict begins
    then: str = "restarting"  # how it ends
    hosts: tuple[str, str] = ("n01", "n02")  # of the last attempt
    seconds: float | None = None  # from the fault to the first rank of the second attempt, at most
    restarts: int = 0  # Slurm's
    excluded: str = ""  # from the job's successor, where it has one
    orphaned: bool = False  # other nodes have submitted it
    words: tuple[str, ...] = ()


def stop_self() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def kill(name: str) -> Deed:
    return lambda job: job.cluster.run("kill", "-KILL", str(job.cluster.names_on("n02")[name]), node="n02")


def signal_batch(job: Submitted) -> None:
    """What Slurm does before the time limit: the batch process alone is told."""
    job.cluster.run("scancel", "--batch", "--signal=USR1", str(job.number))


def preempt(job: Submitted) -> None:
    """A job of a higher partition wants all nodes for a moment."""
    nodes = str(len(job.cluster.names))
    job.cluster.sbatch("--partition=urgent", "--nodes", nodes, "--wrap", "sleep 1", "--output=/dev/null", cwd=job.run)


HANG = ("--step-timeout", "3")
STOPPED: dict[str, Any] = {
    "line": "attempt 1 stopped on request after step ",
    "then": "; to be started again",
    "restarts": 1,
}
LOST: dict[str, Any] = {
    "line": "attempt 1 died: n02, node lost at step ",
    "then": "restarting on n03",
    "hosts": ("n01", "n03"),
}
ORPHANED: dict[str, Any] = {
    "line": "attempt 1 died: n01, the supervisor died at step ",
    "then": "; going on in this job",
    "hosts": ("n02", "n03"),
    "excluded": "n01",
    "orphaned": True,
}
CUT_OFF: dict[str, Any] = {**ORPHANED, "line": "attempt 1 died: ", "then": ""}
FAULTS: dict[str, Fault] = {
    "crash": Fault(
        at_step=crash,
        line=f"attempt 1 died: rank 1 on n02, CUDA error at step {FAULT_AT - 1}; ",
        then="restarting on n03",  # a broken GPU would break again
        hosts=("n01", "n03"),
        seconds=5,
    ),
    "crash-no-spare": Fault(
        at_step=crash,
        nodes=2,
        spares=0,
        line=f"attempt 1 died: rank 1 on n02, CUDA error at step {FAULT_AT - 1}; ",
        seconds=5,
    ),
    "rank-killed": Fault(
        deed=kill("rank-1"), line="attempt 1 died: rank 1 on n02, killed by SIGKILL at step ", seconds=5
    ),
    "agent-killed": Fault(
        deed=kill("agent"),
        line="attempt 1 died: n02, agent died at step ",
        then="restarting on n03",
        hosts=("n01", "n03"),
        seconds=5,
    ),
    "hang": Fault(
        at_step=lambda: time.sleep(600),
        line=f"attempt 1 died: rank 1 on n02, hang at step {FAULT_AT - 1}; ",
        then="restarting on n03",
        hosts=("n01", "n03"),
        seconds=3 + 5,
        words=HANG,
    ),
    "stopped-rank": Fault(
        at_step=stop_self,
        nodes=2,
        spares=0,
        line=f"attempt 1 died: rank 1 on n02, hang at step {FAULT_AT - 1}; ",
        seconds=3 + 5,
        words=HANG,
    ),
    "power-cut": Fault(deed=lambda job: job.cluster.power_cut("n02"), seconds=10, **LOST),
    "partition": Fault(deed=lambda job: job.cluster.partition("n02"), seconds=10, **LOST),
    "power-cut-no-spare": Fault(
        deed=lambda job: job.cluster.power_cut("n02"),
        spares=0,
        line="attempt 1 died: n02, node lost at step ",
        then="; to be requeued: 1 healthy nodes are left, 2 are needed",
        hosts=("n01", "n03"),
        excluded="n02",
        seconds=10,  # its successor waits for nodes only
    ),
    # Slurm gives the nodes free when their steps have given up speaking to the lost node: how soon is not ours.
    "batch-node": Fault(deed=lambda job: job.cluster.power_cut("n01"), spares=0, **ORPHANED),
    "batch-node-with-spare": Fault(deed=lambda job: job.cluster.power_cut("n01"), nodes=4, **ORPHANED),
    "batch-node-idle-nodes": Fault(  # enough of them for the successor
        deed=lambda job: job.cluster.power_cut("n01"),
        nodes=4,
        spares=0,
        seconds=10,
        **{**ORPHANED, "hosts": ("n03", "n04")},
    ),
    "batch-node-with-spare-idle-nodes": Fault(
        deed=lambda job: job.cluster.power_cut("n01"), nodes=6, seconds=10, **{**ORPHANED, "hosts": ("n04", "n05")}
    ),
    "batch-node-partition": Fault(  # what is left on it comes to its own conclusions, and can't act on them
        deed=lambda job: job.cluster.partition("n01"), nodes=4, **CUT_OFF
    ),
    "usr1": Fault(deed=signal_batch, nodes=2, spares=0, **STOPPED),
    "preemption": Fault(deed=preempt, nodes=2, spares=0, **STOPPED),
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", FAULTS)
def test_a_disturbed_job_ends_with_the_same_numbers(place: Path, left_alone: list[tuple[Any, ...]], name: str) -> None:
    fault, marks = FAULTS[name], place / "marks"
    marks.mkdir()

    def mark_and_do() -> None:
        assert fault.at_step is not None
        (marks / "fault").write_text(str(time.time()))
        fault.at_step()

    disturb = on(1, 1, FAULT_AT, mark_and_do) if fault.at_step else (lambda attempt, rank: None)
    with Cluster(nodes=fault.nodes) as cluster, Forks(noting_starts(place, disturb, pace=PACE)) as forks:
        words = ["--nodes", "2", "--spares", str(fault.spares), "--time", "1:00:00", "--no-preflight", *fault.words]
        job = submit(cluster, place, forks, *words, *WORDS)
        if fault.deed:
            job.reach(FAULT_AT)
            (marks / "fault").write_text(str(time.time()))
            fault.deed(job)
        if fault.excluded:
            job = job.successor(orphaned=fault.orphaned)
            assert cluster.job(job.number)["ExcNodeList"] == fault.excluded
        assert job.finish() == "COMPLETED", job.told()
        first, *_, last = job.lines()
        assert first.startswith(fault.line) and first.endswith(fault.then), first
        assert last == f"attempt {len(job.lines())} is done: step {STEPS}"
        assert tuple(job.folder.fence().hosts) == fault.hosts
        assert cluster.job(job.number)["Restarts"] == str(fault.restarts)
        assert_as_left_alone(job, left_alone)
        took = job.started(len(job.lines())) - float((marks / "fault").read_text())
        print(f"{name}: {took:.1f} s from the fault to the last attempt's first rank")
        assert fault.seconds is None or took < fault.seconds


@pytest.mark.nightly
def test_one_of_two_that_watch_has_lost_the_way(place: Path, left_alone: list[tuple[Any, ...]]) -> None:
    """The spare node doesn't reach the batch script's any more. The other one does, so the job is left alone."""
    with Cluster(nodes=3) as cluster, Forks(noting_starts(place, pace=1.0)) as forks:
        job = submit(cluster, place, forks, "--nodes", "2", "--spares", "1", "--no-preflight", *WORDS)
        job.reach(4)
        nobody = ["lladdr", "02:00:00:00:00:77", "nud", "permanent"]
        cluster.run("ip", "neigh", "replace", f"{NETWORK}.1", "dev", "eth0", *nobody, node="n03")
        log = job.run / "watch.log"
        job.until(lambda: "n03 does not hear the node of the batch script" in log.read_text(), "n03 hears nothing")
        assert numbers(job.run)[-1][0] < STEPS  # the job is not over yet
        assert job.finish() == "COMPLETED", job.told()
        assert job.lines() == [f"attempt 1 is done: step {STEPS}"]
        assert "n02" not in log.read_text() and "lost" not in log.read_text()
        assert cluster.job(job.number)["Restarts"] == "0"
        assert cluster.run("squeue", "--noheader", "--states=all", "--format=%i").split() == [str(job.number)]
        assert_as_left_alone(job, left_alone)


@pytest.mark.nightly
def test_a_node_that_crashes_and_stays_away(place: Path, left_alone: list[tuple[Any, ...]]) -> None:
    """Its connections are closed, so the agent may be what died; the next attempt finds out that it was the node."""
    with Cluster(nodes=3) as cluster, Forks(noting_starts(place, pace=PACE)) as forks:
        job = submit(cluster, place, forks, "--nodes", "2", "--no-preflight", *WORDS)
        job.reach(FAULT_AT)
        cluster.crash("n02")
        job = job.successor()
        assert job.finish() == "COMPLETED", job.told()
        first, second, third = job.lines()
        assert first.startswith("attempt 1 died: n02, agent died at step ") and first.endswith("; restarting"), first
        assert second.startswith("attempt 2 died: n02, agent did not start; to be requeued: "), second
        assert third == f"attempt 3 is done: step {STEPS}"
        assert (cluster.job(job.number)["ExcNodeList"], job.folder.fence().hosts) == ("n02", ["n01", "n03"])
        assert_as_left_alone(job, left_alone)


# --- nodes that are broken before the start ---------------------------------------------------------------------------


@pytest.mark.nightly
def test_without_spares_a_successor_goes_on_without_the_broken_node(
    place: Path, left_alone: list[tuple[Any, ...]]
) -> None:
    with Cluster(nodes=3) as cluster, Forks(noting_starts(place)) as forks:
        without_shared_memory(cluster, "n01")
        job = submit(cluster, place, forks, "--nodes", "2", "--time", "0:20:00", "--name", "mine", *WORDS)
        job = job.successor()
        assert job.finish() == "COMPLETED", job.told()
        shown = cluster.job(job.number)
        assert (shown["ExcNodeList"], shown["JobName"], shown["TimeLimit"]) == ("n01", "mine", "00:20:00")
        assert job.folder.fence().hosts == ["n02", "n03"]
        assert_as_left_alone(job, left_alone)


# --- one after another ------------------------------------------------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.parametrize("spares", [0, 1])
def test_a_killed_slurmd(place: Path, left_alone: list[tuple[Any, ...]], spares: int) -> None:
    """Slurm gives the node up, and kills nobody on it. A job with a spare goes on: agents and ranks are heard. One
    without is requeued by Slurm; the old attempt's rank ends by itself, since its supervisor is gone."""
    with Cluster(nodes=3) as cluster, Forks(noting_starts(place, pace=1.5)) as forks:
        job = submit(cluster, place, forks, "--nodes", "2", "--spares", str(spares), "--no-preflight", *WORDS)
        job.reach(2)
        cluster.kill_slurmd("n02")
        assert job.finish() == "COMPLETED", job.told()
        assert cluster.job(job.number)["Restarts"] == str(1 - spares)
        assert job.folder.fence().hosts == (["n01", "n02"] if spares else ["n01", "n03"])
        assert len(job.lines()) == 2 - spares, job.told()
        assert_as_left_alone(job, left_alone)


@pytest.mark.nightly
def test_a_damaged_newest_checkpoint_is_passed_over(place: Path, left_alone: list[tuple[Any, ...]]) -> None:
    def damage_and_crash() -> None:
        newest = place / "run" / "checkpoints" / f"step-{INTERVAL * 2:08d}"
        file = next(newest.glob("*.distcp"))
        os.truncate(file, file.stat().st_size - 100)
        crash()

    disturb = on(1, 1, INTERVAL * 3, damage_and_crash)
    with Cluster(nodes=2) as cluster, Forks(noting_starts(place, disturb, pace=PACE)) as forks:
        job = submit(cluster, place, forks, "--nodes", "2", "--no-preflight", *WORDS)
        assert job.finish() == "COMPLETED", job.told()
        log = (job.run / "attempt-2" / "rank-0.log").read_text()
        assert f"step-{INTERVAL * 2:08d}: this checkpoint is damaged: " in log, log
        assert f"; going on from step-{INTERVAL:08d}" in log and f"resumed after step {INTERVAL}" in log
        assert_as_left_alone(job, left_alone)


# --- what ends a run, and the run that follows ------------------------------------------------------------------------


def again(job: Submitted) -> Submitted:
    """The run's own script submitted once more."""
    number = job.cluster.sbatch(str(job.folder.path / "job.sh"))
    return Submitted(job.cluster, number, job.run)


@pytest.mark.nightly
def test_max_restarts(place: Path, left_alone: list[tuple[Any, ...]]) -> None:
    """A rank that crashes again and again, though the run makes progress: the last one ends the job, not the run."""

    def disturb(attempt: int, rank: int) -> None:
        if attempt <= 3 and rank == 1:
            at_step(INTERVAL * attempt + 3, crash)

    with Cluster(nodes=2) as cluster, Forks(noting_starts(place, disturb, pace=PACE)) as forks:
        job = submit(cluster, place, forks, "--nodes", "2", "--no-preflight", "--max-restarts", "2", *WORDS)
        assert job.finish() == "FAILED", job.told()
        shown, died = cluster.job(job.number), "attempt {} died: rank 1 on n02, CUDA error at step {}; {}"
        assert (shown["ExitCode"], shown["Restarts"]) == ("1:0", "0")
        assert job.lines() == [
            died.format(1, INTERVAL + 2, "restarting"),
            died.format(2, 2 * INTERVAL + 2, "restarting"),
            died.format(3, 3 * INTERVAL + 2, "stopping: max_restarts 2 reached"),
        ]
        assert_nobody_left(job)
        next_one = again(job)
        assert next_one.finish() == "COMPLETED", job.told()
        assert_as_left_alone(next_one, left_alone)


@pytest.mark.nightly
def test_a_wrong_recipe_is_not_tried_again(place: Path) -> None:
    with Cluster(nodes=2) as cluster, Forks(noting_starts(place)) as forks:
        cluster.run("scontrol", "update", "NodeName=n[01-02]", "State=DRAIN", "Reason=test")
        job = submit(cluster, place, forks, "--nodes", "2", "--no-preflight", *WORDS)
        recipe = job.run / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace("pp: 2", "pp: 3"))  # the checks of launch are over
        cluster.run("scontrol", "update", "NodeName=n[01-02]", "State=RESUME")
        assert job.finish() == "FAILED", job.told()
        assert (cluster.job(job.number)["ExitCode"], cluster.job(job.number)["Restarts"]) == ("2:0", "0")
        (verdict,) = job.folder.verdicts()
        assert verdict["line"].endswith(", wrong input; stopping: to be put right first"), verdict
        assert verdict["node"] == ("n01", "n02")[verdict["rank"]] and "pp" in verdict["message"]
        assert_nobody_left(job)


@pytest.mark.nightly
def test_a_full_disk_ends_the_run_and_harms_nothing(place: Path, left_alone: list[tuple[Any, ...]]) -> None:
    with Cluster(nodes=2, disk_mib=64) as cluster:
        filler = cluster.folder / "disk" / "filler"

        def fill() -> None:
            with open(filler, "wb", buffering=0) as file:
                for size in (1 << 20, 1 << 12):
                    try:
                        while True:
                            file.write(bytes(size))
                    except OSError:
                        continue

        with Forks(noting_starts(place, on(1, 1, FAULT_AT, fill), pace=PACE)) as forks:
            run = cluster.folder / "disk" / "run"
            job = submit(cluster, place, forks, "--nodes", "2", "--no-preflight", *WORDS, run=run)
            job.run = cluster.disk / "run"
            assert job.finish() == "FAILED", job.told()
            assert (cluster.job(job.number)["ExitCode"], cluster.job(job.number)["Restarts"]) == ("2:0", "0")
            assert_nobody_left(job)
            (cluster.disk / "filler").unlink()
            number = cluster.sbatch(str(run / "job.sh"))
            next_one = Submitted(cluster, number, job.run)
            assert next_one.finish() == "COMPLETED", next_one.told()
            assert "disk full at step" in job.lines()[0], job.lines()
            assert_as_left_alone(next_one, left_alone)


@pytest.mark.nightly
def test_the_time_limit(place: Path, left_alone: list[tuple[Any, ...]]) -> None:
    """Slurm's own signal, 30 to 60 seconds before the end of two minutes; the job takes more than that."""
    with Cluster(nodes=2) as cluster, Forks(noting_starts(place, pace=5.0)) as forks:
        job = submit(cluster, place, forks, "--nodes", "2", "--time", "2", "--no-preflight", *WORDS)
        assert job.finish(seconds=400) == "COMPLETED", job.told()
        assert cluster.job(job.number)["Restarts"] == "1"
        first, last = job.lines()
        assert first.startswith("attempt 1 stopped on request after step "), first
        assert last == f"attempt 2 is done: step {STEPS}"
        assert_as_left_alone(job, left_alone)


@pytest.mark.nightly
def test_a_chain_of_jobs(place: Path, left_alone: list[tuple[Any, ...]]) -> None:
    """Where jobs may not be requeued: a stopped one is followed by the array's next, and one too many does no harm."""
    with Cluster(nodes=2) as cluster, Forks(noting_starts(place, pace=PACE)) as forks:
        words = ["--nodes", "2", "--no-preflight", "--no-requeue", "--array", "0-2%1"]
        job = submit(cluster, place, forks, *words, *WORDS)
        job.reach(FAULT_AT)
        with contextlib.suppress(ClusterError):  # scancel signals a task of an array, and gives 229
            cluster.run("scancel", "--batch", "--signal=USR1", f"{job.number}_0")
        job.until(lambda: len(_tasks(cluster, job.number)) == 3, "all three tasks have begun")
        job.until(lambda: all(row["JobState"] in ENDED for row in _tasks(cluster, job.number)), "all have ended")
        ends = [(row["JobState"], row["ExitCode"]) for row in _tasks(cluster, job.number)]
        assert ends == [("FAILED", "75:0"), ("COMPLETED", "0:0"), ("COMPLETED", "0:0")], job.told()
        assert job.lines()[0].startswith("attempt 1 stopped on request after step ")
        assert job.lines()[1] == f"attempt 2 is done: step {STEPS}"
        assert_as_left_alone(job, left_alone)


def _tasks(cluster: Cluster, number: int) -> list[dict[str, str]]:
    """What `scontrol show job` says of each task of an array that has begun, the first one first."""
    lines = cluster.run("scontrol", "--oneliner", "show", "job", str(number)).splitlines()
    found = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines]
    begun = [row for row in found if row.get("ArrayTaskId", "").isdigit() and row["JobState"] != "PENDING"]
    return sorted(begun, key=lambda row: int(row["ArrayTaskId"]))


# --- the shipped scripts ----------------------------------------------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.parametrize("forked", [True, False], ids=["forks", "as in life"])
def test_a_shipped_script_submitted_as_it_is(place: Path, left_alone: list[tuple[Any, ...]], forked: bool) -> None:
    """`sbatch slurm/qwen72b_tp8pp4.sh`, made small by words behind it; the job prepares its own run, crashes, is
    stopped by USR1, and requeued takes the same run up again."""
    small = {"model.path": place / "model", "data.sequence_length": 16, "parallel.tp": 1, "parallel.pp": 2}
    small |= {"schedule.global_batch_size": 4, "schedule.learning_rate": 1.0e-3, "schedule.warmup_steps": 0}
    small |= {"checkpoint.keep": 0, "checkpoint.export": "false", "logging.tensorboard": "false"}
    small |= {"runtime.device": "cpu", "runtime.threads": 1}
    steps, interval = (STEPS, INTERVAL) if forked else (400, 50)
    small |= {"schedule.steps": steps, "checkpoint.interval": interval}
    words = [f"--{key}={value}" for key, value in small.items()]
    disturb = noting_starts(place, on(1, 1, 9, crash), pace=PACE)
    with Cluster(nodes=2) as cluster, Forks(disturb) as forks:
        if forked:
            with (place / "site.env").open("a") as site:
                site.write(f"MCORE_SWIFT_VENV={forks.venv}\n")
        environment = {"MCORE_SWIFT_SITE": str(place / "site.env")}
        options = ["--nodes=2", "--time=0:30:00", f"--output={place}/job.log"]
        number = cluster.sbatch(
            *options, "slurm/qwen72b_tp8pp4.sh", "--gpus-per-node=1", *words, cwd=ROOT, environment=environment
        )
        job = Submitted(cluster, number, place / "runs" / f"qwen72b_tp8pp4-{number}")
        if not forked:
            job.reach(30, seconds=400)
            (pid,) = cluster.processes_on("n02", "mcore_swift.cli train")
            cluster.run("kill", "-KILL", str(pid), node="n02")
            job.until(lambda: (job.run / "attempt-2").is_dir(), "the second attempt has begun")
        job.until(lambda: numbers(job.run)[-1][0] >= steps // 2 and job.lines(), "half is made", seconds=400)
        cluster.run("scancel", "--batch", "--signal=USR1", str(number))
        assert job.finish(seconds=400) == "COMPLETED", (place / "job.log").read_text() + job.told()
        assert cluster.job(number)["Restarts"] == "1"
        cause = "CUDA error at step 8" if forked else "killed by SIGKILL at step"
        died, stopped, done = job.lines()
        assert died.startswith(f"attempt 1 died: rank 1 on n02, {cause}") and died.endswith("; restarting"), died
        assert stopped.startswith("attempt 2 stopped on request") and done == f"attempt 3 is done: step {steps}"
        text = (place / "job.log").read_text()
        assert text.count(f"mcore-swift: run {job.run}\n") == 1  # prepared once
        expected = left_alone if forked else undisturbed(place, *words)
        assert numbers(job.run) == expected
        for node in cluster.names:
            assert cluster.processes_on(node, "mcore_swift.cli train") == [] and not job.ranks_on(node)


# --- size -------------------------------------------------------------------------------------------------------------

# Each rank writes when and where it runs, and ends well.
CHECK_IN = 'test "$WORLD_SIZE" = 512 && echo "$LOCAL_RANK $SLURMD_NODENAME $EPOCHREALTIME" >"$0/$RANK"'


@pytest.mark.nightly
def test_512_ranks_on_64_nodes_are_there_in_time_and_where_the_map_says(place: Path) -> None:
    """Pairs of ranks in a pipeline of two: node ranks alternate between the stages along the leaf switches."""
    model = json.loads((place / "model" / "config.json").read_text())
    (place / "model" / "config.json").write_text(json.dumps(model | {"num_attention_heads": 8, "hidden_size": 64}))
    ranks = place / "ranks"
    ranks.mkdir()
    with Cluster(nodes=64, leaf=16) as cluster, Forks() as forks:
        cluster.run("scontrol", "update", "NodeName=n[01-64]", "State=DRAIN", "Reason=test")
        words = ["--nodes", "64", "--gpus-per-node", "8", "--no-preflight", "--parallel.tp", "2"]
        job = submit(cluster, place, forks, *words, "--schedule.global_batch_size", "512")
        settings = json.loads((job.run / "slurm.json").read_text())
        (job.run / "slurm.json").write_text(json.dumps(settings | {"python": [sys.executable]}))  # agents as in life
        job.folder.write_job(replace(job.folder.job(), command=["bash", "-c", CHECK_IN, str(ranks)]))
        cluster.run("scontrol", "update", "NodeName=n[01-64]", "State=RESUME")
        assert job.finish() == "COMPLETED", job.told()
        hosts, (verdict,) = job.folder.fence().hosts, job.folder.verdicts()
        assert hosts[:3] == ["n01", "n03", "n05"] and hosts[32:34] == ["n02", "n04"]
        found = {int(path.name): path.read_text().split() for path in ranks.iterdir()}
        assert {rank: row[:2] for rank, row in found.items()} == {
            rank: [str(rank % 8), hosts[rank // 8]] for rank in range(512)
        }
        took = max(float(row[2]) for row in found.values()) - verdict["started"]
        print(f"512 ranks on 64 nodes have checked in after {took:.1f} s")
        assert took < 15
