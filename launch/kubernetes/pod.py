"""`python -m launch.kubernetes.pod --run RUN --files DIR`: what a node's pod runs, from its start to the run's end.

Every pod says in the run's folder that it is there, and starts the agent of each attempt that its node belongs to. The
first pod also writes the folder, runs the supervisor once enough pods are there, and again after pods were lost, and
notes how the run ended, which is every pod's exit code. A pod that is replaced goes on where the one before it stopped:
all that must be remembered lies in the run's folder.

Imports nothing heavy: Kubernetes may ask a pod to go at any moment. It then passes the request on, so that all ranks
save and stop after the same step.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.agent.job import RunFolder, read_json, write_json
from mcore_swift.errors import EXIT_FAILED, EXIT_INPUT, EXIT_TRY_AGAIN, InputError
from mcore_swift.stop import STOP_SIGNALS

LOOK_SECONDS = 0.5
SAY_SECONDS = 2.0  # between two signs that a pod is there
GONE_SECONDS = 30.0  # without a new sign
SPARES_SECONDS = 120.0  # that spare pods are waited for when the others are there
# The supervisor starts agents with a command; here pods start them, and it lasts as long as it is let.
NOTHING = [sys.executable, "-c", "import signal; signal.pause()"]


class Pods:
    """Which pods are there: each writes another number now and then, so that no clocks are compared."""

    def __init__(self, folder: Path, hosts: Sequence[str]) -> None:
        self.folder, self.hosts = folder, list(hosts)
        self.seen: dict[str, tuple[str, float | None]] = {}  # content, when it last changed (CLOCK_MONOTONIC)

    def say(self, host: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / f"{host}.json", {"pid": os.getpid(), "sign": time.time_ns()})

    def there(self) -> list[str]:
        """The hosts whose sign has changed lately, in order."""
        now = time.monotonic()
        for host in self.hosts:
            try:
                content = (self.folder / f"{host}.json").read_text()
            except OSError:
                continue
            before = self.seen.get(host)
            if before is None:
                self.seen[host] = content, None  # perhaps a pod's that is gone
            elif content != before[0]:
                self.seen[host] = content, now
        found = {
            host for host, (_, changed) in self.seen.items() if changed is not None and now - changed < GONE_SECONDS
        }
        return [host for host in self.hosts if host in found]


class Pod:
    """One node's pod."""

    def __init__(self, run: Path, files: Path, index: int, *, address: str) -> None:
        self.run_folder, self.files, self.address = RunFolder(run), files, address
        self.hosts: list[str] = json.loads((files / "hosts.json").read_text())
        if not 0 <= index < len(self.hosts):
            raise InputError(f"{files}/hosts.json: it has {len(self.hosts)} hosts, this is pod {index}")
        self.index, self.host = index, self.hosts[index]
        self.job_id = str((read_json(files / "job.json") or {}).get("id"))
        self.pods = Pods(run / "pods", self.hosts)
        self.end = run / "pods" / "end.json"
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self.attempt = 0  # the last one that an agent was started for
        self.stopping = False
        self.said = self.waited = 0.0
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def run(self) -> int:
        """Returns the run's exit code, or 75 when this pod was asked to go."""
        if self.index == 0:
            self._write_folder()
        while True:
            try:
                code = self._look()
            except OSError as error:  # a network file system's bad moment
                say(f"{self.host}: {error}")
                code = None
            if code is not None:
                return code
            time.sleep(LOOK_SECONDS)

    def _look(self) -> int | None:
        """Does what is to be done now; the exit code once there is nothing more."""
        self._sign()
        self._reap()
        ended = read_json(self.end) or {}
        over = ended.get("id") == self.job_id
        if over and not self.children:
            return int(ended["code"])
        if self.stopping and not self.children:
            return EXIT_TRY_AGAIN
        if not self.stopping and not over:
            self._start_agent()
            self._start_supervisor()
        return None

    def _on_signal(self, number: int, frame: object) -> None:
        self.stopping = True
        for child in self.children.values():
            if child.poll() is None:
                child.send_signal(number)

    def _sign(self) -> None:
        if time.monotonic() - self.said > SAY_SECONDS or not self.said:
            self.said = time.monotonic()
            self.pods.say(self.host)

    # --- the node's agent ---------------------------------------------------------------------------------------------

    def _start_agent(self) -> None:
        fence = read_json(self.run_folder.path / "attempt.json") or {}
        number = int(fence.get("attempt", 0))
        if "agent" in self.children or number <= self.attempt or self.host not in fence.get("hosts", []):
            return
        self.attempt = number
        if (self.run_folder.attempt(number) / "verdict.json").exists():  # before this pod's time
            return
        words = ["launch.agent", "--run", str(self.run_folder.path), "--attempt", str(number), "--node", self.host]
        self._start("agent", words)

    def _start(self, name: str, words: Sequence[str]) -> None:
        say(f"{self.host}: {' '.join(words)}")
        self.children[name] = subprocess.Popen([sys.executable, "-m", *words], stdin=subprocess.DEVNULL)
        if self.stopping:  # the request came while there was no child
            self.children[name].send_signal(signal.SIGTERM)

    def _reap(self) -> None:
        for name, child in list(self.children.items()):
            if child.poll() is not None:
                if name == "supervisor":
                    self._supervised(child.returncode)
                del self.children[name]
                say(f"{self.host}: {name} ended with {child.returncode}")

    # --- the first pod ------------------------------------------------------------------------------------------------

    def _write_folder(self) -> None:
        """The run's folder, unless an earlier pod or job has made it. Raises InputError when it is another run's."""
        folder, recipe = self.run_folder.path, self.files / "recipe.yaml"
        (folder / "pods").mkdir(parents=True, exist_ok=True)
        if (folder / "recipe.yaml").exists() and (folder / "recipe.yaml").read_text() != recipe.read_text():
            raise InputError(f"{folder}: it holds a run of another recipe; give another --run, or remove it")
        shutil.copyfile(recipe, folder / "recipe.yaml")
        shutil.copyfile(self.files / "job.json", folder / "job.json")
        if (read_json(self.end) or {}).get("id") != self.job_id:
            self.end.unlink(missing_ok=True)  # of an earlier job

    def _start_supervisor(self) -> None:
        """Once enough pods are there: all of them, or as many as an attempt needs and the others don't come."""
        if self.index != 0 or "supervisor" in self.children:
            return
        there, needed = self.pods.there(), self.run_folder.job().nodes
        if len(there) < needed or self.host not in there:
            self.waited = 0.0
            return
        self.waited = self.waited or time.monotonic()
        if len(there) < len(self.hosts) and time.monotonic() - self.waited < SPARES_SECONDS:
            return
        self.waited = 0.0
        words = ["launch.supervise", "--run", str(self.run_folder.path), "--hosts", ",".join(there)]
        self._start("supervisor", [*words, "--address", self.address, "--", *NOTHING])

    def _supervised(self, code: int) -> None:
        """Notes the run's end; nothing when it can go on with other pods."""
        if code == EXIT_TRY_AGAIN or code < 0:  # killed, for want of memory perhaps: its agents have ended their ranks
            self.pods.seen.clear()  # who is still there says so again
        else:
            write_json(self.end, {"id": self.job_id, "code": code})


