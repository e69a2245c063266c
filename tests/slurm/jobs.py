"""Submitting tiny runs to a test cluster, disturbing them, and reading what became of them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.agent.job import RunFolder
from tests.launch.forked import Disturbance
from tests.slurm.cluster import ENDED, Cluster
from tests.slurm.forks import Forks, in_head
from tests.training.test_resume import numbers, train


@dataclass
class Submitted:
    """A job of a test cluster and its run's folder."""

    cluster: Cluster
    number: int
    run: Path

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.run)

    def lines(self) -> list[str]:
        """What the supervisor said of each attempt that has ended, the first one first."""
        return [verdict["line"] for verdict in self.folder.verdicts()]

    def told(self) -> str:
        """The job's own log and what its parts wrote."""
        files = [*self.run.glob("slurm-*.log"), *self.run.glob("watch.log"), *self.run.glob("attempt-*/*.log")]
        texts = [f"--- {path}\n{path.read_text(errors='replace')[-3000:]}" for path in files]
        return "\n".join([*self.lines(), *texts, self.cluster.logs()])

    def until(self, holds: Callable[[], object], what: str, *, seconds: float = 120) -> None:
        try:
            self.cluster.until(holds, seconds=seconds, what=what)
        except Exception as error:
            raise AssertionError(f"{error}\n{self.told()}") from error

    def reach(self, step: int, *, seconds: float = 120) -> None:
        """Waits until the run has made so many steps."""
        self.until(lambda: numbers(self.run)[-1][0] >= step, f"step {step} is made", seconds=seconds)

    def finish(self, *, seconds: float = 240) -> str:
        """Waits for the job's end and returns its state."""
        self.until(lambda: self.cluster.job(self.number)["JobState"] in ENDED, "the job has ended", seconds=seconds)
        return self.cluster.job(self.number)["JobState"]

    def successor(self, *, orphaned: bool = False) -> Submitted:
        """The job that this one has submitted, to go on without the nodes at fault; this one has ended with 75.

        orphaned: its batch node was lost, so other nodes have submitted the successor and cancelled this one.
        """
        log = self.run / ("watch.log" if orphaned else f"slurm-{self.number}.log")
        self.until(lambda: re.search(r"; job \d+ goes on", log.read_text()), "a successor is submitted")
        state, code = self.finish(), self.cluster.job(self.number)["ExitCode"]
        assert state == "CANCELLED" if orphaned else (state, code) == ("FAILED", "75:0"), self.told()
        found = re.findall(r"; job (\d+) goes on", log.read_text())
        assert len(found) == 1, found
        return Submitted(self.cluster, int(found[0]), self.run)

    def started(self, attempt: int) -> float:
        """When the attempt's first rank was started, Unix seconds; see `noting_starts`."""
        return min(float(path.read_text()) for path in (self.run.parent / "starts").glob(f"{attempt}-*"))

    def ranks_on(self, node: str) -> list[str]:
        """The ranks that live on a node; none where the node is dead."""
        return [name for name in self.cluster.names_on(node) if name.startswith("rank-")]


def submit(cluster: Cluster, place: Path, forks: Forks, *words: str, run: Path = Path("run")) -> Submitted:
    """`mcore-swift launch slurm` in `place`, from this checkout; agents and ranks will be forks."""
    site, log = place / "site.env", place / "submit.log"
    kept = [line for line in site.read_text().splitlines() if not line.startswith("MCORE_SWIFT_VENV=")]
    site.write_text("\n".join([*kept, f"MCORE_SWIFT_VENV={forks.venv}", ""]))
    command = ["launch", "slurm", "recipe.yaml", "--site", "site.env", "--run", str(run), *words]

    def work() -> int | None:
        from mcore_swift.cli import main

        return main(command if "--gpus-per-node" in words else [*command, "--gpus-per-node", "1"])

    assert in_head(cluster, work, folder=place, log=log) == 0, log.read_text()
    match = re.search(r"^job (\d+): (\S+)$", log.read_text(), re.MULTILINE)
    assert match, log.read_text()
    return Submitted(cluster, int(match[1]), Path(match[2]))


def noting_starts(place: Path, disturb: Disturbance = lambda attempt, rank: None, *, pace: float = 0.0) -> Disturbance:
    """Each rank notes when it was started; `pace` seconds are added to each step, so that there is time for a fault."""

    def noting(attempt: int, rank: int) -> None:
        (place / "starts").mkdir(exist_ok=True)
        (place / "starts" / f"{attempt}-{rank}").write_text(str(time.time()))
        slowed(pace)
        disturb(attempt, rank)

    return noting


def slowed(seconds: float) -> None:
    """Every step of this rank takes longer."""
    from mcore_swift.training.trainer import Trainer

    original = Trainer._step

    def step(self: Trainer) -> None:
        time.sleep(seconds)
        original(self)

    Trainer._step = step  # type: ignore[method-assign]


def undisturbed(place: Path, *words: str) -> list[tuple[Any, ...]]:
    """The numbers of the same recipe on two ranks of this machine, without Slurm."""
    reference = place / "reference"
    command = ["train", str(place / "recipe.yaml"), "--model.path", str(place / "model")]
    assert train([*command, "--checkpoint.dir", str(reference), *words]) == 0
    return numbers(reference)
