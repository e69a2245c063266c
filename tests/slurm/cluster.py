"""A real Slurm cluster of pretended nodes on this one machine: slurmctld, munged, and one slurmd a node.

With namespaces (root on Linux) the whole cluster lives in namespaces of its own: nothing listens on this machine's
addresses, several clusters can run side by side, and all of it dies with the test process. Each node is a host with a
name, an address and processes of its own, so a power cut and a network partition are real ones. Without namespaces
(`plain`) the nodes are slurmds on ports of 127.0.0.1, and what needs a node to die is left out.

    with Cluster(nodes=2) as cluster:
        job = cluster.sbatch("train.sh")
        assert cluster.wait(job) == "COMPLETED"
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NETWORK = "10.77.0"  # exists inside the cluster's namespaces only
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip")
PR_SET_PDEATHSIG = 1  # linux/prctl.h
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY"}
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

# Clocks are short, so that a failure is seen in seconds; nothing depends on cgroups or on the machine's hardware.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={head}
SlurmctldPort={port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
EnforcePartLimits=ALL
SlurmdTimeout=6
SlurmctldTimeout=6
KillWait=3
MessageTimeout=10
UnkillableStepTimeout=20
BatchStartTimeout=10
MinJobAge=3600
ReturnToService=2
JobRequeue=1
GresTypes=gpu
TopologyPlugin=topology/tree
NodeName={nodes} {where} Sockets=2 CoresPerSocket=32 RealMemory=1000000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=gpu Nodes={nodes} Default=YES MaxTime=2-0 OverSubscribe=EXCLUSIVE PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes={nodes} MaxTime=2-0 OverSubscribe=EXCLUSIVE PriorityTier=10 PreemptMode=OFF
"""
# Nodes that only exist on paper, for `sbatch --test-only`.
PAPER = """\
ResumeProgram=/bin/true
SuspendProgram=/bin/true
SuspendTime=86400
NodeName=p[0001-{count}] NodeAddr=127.0.0.1 Sockets=2 CoresPerSocket=32 RealMemory=1000000 Gres=gpu:{gpus} State=CLOUD
PartitionName=paper Nodes=p[0001-{count}] MaxTime=7-0 OverSubscribe=EXCLUSIVE
"""


class ClusterError(RuntimeError):
    """The cluster, or a command in it, did not do what it should."""


def install() -> None:
    """Installs Slurm from the distribution's packages where it is missing (root on Debian or Ubuntu)."""
    if not _missing():
        return
    with open(Path(tempfile.gettempdir()) / "mcore_swift_slurm_install.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest's workers
        if not _missing():
            return
        command = "apt-get -qq update && apt-get -qq install -y --no-install-recommends " + " ".join(PACKAGES)
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, check=False)
    if _missing():
        raise ClusterError(
            f"no {', '.join(_missing())}: `{command}` gave {done.returncode}\n{done.stdout}{done.stderr}"
        )


def _missing() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]


