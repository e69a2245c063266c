"""What a job's batch script becomes: preflight, then the supervisor on the good nodes, then requeue if there is cause.

It runs on the job's first node, again from the start whenever Slurm requeues the job, and imports nothing heavy: the
time limit's signal may come at any moment.

Nodes found bad are left out in favour of spares. Too few good ones, or a supervisor that gives 75: the job goes back to
the queue, at most `max_requeues` times. Where nodes are at fault, a successor that excludes them takes its place: Slurm
changes a job's `ExcNodeList` only while it waits, and a job that is requeued doesn't live to see that.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from launch.agent.job import RunFolder
from launch.slurm.hosts import expand, in_leaf_order
from launch.slurm.prepare import Settings, read_settings
from mcore_swift.errors import EXIT_FAILED, EXIT_INPUT, EXIT_TRY_AGAIN, InputError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Steps: beside whatever else the job runs, on all its cores, and not ended because one node is lost. Each also needs
# --ntasks: srun would take it from the job's SLURM_NTASKS, and put the spares' tasks on the nodes that it has.
SRUN = ["srun", "--overlap", "--ntasks-per-node=1", "--cpu-bind=none", "--kill-on-bad-exit=0", "--no-kill"]


class Stop:
    """Notes the signals that ask for a stop, and passes them on to the process that is waited for."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.child: subprocess.Popen[bytes] | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(number)

    def run(self, command: Sequence[str], *, seconds: float | None = None) -> int | None:
        """Runs a command to its end and returns its exit code; None: it took longer than `seconds` and was ended."""
        self.child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        if self.received is not None:  # it came while there was no child
            self.child.send_signal(self.received)
        try:
            return self.child.wait(seconds)
        except subprocess.TimeoutExpired:
            self.child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(3)
            self.child.kill()
            return None
        finally:
            self.child = None


def main(argv: Sequence[str] | None = None) -> int:
    stop = Stop()  # before anything that takes time
    parser = argparse.ArgumentParser(prog="python -m launch.slurm.job", allow_abbrev=False)
    parser.add_argument("--run", type=Path, required=True)
    run: Path = parser.parse_args(argv).run
    try:
        return _job(run, stop)
    except InputError as error:
        say(f"error: {error}")
        return EXIT_INPUT


def say(text: str) -> None:
    print(f"mcore-swift: {time.strftime('%H:%M:%S')} {text}", flush=True)


def _job(run: Path, stop: Stop) -> int:
    settings = read_settings(run)
    folder = RunFolder(run)
    folder.write_job(replace(folder.job(), id=os.environ["SLURM_JOB_ID"]))
    hosts = job_hosts()
    bad: dict[str, str] = {}
    if settings.preflight is not None:
        from launch.slurm.preflight import preflight

        bad = preflight(run, settings, hosts, stop)
        for host, reason in bad.items():
            say(f"preflight: {host} is left out: {reason}")
    good = [host for host in hosts if host not in bad]
    if stop.received is not None:
        return again(run, settings, "stopped before the start")
    if len(good) < settings.nodes:
        reason = f"{len(good)} of {len(hosts)} nodes are good, {settings.nodes} are needed"
        return again(run, settings, reason, list(bad))
    with _watched(settings, run, good):
        code = stop.run(supervisor_words(settings, run, good))
    if code != EXIT_TRY_AGAIN:
        return EXIT_FAILED if code is None or code < 0 else code
    verdict = (folder.verdicts() or [{}])[-1]
    reason, exclude = str(verdict.get("line", "the run can go on")), verdict.get("exclude", [])
    return again(run, settings, reason, exclude)


def job_hosts() -> list[str]:
    """The job's nodes that answer, along the leaf switches."""
    listed = os.environ["SLURM_JOB_NODELIST"]
    hosts, topology = expand(listed), _output(["scontrol", "show", "topology"])
    known = _output(["sinfo", "--Node", "--noheader", "--responding", "--format=%N", "--nodes", listed])
    answering = set(known.split()) or set(hosts)
    return in_leaf_order([host for host in hosts if host in answering], topology)


def placed(settings: Settings, hosts: Sequence[str]) -> list[str]:
    """Hosts in the order of node ranks, then the spares."""
    return [hosts[index] for index in settings.order] + list(hosts[settings.nodes :])


def agent_words(settings: Settings) -> list[str]:
    """What starts the agents of one attempt; the supervisor fills in the braces."""
    where = ["--nodes={count}", "--ntasks={count}", "--nodelist={nodes}"]
    return [*SRUN, *where, *settings.srun, *settings.python, "-m", "launch.agent", "--run={run}", "--attempt={attempt}"]


def watch_words(run: Path, hosts: Sequence[str], address: str) -> list[str]:
    """Two nodes, or the only other one, that notice when this one is lost."""
    words = [*SRUN, *_where(hosts[:2]), sys.executable, "-m", "launch.slurm.watch"]
    return [*words, f"--run={run}", f"--batch={address}"]