def say(text: str) -> None:
    print(f"mcore-swift: {time.strftime('%H:%M:%S')} {text}", flush=True)


def index_of_pod() -> int:
    """This pod's number: a Job's index, or the rank that the training operator gives a pod."""
    for name in ("JOB_COMPLETION_INDEX", "RANK"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    raise InputError("neither JOB_COMPLETION_INDEX nor RANK is set: this is no pod of a Job or a PyTorchJob")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.kubernetes.pod", allow_abbrev=False)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--files", type=Path, required=True, help="with recipe.yaml, job.json and hosts.json")
    parser.add_argument("--address", metavar="IP", help="of this pod, for the agents; default: that of its host name")
    parser.add_argument("--again-code", metavar="CODE", type=int, default=EXIT_TRY_AGAIN, help="in place of 75")
    arguments = parser.parse_args(argv)
    try:
        address = arguments.address or socket.gethostbyname(socket.gethostname())
        code = Pod(arguments.run, arguments.files, index_of_pod(), address=address).run()
    except InputError as error:
        say(f"error: {error}")
        return EXIT_INPUT
    except (OSError, ValueError) as error:  # the shared volume isn't there
        say(f"error: {error}")
        return EXIT_FAILED
    return arguments.again_code if code == EXIT_TRY_AGAIN else code


if __name__ == "__main__":
    sys.exit(main())
