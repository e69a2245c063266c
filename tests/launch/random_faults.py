"""Kills at random moments of real training: `python -m tests.launch.random_faults --faults 50 --seed 1`.

Rounds of a tiny model on two ranks, each disturbed up to four times: a rank, its agent or the supervisor is killed, or
a rank is stopped, at any moment of the attempt or in the middle of a save. After each fault the next attempt must load
the checkpoint that was the newest; after each round every number of every step is that of the run that was left alone,
every checkpoint is there and whole, and no process is left. The seed decides who is struck and when, to within what a
machine's scheduler does.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.agent.job import RunFolder
from mcore_swift.training.checkpoint_folder import checkpoint_step, complete_checkpoints, read_manifest
from tests.launch.forked import run
from tests.launch.programs import is_alive
from tests.training.test_resume import STEPS, make_recipe, numbers

INTERVAL = 2
WORDS = ["--checkpoint.interval", str(INTERVAL)]
FAULTS_A_ROUND = 4
VICTIMS = ("rank", "rank", "rank", "agent", "supervisor", "hang")
# Never tired of failures; a hang is noticed soon. Other processes may take the machine's cores for seconds.
JOB: dict[str, Any] = {"max_restarts": 100, "max_without_progress": 100, "backoff_seconds": 0.0}
JOB |= {"timeouts": {"start": 15.0, "load": 15.0, "train": 6.0, "save": 6.0, "end": 6.0}}
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Strike:
    """One fault: who is struck, and when."""

    victim: str
    rank: int  # the victim, or the one whose agent or supervisor it is
    moment: float  # 0 to 1: from the beginning to the end of the attempt, or of two steps that begin with a save
    save: int | None  # which one of the attempt's

    def __str__(self) -> str:
        where = "the attempt" if self.save is None else f"save {self.save}"
        return f"{self.victim} (rank {self.rank}) at {self.moment:.2f} of {where}"


def draw(dice: random.Random) -> Strike:
    save = dice.randrange(1, 4) if dice.random() < 0.5 else None
    return Strike(dice.choice(VICTIMS), dice.randrange(2), dice.random(), save)


class Round:
    """One run and the faults that are to come, one an attempt; `seconds` is what it takes if it is left alone."""

    def __init__(self, recipe: Path, folder: Path, strikes: list[Strike], seconds: float) -> None:
        self.recipe, self.folder, self.strikes, self.seconds = recipe, folder, strikes, seconds

    def run(self) -> None:
        """Runs to the end, and starts anew where a supervisor was killed, as a scheduler does."""
        for _ in range(1 + len(self.strikes)):
            code = run(self.recipe, self.folder, self._disturb, WORDS, **JOB)
            if code != -signal.SIGKILL:
                break
        assert code == 0, f"exit code {code}"

    def _disturb(self, attempt: int, rank: int) -> None:
        """In the rank, before it does anything."""
        if attempt > len(self.strikes) or self.strikes[attempt - 1].rank != rank:
            return
        strike = self.strikes[attempt - 1]
        target = {"agent": os.getppid(), "supervisor": _parent(os.getppid())}.get(strike.victim, os.getpid())
        number = signal.SIGSTOP if strike.victim == "hang" else signal.SIGKILL
        if strike.save is None:
            done = checkpoint_step(saved[-1]) if (saved := complete_checkpoints(self.folder / "checkpoints")) else 0
            send_later(target, number, strike.moment * self.seconds * (1 - 0.7 * done / STEPS))
        else:
            _in_save(strike.save, lambda: send_later(target, number, strike.moment * 2 * self.seconds / STEPS))

    def faults(self) -> list[dict[str, Any]]:
        """The verdicts of the attempts that were struck down; raises where one of them cost more than it may."""
        found = RunFolder(self.folder)
        failed = [verdict for verdict in found.verdicts() if verdict["outcome"] == "failed"]
        for verdict in failed:
            log = (found.attempt(verdict["attempt"] + 1) / "rank-0.log").read_text()
            assert "damaged" not in log, log
            resumed = re.search(r"resumed after step (\d+)", log)
            if resumed is not None:  # else struck down before it had loaded anything
                assert int(resumed[1]) >= verdict["checkpoint_after"], (verdict, log)
        return failed

    def check(self, left_alone: list[tuple[Any, ...]]) -> None:
        assert numbers(self.folder) == left_alone, "other numbers than those of the run that was left alone"
        saved = complete_checkpoints(self.folder / "checkpoints")
        lost = {*range(INTERVAL, STEPS + 1, INTERVAL)} - {*map(checkpoint_step, saved)}
        assert not lost, f"checkpoints are lost: {sorted(lost)}"  # there may be more: ranks that are asked to stop save
        for path in saved:
            read_manifest(path)
        deadline = time.monotonic() + 10
        pids = [int(path.name) for path in (self.folder / "pids").iterdir()]
        while any(map(is_alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not [pid for pid in pids if is_alive(pid)], "ranks are left"


def send_later(target: int, number: int, seconds: float) -> None:
    """A child of this process sends the signal; nobody does where this process ends first."""
    parent = os.getpid()
    if os.fork() == 0:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        time.sleep(seconds)
        if os.getppid() == parent:
            os.kill(target, number)
        os._exit(0)


def _in_save(count: int, deed: Callable[[], None]) -> None:
    """Does it when this rank begins to save for the `count`-th time."""
    from mcore_swift.training.checkpoint import CheckpointManager

    save, calls = CheckpointManager.save, []

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == count:
            deed()
        save(self, *args, **kwargs)

    CheckpointManager.save = counted  # type: ignore[method-assign]


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def inject(place: Path, *, faults: int, seed: int, say: Callable[[str], object] = print) -> Counter[str]:
    """Rounds until so many faults have struck; counts them by victim and moment. Raises AssertionError."""
    recipe, dice = make_recipe(place), random.Random(seed)
    began = time.monotonic()
    assert run(recipe, place / "left_alone", overrides=WORDS, **JOB) == 0
    seconds, left_alone = time.monotonic() - began, numbers(place / "left_alone")
    struck: Counter[str] = Counter()
    number = 0
    while struck.total() < faults:
        number += 1
        strikes = [draw(dice) for _ in range(FAULTS_A_ROUND)]
        round = Round(recipe, place / f"round-{number}", strikes, seconds)
        try:
            round.run()
            failed = round.faults()
            round.check(left_alone)
        except BaseException:
            say(f"round {number} failed: {'; '.join(map(str, strikes))}\nsee {round.folder}")
            raise
        for verdict in failed:
            if verdict["attempt"] > len(strikes):
                say(f"round {number}: not asked for: {verdict['line']}")
                continue
            strike = strikes[verdict["attempt"] - 1]
            struck[f"{strike.victim}, " + ("any moment" if strike.save is None else "in a save")] += 1
            say(f"round {number}: {strike}: {verdict['line']}")
        shutil.rmtree(round.folder)
    return struck


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.launch.random_faults", allow_abbrev=False)
    parser.add_argument("--faults", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="faults"))
    began = time.monotonic()
    try:
        struck = inject(place, faults=options.faults, seed=options.seed)
    except AssertionError as error:
        print(f"random_faults: {error}", file=sys.stderr)
        return 1
    shutil.rmtree(place)
    print(f"seed {options.seed}: {struck.total()} faults in {time.monotonic() - began:.0f} s, all survived")
    for kind, count in sorted(struck.items()):
        print(f"  {count:3d} {kind}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