def _where(hosts: Sequence[str]) -> list[str]:
    return [f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", f"--nodelist={','.join(hosts)}"]


def supervisor_words(settings: Settings, run: Path, hosts: Sequence[str]) -> list[str]:
    words = [sys.executable, "-m", "launch.supervise", "--run", str(run), "--hosts", ",".join(placed(settings, hosts))]
    return [*words, "--", *agent_words(settings)]


def preflight_words(settings: Settings, folder: Path, hosts: Sequence[str], clock: str) -> list[str]:
    """One step over all nodes."""
    words = [*SRUN, *_where(hosts), *settings.srun, *settings.python, "-m", "launch.preflight"]
    words += [f"--folder={folder}", f"--hosts={','.join(hosts)}", f"--clock={clock}"]
    words += [f"--gpus={0 if settings.on_cpu else settings.gpus_per_node}"]
    return [*words, *(f"--limit={limit}" for limit in (settings.preflight or "").split())]


@contextlib.contextmanager
def _watched(settings: Settings, run: Path, hosts: Sequence[str]) -> Iterator[None]:
    """Other nodes watch this one (launch.slurm.watch)."""
    me = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    others = [host for host in hosts if host != me]
    if not others:
        yield
        return
    with socket.create_server(("", 0), backlog=16) as server:  # the kernel answers for it, nobody else has to
        words = watch_words(run, others, f"{me}:{server.getsockname()[1]}")
        watch = subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            yield
        finally:
            watch.kill()  # it would wait for a lost node; the job's end ends the step


def may_requeue(settings: Settings) -> bool:
    return settings.requeue and int(os.environ.get("SLURM_RESTART_COUNT", "0")) < settings.max_requeues


def successor_of(run: Path, exclude: Sequence[str]) -> list[str]:
    """What submits this job again without the nodes to exclude; nothing where there are none.

    It doesn't wait for this job's end, which Slurm only sees when it has given a lost node up: this job's ranks are
    gone by now, or fenced off.
    """
    if not exclude:
        return []
    task, shown = os.environ.get("SLURM_ARRAY_TASK_ID"), shown_job()
    nodes = ",".join(sorted({*expand(field(shown, "ExcNodeList")), *exclude}))
    words = ["sbatch", "--parsable", f"--exclude={nodes}"]
    given = {"partition": "Partition", "account": "Account", "qos": "QOS", "time": "TimeLimit", "job-name": "JobName"}
    words += [f"--{option}={value}" for option, name in given.items() if (value := field(shown, name))]
    words += [] if task is None else [f"--array={task}"]
    script = next(path / "job.sh" for path in (run, run.parent) if (path / "job.sh").is_file())  # of a sweep: above
    return [*words, str(script)]


def again(run: Path, settings: Settings, reason: str, exclude: Sequence[str] = (), *, nobody_left: bool = False) -> int:
    """Sends the job back to the queue where that is wanted and allowed, or submits its successor without `exclude`.

    One process of a job does so, once. `nobody_left`: to end it, so it is cancelled when its successor is submitted.
    Returns the exit code for where it still lives afterwards.
    """
    job = os.environ["SLURM_JOB_ID"]
    if not settings.requeue:
        say(f"{reason}; submit {os.environ.get('SLURM_JOB_NAME', 'the job')} again to go on")
        return EXIT_TRY_AGAIN
    if not may_requeue(settings):
        say(f"{reason}; not again: requeued {settings.max_requeues} times already")
        return EXIT_FAILED
    shown = shown_job()
    if field(shown, "JobState") != "RUNNING":  # cancelled, or already on its way back to the queue
        say(f"{reason}; Slurm has the job as {field(shown, 'JobState')}")
        return EXIT_TRY_AGAIN
    if not _first_to_act(run):
        say(f"{reason}; another node of this job has seen to it")
        return EXIT_TRY_AGAIN
    successor = successor_of(run, exclude)
    if successor and (number := _output(successor).strip()):
        say(f"{reason}; job {number} goes on, {successor[2].removeprefix('--')}")
        if nobody_left:
            _output(["scancel", job])
        return EXIT_TRY_AGAIN
    say(f"{reason}; requeued")
    _output(["scontrol", "requeue", job])  # ends this process, too
    time.sleep(60)
    return EXIT_TRY_AGAIN


def this_start(run: Path) -> Path:
    """A folder of what this job's nodes have to tell each other, of this start of it alone."""
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    folder = run / "slurm" / f"{os.environ['SLURM_JOB_ID']}.{restarts}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _first_to_act(run: Path) -> bool:
    try:
        (this_start(run) / "over").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def shown_job() -> str:
    """What Slurm says of this job, in one line; nothing where it doesn't answer."""
    return _output(["scontrol", "--oneliner", "show", "job", os.environ["SLURM_JOB_ID"]])


def field(text: str, name: str) -> str:
    value = text.partition(f" {name}=")[2].split(" ")[0].strip()
    return "" if value == "(null)" else value


def _output(words: Sequence[str]) -> str:
    """What a Slurm command prints; nothing where it fails, which is said."""
    # A successor inherits them: SBATCH_… go before its script's own lines, SLURM_RESTART_COUNT is this job's alone.
    own = ("SBATCH_", "SLURM_")
    variables = {name: value for name, value in os.environ.items() if name == "SLURM_CONF" or not name.startswith(own)}
    done = subprocess.run(words, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        say(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout if done.returncode == 0 else ""


if __name__ == "__main__":
    sys.exit(main())