@functools.cache
def namespaces_allowed() -> bool:
    command = ["unshare", "--net", "--uts", "--pid", "--mount", "--fork", "--mount-proc", "true"]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Cluster:
    """`nodes` nodes n01, n02 … with `gpus` pretended GPUs each, in partitions `gpu` (preemptable) and `urgent`.

    `paper` more nodes, on paper only, are in the partition of that name. A leaf switch joins `leaf` nodes.
    With `disk_mib` all nodes share a file system of that size at `folder`/disk; `disk` is its place outside of them.
    """

    def __init__(
        self, *, nodes: int, gpus: int = 8, leaf: int = 2, paper: int = 0, plain: bool = False, disk_mib: int = 0
    ) -> None:
        self.names = [f"n{number:02d}" for number in range(1, nodes + 1)]
        self.gpus, self.leaf, self.paper = gpus, leaf, paper
        self.plain = plain or not namespaces_allowed()
        self.folder = Path(tempfile.mkdtemp(prefix="slurm"))  # short: it holds a socket
        self.disk_mib = disk_mib
        self.processes: list[subprocess.Popen[bytes]] = []
        self.environment = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": PATH}

    def __enter__(self) -> Cluster:
        install()
        self._write_files()
        try:
            (self._start_plain if self.plain else self._start_namespaces)()
            self.until(lambda: self._idle() == len(self.names), seconds=60, what="all nodes are idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.plain:
            with contextlib.suppress(Exception):
                self.run("scancel", "--user", str(os.geteuid()), seconds=10)
        for process in reversed(self.processes):
            process.kill()  # of namespaces: the process whose children all die with it
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- use ----------------------------------------------------------------------------------------------------------

    @property
    def disk(self) -> Path:
        return Path(f"/proc/{self.head()}/root{self.folder}/disk")

    def run(self, *command: str, node: str | None = None, seconds: float = 60, **options: Any) -> str:
        """Runs a command on the head, or on a node, and returns its output. Raises ClusterError unless it gives 0."""
        folder = str(options.pop("cwd", os.getcwd()))
        place = [] if self.plain else self._enter(self.head(), folder)
        if node and place:
            place += self._enter(self._pid(node), folder)
        done = subprocess.run(
            [*place, *command],
            env=self.environment | options.pop("environment", {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            cwd=folder,
            **options,
        )
        if done.returncode:
            raise ClusterError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def sbatch(self, *words: str, **options: Any) -> int:
        """Submits a script and returns the job's number."""
        return int(self.run("sbatch", "--parsable", *words, **options).split(";")[0])

    def job(self, number: int | str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, NodeList, Restarts …"""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", str(number))))

    def wait(self, number: int | str, *, seconds: float = 120, states: set[str] | None = None) -> str:
        """Waits until the job has ended, or is in one of `states`; returns its state."""
        wanted = states or ENDED
        self.until(lambda: self.job(number)["JobState"] in wanted, seconds=seconds, what=f"job {number} in {wanted}")
        return self.job(number)["JobState"]

    def until(self, holds: Callable[[], object], *, seconds: float, what: str) -> None:
        """Waits until `holds()`; raises ClusterError with the logs' ends after `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(ClusterError, LookupError, OSError):  # not there yet
                if holds():
                    return
            if time.monotonic() > deadline:
                raise ClusterError(f"after {seconds} s it does not hold that {what}\n{self.logs()}")
            time.sleep(0.1)

    def logs(self) -> str:
        """The last lines of what the daemons wrote."""
        parts = []
        for path in sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")]):
            lines = path.read_text(errors="replace").splitlines()[-8:]
            parts += [f"--- {path.name}", *lines]
        return "\n".join(parts)

    # --- faults -------------------------------------------------------------------------------------------------------

    def power_cut(self, node: str) -> None:
        """Everything on the node dies at once, and nobody is told: no connection is closed."""
        self.partition(node)
        self.crash(node)

    def crash(self, node: str) -> None:
        """Everything on the node dies at once; its kernel still closes the connections."""
        self.run("kill", "-KILL", str(self._pid(node)))

    def boot(self, node: str) -> None:
        """Starts a node again that lost its power."""
        self.run(str(HERE / "node.sh"), str(self.folder), NETWORK, node, str(self.names.index(node) + 1))

    def partition(self, node: str) -> None:
        """Cuts the node's network; its processes go on."""
        self.run("ip", "link", "set", node, "down")

    def heal(self, node: str) -> None:
        self.run("ip", "link", "set", node, "up")

    def kill_slurmd(self, node: str) -> None:
        """The node's daemon dies alone; what it started goes on."""
        pid = (self.folder / f"slurmd-{node}.pid").read_text().strip()
        self.run("kill", "-KILL", pid, node=node)

    def processes_on(self, node: str, word: str) -> list[int]:
        """Numbers, on the node, of the processes whose command line holds `word`."""
        listed = self.run("ps", "-eo", "pid=,args=", node=node)
        return [int(line.split()[0]) for line in listed.splitlines() if word in line and "ps -eo" not in line]

    def names_on(self, node: str) -> dict[str, int]:
        """Names and numbers, on the node, of the processes that live there; none where the node is dead."""
        try:
            listed = self.run("ps", "-eo", "stat=,pid=,comm=", node=node)
        except ClusterError:
            return {}
        found = [line.split(None, 2) for line in listed.splitlines()]
        return {name.strip(): int(pid) for state, pid, name in found if state[0] not in "ZX"}

    # --- start --------------------------------------------------------------------------------------------------------

    def _start_namespaces(self) -> None:
        spaces = ["--net", "--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        command = [str(HERE / "head.sh"), str(self.folder), NETWORK, *self.names]
        self._spawn("head", ["unshare", *spaces, *command])

    def _start_plain(self) -> None:
        keys = [f"--{key}={self.folder}/munge.{end}" for key, end in (("key-file", "key"), ("socket", "socket"))]
        keys += [f"--seed-file={self.folder}/munge.seed", f"--pid-file={self.folder}/munged.pid"]
        self._spawn("munged", ["munged", "--foreground", "--force", *keys])
        self.until((self.folder / "munge.socket").exists, seconds=10, what="munged listens")
        self._spawn("slurmctld", ["slurmctld", "-D"])
        for name in self.names:
            self._spawn(name, ["slurmd", "-D", "-N", name])

    def _spawn(self, name: str, command: Sequence[str]) -> None:
        with open(self.folder / f"{name}.out", "ab") as output:
            process = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=_die_with_parent,
                start_new_session=True,
            )
        self.processes.append(process)

    def _write_files(self) -> None:
        names = f"n[01-{len(self.names):02d}]"
        (self.folder / "munge.key").write_bytes(secrets.token_bytes(1024))
        (self.folder / "munge.key").chmod(0o600)
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        (self.folder / "disk").mkdir()
        (self.folder / "disk_mib").write_text(str(self.disk_mib))
        host = os.uname().nodename.split(".")[0]
        first = 20_000 + secrets.randbelow(10_000)  # of plain mode's ports
        spread = f"NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first + 2}-{first + 1 + len(self.names)}]"
        text = CONFIGURATION.format(
            head=f"{host}(127.0.0.1)" if self.plain else f"head({NETWORK}.254)",
            port=first if self.plain else 6817,
            node_port=first + 1 if self.plain else 6818,
            user=_user(),
            folder=self.folder,
            nodes=names,
            where=spread if self.plain else f"NodeAddr={NETWORK}.[1-{len(self.names)}]",
            gpus=self.gpus,
        )
        if self.plain:
            text += "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny\n"  # on 127.0.0.1 alone
        if self.paper:
            text += PAPER.format(count=self.paper, gpus=self.gpus)
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # never used; else Slurm looks for one
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\nNodeName={names} Name=gpu File={self._devices()}\n")
        (self.folder / "topology.conf").write_text(self._topology())
        hosts = [f"{NETWORK}.{number} {name}" for number, name in enumerate(self.names, 1)]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", f"{NETWORK}.254 head", *hosts, ""]))

    def _devices(self) -> str:
        """Files that Slurm takes for GPUs: character devices, clones of /dev/null; without root, terminals."""
        if os.geteuid():
            return f"/dev/tty[0-{self.gpus - 1}]"
        for number in range(self.gpus):
            os.mknod(self.folder / f"gpu{number}", 0o20666, os.makedev(1, 3))
        return f"{self.folder}/gpu[0-{self.gpus - 1}]"

    def _topology(self) -> str:
        leaves = [self.names[first : first + self.leaf] for first in range(0, len(self.names), self.leaf)]
        lines = [f"SwitchName=leaf{number} Nodes={','.join(leaf)}" for number, leaf in enumerate(leaves, 1)]
        if self.paper:
            lines.append(f"SwitchName=paper Nodes=p[0001-{self.paper}]")
        tops = [f"leaf{number}" for number in range(1, len(leaves) + 1)] + (["paper"] if self.paper else [])
        return "\n".join([*lines, f"SwitchName=spine Switches={','.join(tops)}", ""])

    def _idle(self) -> int:
        listed = self.run("sinfo", "--noheader", "--partition=gpu", "--format=%D %t").splitlines()
        return sum(int(line.split()[0]) for line in listed if line.split()[1] == "idle")

    # --- namespaces ---------------------------------------------------------------------------------------------------

    def head(self) -> int:
        """The head's process 1, as this process sees it."""
        pid = self.processes[0].pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if not children:
            raise ClusterError("the cluster's head is not up")
        return int(children[0])

    def _pid(self, node: str) -> int:
        """A node's process 1, as the head sees it."""
        return int((self.folder / f"{node}.pid").read_text())

    @staticmethod
    def _enter(pid: int, folder: str) -> list[str]:
        return ["nsenter", "--target", str(pid), "--net", "--uts", "--pid", "--mount", f"--wd={folder}", "--"]


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.geteuid()).pw_name
