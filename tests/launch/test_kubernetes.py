"""Kubernetes: manifests that its API takes, and pods that keep a run alive. The pods are processes here."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.agent.job import Job, RunFolder
from mcore_swift.cli import main
from mcore_swift.recipe_io import load_recipe
from tests.distributed.tiny_models import tiny_folder
from tests.launch.programs import RANK, TOGETHER, assert_no_orphans, rank_starts

# --- the manifest: fields of the APIs, from their published definitions -----------------------------------------------
# jobset.x-k8s.io/v1alpha2, batch/v1 Job, kubeflow.org/v1 PyTorchJob, v1 Pod; as far as a manifest of ours has them.

META: Any = {"name": str, "namespace": str, "labels": dict}
CONTAINER = {
    "name": str,
    "image": str,
    "command": [str],
    "args": [str],
    "env": [{"name": str, "value": str}],
    "resources": {"limits": dict, "requests": dict},
    "securityContext": {"capabilities": {"add": [str], "drop": [str]}},
    "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool}],
}
VOLUME = {
    "name": str,
    "persistentVolumeClaim": {"claimName": str, "readOnly": bool},
    "emptyDir": {"medium": str, "sizeLimit": str},
    "configMap": {"name": str},
}
POD = {
    "metadata": META,
    "spec": {
        "restartPolicy": {"Always", "OnFailure", "Never"},
        "terminationGracePeriodSeconds": int,
        "containers": [CONTAINER],
        "volumes": [VOLUME],
        "hostNetwork": bool,
        "dnsPolicy": {"ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"},
        "nodeSelector": dict,
    },
}
RULE = {
    "action": {"FailJob", "Ignore", "Count", "FailIndex"},
    "onExitCodes": {"containerName": str, "operator": {"In", "NotIn"}, "values": [int]},
    "onPodConditions": [{"type": str, "status": {"True", "False", "Unknown"}}],
}
JOB = {
    "completionMode": {"Indexed", "NonIndexed"},
    "completions": int,
    "parallelism": int,
    "backoffLimit": int,
    "podFailurePolicy": {"rules": [RULE]},
    "template": POD,
}
JOBSET = {
    "apiVersion": {"jobset.x-k8s.io/v1alpha2"},
    "kind": {"JobSet"},
    "metadata": META,
    "spec": {
        "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
        "successPolicy": {"operator": {"All", "Any"}, "targetReplicatedJobs": [str]},
        "failurePolicy": {"maxRestarts": int},
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"metadata": META, "spec": JOB}}],
    },
}
REPLICA = {"replicas": int, "restartPolicy": {"Always", "OnFailure", "Never", "ExitCode"}, "template": POD}
PYTORCHJOB = {
    "apiVersion": {"kubeflow.org/v1"},
    "kind": {"PyTorchJob"},
    "metadata": META,
    "spec": {
        "runPolicy": {"cleanPodPolicy": {"All", "Running", "None"}, "backoffLimit": int},
        "pytorchReplicaSpecs": {"Master": REPLICA, "Worker": REPLICA},
    },
}
CONFIG_MAP = {"apiVersion": {"v1"}, "kind": {"ConfigMap"}, "metadata": META, "data": dict}
EVERYTHING = [
    *("--namespace", "team", "--queue", "big", "--host-network", "--rdma", "rdma/ib=8", "--shared-memory", "128Gi"),
    *("--node-selector", "gpu=h100", "--node-selector", "zone=a", "--spares", "1", "--max-restarts", "7"),
]


def check(value: Any, allowed: Any, where: str = "") -> None:
    """Fails for a field or a value that the API doesn't have."""
    match allowed:
        case dict():
            assert isinstance(value, dict) and value, where
            for key, inner in value.items():
                assert key in allowed, f"{where}.{key}: no such field"
                check(inner, allowed[key], f"{where}.{key}")
        case list():
            assert isinstance(value, list) and value, where
            for inner in value:
                check(inner, allowed[0], f"{where}[]")
        case set():
            assert value in allowed, f"{where}: {value!r}"
        case _:
            assert type(value) is allowed, f"{where}: {value!r}"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kubernetes")
    path = folder / "Qwen3_tiny.TP2.yaml"
    values = {
        "model": {"path": str(tiny_folder(folder / "model", "qwen3"))},
        "data": {"train": "synthetic", "format": "synthetic", "sequence_length": 64},
        "parallel": {"tp": 2, "pp": 2},
        "schedule": {"steps": 2, "global_batch_size": 8, "micro_batch_size": 1},
    }
    path.write_text(yaml.safe_dump(values))
    return path


