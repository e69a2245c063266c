"""`mcore-swift launch kubernetes RECIPE --print`: checks a recipe against nodes, prints what Kubernetes needs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from launch.agent.job import job_of
from launch.kubernetes.manifest import Request, documents
from launch.slurm import verb as slurm
from launch.slurm.prepare import absolute
from launch.slurm.site import Site, read_site
from mcore_swift import recipe_io
from mcore_swift.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line; None: the site's file or a default decides."""

    recipe: Path
    overrides: Sequence[str] = ()
    shown: bool = False
    kind: str = "jobset"
    nodes: int | None = None
    gpus_per_node: int | None = None
    fast_domain: int | None = None
    spares: int = 0
    node_selector: Sequence[str] = ()
    host_network: bool = False
    rdma: str | None = None
    image: str | None = None
    python: str = "python"
    claim: str | None = None
    mount: Path = Path("/shared")
    run_folder: Path | None = None
    shared_memory: str = "64Gi"
    name: str | None = None
    namespace: str | None = None
    queue: str | None = None
    site: Path | None = None
    max_restarts: int = 10
    step_timeout: int | None = None
    bad_steps: str = "stop"


def launch(options: Options) -> int:
    """Prints the manifest; returns the exit code. Raises InputError for what a run would stumble over."""
    if not options.shown:
        raise InputError("launch kubernetes: it prints only, with --print; kubectl apply -f - takes the rest")
    print("---\n".join(yaml.dump(document, Dumper=_Dumper, sort_keys=False) for document in manifest(options)), end="")
    return 0


def manifest(options: Options) -> list[dict[str, Any]]:
    """The objects to apply, from a recipe that was checked as `launch slurm` checks it."""
    site = read_site(options.site)
    gpus = options.gpus_per_node or site.number("MCORE_SWIFT_GPUS_PER_NODE", 8)
    name = options.name or re.sub(r"[^a-z0-9]+", "-", options.recipe.stem.lower()).strip("-")
    run = options.run_folder or options.mount / "runs" / name
    asked = slurm.Options(
        recipe=options.recipe, overrides=options.overrides, fast_domain=options.fast_domain, site=options.site
    )
    recipe = slurm.recipe_of(asked, [], run)
    nodes = options.nodes or slurm.fewest_nodes(recipe, gpus)
    slurm.check_nodes(recipe, asked, site, nodes=nodes, gpus=gpus)
    request = Request(
        name=name,
        run=run,
        nodes=nodes,
        spares=options.spares,
        gpus_per_node=gpus,
        on_cpu=recipe.runtime.device == "cpu",
        image=_needed("--image", options.image or site.get("MCORE_SWIFT_IMAGE")),
        python=options.python,
        claim=_needed("--claim", options.claim),
        mount=options.mount,
        namespace=options.namespace,
        queue=options.queue,
        shared_memory=options.shared_memory,
        host_network=options.host_network,
        rdma=options.rdma,
        node_selector=tuple(options.node_selector),
        environment=_environment(site),
    )
    recovery = {"max_restarts": options.max_restarts, "step_timeout": options.step_timeout}
    job = job_of(nodes=nodes, ranks_per_node=gpus, spares=options.spares, bad_steps=options.bad_steps, **recovery)
    text = recipe_io.dump_recipe(absolute(recipe, run))
    job = replace(job, id=f"{name}-{job.id}")
    return documents(options.kind, request, recipe=text, job=asdict(job))


def _environment(site: Site) -> dict[str, str]:
    return {**site.exported, "PYTHONUNBUFFERED": "1"}


def _needed(option: str, value: str | None) -> str:
    if not value:
        where = " (or MCORE_SWIFT_IMAGE in site.env)" if option == "--image" else ""
        raise InputError(f"launch kubernetes: {option} is needed{where}")
    return value


class _Dumper(yaml.SafeDumper):
    """Files as blocks of lines, and no references between the parts of an object."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
