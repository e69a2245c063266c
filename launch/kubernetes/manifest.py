"""The Kubernetes objects of a run: a ConfigMap with its files, and a JobSet or PyTorchJob with a pod a node.

Recovery is the supervisor's and the agents' (launch/kubernetes/pod.py). Kubernetes only replaces pods that are lost,
and ends the job when a pod says that starting again is of no use: exit codes 1, 2 and 93.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mcore_swift.errors import EXIT_FAILED, EXIT_INPUT, EXIT_NEVER_RESTART, EXIT_TRY_AGAIN, InputError

FILES = "/etc/mcore-swift"  # where a pod finds the ConfigMap
CONTAINER = "pytorch"  # the training operator insists on this name
REPLACED_PODS = 50  # before the job fails, those lost to the cluster's own doing not counted
STOP_SECONDS = 960  # for the step under way and a checkpoint when a pod is asked to go; above job.json's stop_seconds
OPERATOR_RETRIES = 203  # the training operator starts codes from 128 on again, and takes lower ones for failures
_NAME = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_SIZE = re.compile(r"[1-9]\d*(Mi|Gi|Ti)")
_LABEL = re.compile(r"([a-z0-9.-]+/)?[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?=[A-Za-z0-9_.-]*")
_DEVICE = re.compile(r"([a-z0-9.-]+/[A-Za-z0-9_.-]+)=([1-9]\d*)")
_LONGEST_NAME = 40  # a pod's host name has a suffix, and 63 letters at most


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of Kubernetes. Raises InputError for what its API would refuse, with the option at fault."""

    name: str
    run: Path
    nodes: int
    spares: int
    gpus_per_node: int
    image: str
    claim: str
    mount: Path
    on_cpu: bool = False  # the ranks need no GPUs
    python: str = "python"
    namespace: str | None = None
    queue: str | None = None
    shared_memory: str = "64Gi"
    host_network: bool = False
    rdma: str | None = None
    node_selector: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        letters = f"small letters, digits and -, a letter first, at most {_LONGEST_NAME}"
        device = "a device plugin's name and a number, such as rdma/ib=8"
        checks = (
            ("--name", self.name, _NAME, letters),
            ("--namespace", self.namespace, _NAME, letters),
            ("--claim", self.claim, re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?"), "small letters, digits, - and ."),
            ("--queue", self.queue, re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?"), "small letters, digits, - and ."),
            ("--image", self.image, re.compile(r"\S+"), "an image's name"),
            ("--shared-memory", self.shared_memory, _SIZE, "a number and Mi, Gi or Ti"),
            ("--rdma", self.rdma, _DEVICE, device),
            *(("--node-selector", label, _LABEL, "KEY=VALUE") for label in self.node_selector),
        )
        for option, value, pattern, allowed in checks:
            if value is not None and not pattern.fullmatch(value):
                raise InputError(f"{option}: found {value!r}; it must be {allowed}")
        if len(self.name) > _LONGEST_NAME:
            raise InputError(f"--name: found {self.name!r}; it must be {letters}")
        if not self.mount.is_absolute() or not self.run.is_relative_to(self.mount) or self.run == self.mount:
            raise InputError(f"--run: {self.run} is not inside the shared volume, --mount {self.mount}")

    @property
    def pods(self) -> int:
        return self.nodes + self.spares


@dataclass(frozen=True)
class Kind:
    """A way to have a pod a node: the pods' names on the network, in the order of their indices, and the object."""

    hosts: Callable[[Request], list[str]]
    render: Callable[[Request], dict[str, Any]]


def documents(kind: str, request: Request, *, recipe: str, job: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The objects to apply, in order. `recipe`, `job`: the contents of recipe.yaml and job.json."""
    chosen = KINDS[kind]
    files = {
        "recipe.yaml": recipe,
        "job.json": json.dumps(job, indent=1),
        "hosts.json": json.dumps(chosen.hosts(request), indent=1),
    }
    if sum(map(len, files.values())) > 2**20 - 2**14:
        raise InputError(f"launch kubernetes: recipe and hosts have more than a ConfigMap's MiB ({request.pods} pods)")
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(request, _config_name(request))}
    return [{**config, "data": files}, chosen.render(request)]


def _config_name(request: Request) -> str:
    return f"{request.name}-files"


def _metadata(request: Request, name: str, labels: Mapping[str, str] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name}
    if request.namespace is not None:
        found["namespace"] = request.namespace
    return found | ({"labels": dict(labels)} if labels else {})


def _job_metadata(request: Request) -> dict[str, Any]:
    labels = {"app.kubernetes.io/managed-by": "mcore-swift"}
    if request.queue is not None:
        labels["kueue.x-k8s.io/queue-name"] = request.queue
    return _metadata(request, request.name, labels)


# --- the pod ----------------------------------------------------------------------------------------------------------


def pod_template(request: Request, *words: str) -> dict[str, Any]:
    """A node's pod. `words`: added to its command."""
    spec: dict[str, Any] = {
        "terminationGracePeriodSeconds": STOP_SECONDS,
        "containers": [_container(request, words)],
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": request.claim}},
            # Data loaders and NCCL share memory between a pod's processes; a pod gets 64 MiB of it otherwise.
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": request.shared_memory}},
            {"name": "files", "configMap": {"name": _config_name(request)}},
        ],
    }
    if request.host_network:
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}  # with the pods' names still known
    if request.node_selector:
        spec["nodeSelector"] = dict(label.split("=", 1) for label in request.node_selector)
    return {"metadata": {"labels": {"app.kubernetes.io/managed-by": "mcore-swift"}}, "spec": spec}


def _container(request: Request, words: tuple[str, ...]) -> dict[str, Any]:
    command = [request.python, "-m", "launch.kubernetes.pod", "--run", str(request.run), "--files", FILES, *words]
    limits: dict[str, Any] = {} if request.on_cpu else {"nvidia.com/gpu": request.gpus_per_node}
    found: dict[str, Any] = {"name": CONTAINER, "image": request.image, "command": command}
    if request.rdma is not None:
        match = _DEVICE.fullmatch(request.rdma)
        assert match is not None
        limits[match[1]] = int(match[2])
    if request.rdma is not None or request.host_network:
        found["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}  # InfiniBand's buffers are locked memory
    return found | {
        "env": [{"name": name, "value": value} for name, value in sorted(request.environment.items())],
        "resources": {"limits": limits},
        "volumeMounts": [
            {"name": "shared", "mountPath": str(request.mount)},
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "files", "mountPath": FILES, "readOnly": True},
        ],
    }


# --- JobSet: jobset.x-k8s.io/v1alpha2 ---------------------------------------------------------------------------------


def _jobset_hosts(request: Request) -> list[str]:
    return [f"{request.name}-node-0-{index}.{request.name}" for index in range(request.pods)]


def _jobset(request: Request) -> dict[str, Any]:
    template = pod_template(request)
    template["spec"]["restartPolicy"] = "Never"  # what podFailurePolicy asks for
    final = {"containerName": CONTAINER, "operator": "In", "values": [EXIT_FAILED, EXIT_INPUT, EXIT_NEVER_RESTART]}
    again = {"containerName": CONTAINER, "operator": "In", "values": [EXIT_TRY_AGAIN]}
    rules = [
        {"action": "FailJob", "onExitCodes": final},
        {"action": "Ignore", "onExitCodes": again},
        # Preempted, evicted, its node drained or gone. (A JobSet's API server wants the status spelled out.)
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    job = {
        "completionMode": "Indexed",
        "completions": request.pods,
        "parallelism": request.pods,
        "backoffLimit": REPLACED_PODS,
        "podFailurePolicy": {"rules": rules},
        "template": template,
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _job_metadata(request),
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": request.name, "publishNotReadyAddresses": True},
            "successPolicy": {"operator": "All"},
            "failurePolicy": {"maxRestarts": 0},
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": job}}],
        },
    }


# --- PyTorchJob: kubeflow.org/v1, of the training operator before Trainer v2 ------------------------------------------


def _pytorchjob_hosts(request: Request) -> list[str]:
    return [f"{request.name}-master-0", *(f"{request.name}-worker-{index}" for index in range(request.pods - 1))]


def _pytorchjob(request: Request) -> dict[str, Any]:
    # ExitCode: codes below 128 end the job, those above, and a lost pod, are tried again.
    template = pod_template(request, "--again-code", str(OPERATOR_RETRIES))
    replicas: dict[str, Any] = {"Master": {"replicas": 1, "restartPolicy": "ExitCode", "template": template}}
    if request.pods > 1:
        replicas["Worker"] = {"replicas": request.pods - 1, "restartPolicy": "ExitCode", "template": template}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": _job_metadata(request),
        "spec": {
            "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": REPLACED_PODS},
            "pytorchReplicaSpecs": replicas,
        },
    }


KINDS = {"jobset": Kind(_jobset_hosts, _jobset), "pytorchjob": Kind(_pytorchjob_hosts, _pytorchjob)}