def words(recipe: Path, *more: str) -> list[str]:
    given = ["--print", "--claim", "shared", "--image", "registry/mcore:1", "--gpus-per-node", "2"]
    return ["launch", "kubernetes", str(recipe), *given, *more]


def printed(capsys: pytest.CaptureFixture[str], recipe: Path, *more: str) -> tuple[dict[str, Any], dict[str, Any]]:
    assert main(words(recipe, *more)) == 0
    config, job = yaml.safe_load_all(capsys.readouterr().out)
    check(config, CONFIG_MAP)
    return config, job


def test_jobset(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, job = printed(capsys, recipe, *EVERYTHING, "--nodes", "4", "--data.sequence_length", "32")
    check(job, JOBSET)
    name, spec = "qwen3-tiny-tp2", job["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["metadata"]["name"] == name and job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "big"
    assert job["spec"]["failurePolicy"] == {"maxRestarts": 0}  # recovery is ours
    assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (5, 5, "Indexed")
    rules = spec["podFailurePolicy"]["rules"]
    assert [(rule["action"], rule.get("onExitCodes", {}).get("values")) for rule in rules] == [
        ("FailJob", [1, 2, 93]),
        ("Ignore", [75]),
        ("Ignore", None),
    ]
    assert rules[2]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert {rule["onExitCodes"]["containerName"] for rule in rules[:2]} == {container["name"]}
    assert pod["restartPolicy"] == "Never" and pod["hostNetwork"] and pod["dnsPolicy"] == "ClusterFirstWithHostNet"
    assert pod["nodeSelector"] == {"gpu": "h100", "zone": "a"}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 2, "rdma/ib": 8}
    assert container["securityContext"] == {"capabilities": {"add": ["IPC_LOCK"]}}
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {"shared": "/shared", "shm": "/dev/shm", "files": "/etc/mcore-swift"}
    (memory,) = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm"]
    assert memory == {"medium": "Memory", "sizeLimit": "128Gi"}
    run = f"/shared/runs/{name}"
    assert container["command"] == [
        *("python", "-m", "launch.kubernetes.pod", "--run", run, "--files", "/etc/mcore-swift")
    ]
    files = config["data"]
    assert json.loads(files["hosts.json"]) == [f"{name}-node-0-{index}.{name}" for index in range(5)]
    made = Job(**json.loads(files["job.json"]))
    assert (made.nodes, made.ranks_per_node, made.spares, made.max_restarts) == (4, 2, 1, 7)
    assert pod["terminationGracePeriodSeconds"] > made.stop_seconds


def test_the_recipe_travels_whole(recipe: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config, _ = printed(capsys, recipe, "--data.sequence_length", "32", "--schedule.learning_rate", "3e-4")
    (tmp_path / "recipe.yaml").write_text(config["data"]["recipe.yaml"])
    there = load_recipe(tmp_path / "recipe.yaml", [])
    here = load_recipe(recipe, ["--data.sequence_length=32", "--schedule.learning_rate=3e-4"])
    assert there.checkpoint.dir == "/shared/runs/qwen3-tiny-tp2"
    assert asdict(there) | {"checkpoint": None} == asdict(here) | {"checkpoint": None}


def test_pytorchjob(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, job = printed(capsys, recipe, *EVERYTHING, "--kind", "pytorchjob", "--nodes", "2", "--name", "mine")
    check(job, PYTORCHJOB)
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert [(kind, replica["replicas"]) for kind, replica in replicas.items()] == [("Master", 1), ("Worker", 2)]
    for replica in replicas.values():  # codes below 128 are final, so 75 goes by another name
        assert replica["restartPolicy"] == "ExitCode" and "restartPolicy" not in replica["template"]["spec"]
        assert replica["template"]["spec"]["containers"][0]["name"] == "pytorch"
        assert replica["template"]["spec"]["containers"][0]["command"][-2:] == ["--again-code", "203"]
    hosts = json.loads(config["data"]["hosts.json"])
    assert hosts == ["mine-master-0", "mine-worker-0", "mine-worker-1"]
    _, job = printed(capsys, recipe, "--kind", "pytorchjob", "--gpus-per-node", "4")
    assert list(job["spec"]["pytorchReplicaSpecs"]) == ["Master"]


def test_the_sites_environment(recipe: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    site = tmp_path / "site.env"
    site.write_text("NCCL_IB_HCA=mlx5_0,mlx5_1\nMCORE_SWIFT_INTERFACE=eth0\nMCORE_SWIFT_SCRATCH=/tmp\n")
    _, job = printed(capsys, recipe, "--site", str(site), "--runtime.device", "cpu")
    (container,) = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment["NCCL_IB_HCA"] == "mlx5_0,mlx5_1" and environment["GLOO_SOCKET_IFNAME"] == "eth0"
    assert container["resources"] == {"limits": {}} and "securityContext" not in container


WRONG = [
    (["--gpus-per-node", "1"], "groups of tp 2 don't lie within nodes of 1 GPUs"),
    (["--nodes", "3"], "parallel"),
    (["--schedule.global_batch_size", "6", "--nodes", "8"], "global_batch_size"),
    (["--name", "Mine_1"], "--name: found 'Mine_1'; it must be small letters"),
    (["--name", "x" * 41], "at most 40"),
    (["--rdma", "rdma/ib"], "--rdma: found 'rdma/ib'"),
    (["--shared-memory", "64GB"], "--shared-memory: found '64GB'"),
    (["--node-selector", "gpu"], "--node-selector: found 'gpu'; it must be KEY=VALUE"),
    (["--run", "/elsewhere/run"], "--run: /elsewhere/run is not inside the shared volume, --mount /shared"),
    (["--claim", ""], "--claim is needed"),
    (["--image", ""], "--image is needed (or MCORE_SWIFT_IMAGE in site.env)"),
]


@pytest.mark.parametrize(("more", "message"), WRONG, ids=[row[0][0] for row in WRONG])
def test_wrong_options(recipe: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str) -> None:
    assert main(words(recipe, *more)) == 2
    output = capsys.readouterr()
    assert message in output.err and output.err.count("error:") == 1 and not output.out


def test_nothing_is_applied(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word for word in words(recipe) if word != "--print"]) == 2
    assert "it prints only, with --print" in capsys.readouterr().err


# --- the pods ---------------------------------------------------------------------------------------------------------

HOSTS = ["run-node-0-0.run", "run-node-0-1.run"]
QUICK = """
import sys
from launch.kubernetes import pod
pod.LOOK_SECONDS, pod.SAY_SECONDS, pod.GONE_SECONDS = 0.05, 0.2, 3.0
sys.exit(pod.main())
"""


class Cluster:
    """Two pods of one rank each, as processes."""

    def __init__(self, folder: Path, plan: dict[str, Any], *, steps: int = 6) -> None:
        self.run, self.files = folder / "run", folder / "files"
        self.run.mkdir()
        self.files.mkdir()
        (self.run / "plan.json").write_text(json.dumps(plan))
        job = Job(
            id="one",
            nodes=2,
            command=[sys.executable, "-c", RANK, str(self.run)],
            environment={"TOGETHER": TOGETHER, "STEPS": str(steps)},
            grace_seconds=0.5,
            backoff_seconds=0.1,
        )
        (self.files / "recipe.yaml").write_text("model: {path: there}\n")
        (self.files / "job.json").write_text(json.dumps(asdict(job)))
        (self.files / "hosts.json").write_text(json.dumps(HOSTS))
        self.pods = [self.start(0), self.start(1)]

    def start(self, index: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", QUICK, "--run", str(self.run), "--files", str(self.files)]
        return subprocess.Popen(
            [*command, "--address", "127.0.0.1"],
            env={**os.environ, "JOB_COMPLETION_INDEX": str(index)},
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def lose(self, index: int) -> None:
        os.killpg(self.pods[index].pid, signal.SIGKILL)
        self.pods[index].wait()

    def codes(self) -> list[int]:
        return [pod.wait(60) for pod in self.pods]

    def outcomes(self) -> list[tuple[str, str]]:
        return [(verdict["outcome"], verdict["cause"]) for verdict in RunFolder(self.run).verdicts()]

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 60
        while not list(self.run.glob(name)):
            assert time.monotonic() < deadline, f"{name} never came"
            time.sleep(0.02)

    def end(self) -> None:
        for pod in self.pods:
            if pod.poll() is None:
                os.killpg(pod.pid, signal.SIGKILL)
            pod.wait()


@pytest.fixture
def cluster(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, **request.param)
    yield cluster
    cluster.end()
    assert_no_orphans(cluster.run)


CRASH = {"plan": {"1": {"rank": 1, "at": 3, "do": "crash"}}}


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [CRASH], indirect=True)
def test_a_rank_crashes_and_the_run_goes_on(cluster: Cluster) -> None:
    assert cluster.codes() == [0, 0]
    assert [outcome for outcome, _ in cluster.outcomes()] == ["failed", "done"]
    started = sorted((attempt, rank) for _, attempt, rank, _, _ in rank_starts(cluster.run))
    assert started == [(1, 0), (1, 1), (2, 0), (2, 1)]


@pytest.mark.nightly
@pytest.mark.parametrize("cluster", [{"plan": {}, "steps": 60}], indirect=True)
@pytest.mark.parametrize("index", [1, 0])
def test_a_pod_is_lost_and_replaced(cluster: Cluster, index: int) -> None:
    cluster.wait_for("checkpoints/step-00000004")
    cluster.lose(index)
    cluster.pods[index] = cluster.start(index)
    assert cluster.codes() == [0, 0]
    assert cluster.outcomes()[0][0] == "failed" and cluster.outcomes()[-1][0] == "done"
    assert len(cluster.outcomes()) <= 3


WRONG_INPUT = {"plan": {"1": {"rank": 0, "at": 1, "do": "exit 2"}}}
NEVER = {"plan": {"1": {"rank": 1, "at": 1, "do": "exit 93"}}}


@pytest.mark.nightly
@pytest.mark.parametrize(("cluster", "code"), [(WRONG_INPUT, 2), (NEVER, 93)], indirect=["cluster"])
def test_final_codes_are_every_pods(cluster: Cluster, code: int) -> None:
    assert cluster.codes() == [code, code] and len(cluster.outcomes()) == 1


@pytest.mark.nightly
@pytest.mark.parametrize("cluster", [{"plan": {}, "steps": 60}], indirect=True)
def test_a_pod_is_asked_to_go(cluster: Cluster) -> None:
    """All ranks save and stop; its successor and the others go on from there."""
    cluster.wait_for("checkpoints/step-00000004")
    cluster.pods[1].send_signal(signal.SIGTERM)
    assert cluster.pods[1].wait(60) == 75
    cluster.pods[1] = cluster.start(1)
    assert cluster.codes() == [0, 0]
    assert [outcome for outcome, _ in cluster.outcomes()] == ["stopped", "done"]


def test_another_recipes_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    from launch.kubernetes import pod

    (tmp_path / "hosts.json").write_text(json.dumps(HOSTS))
    (tmp_path / "recipe.yaml").write_text("a\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("b\n")
    here = ["--run", str(tmp_path / "run"), "--files", str(tmp_path), "--address", "127.0.0.1"]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    monkeypatch.delenv("RANK", raising=False)
    try:
        assert pod.main(here) == 2
        assert "this is no pod" in capsys.readouterr().out
        monkeypatch.setenv("RANK", "0")
        assert pod.main(here) == 2
        assert re.search(r"run: it holds a run of another recipe", capsys.readouterr().out)
        monkeypatch.setenv("JOB_COMPLETION_INDEX", "2")
        assert pod.main(here) == 2
        assert "it has 2 hosts, this is pod 2" in capsys.readouterr().out
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
