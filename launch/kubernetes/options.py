"""The words of `mcore-swift launch kubernetes`; imports nothing that takes time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.slurm.options import Count, add_recovery

KINDS = ("jobset", "pytorchjob")


def add_kubernetes(parser: argparse.ArgumentParser, *, count: Count, natural: Count) -> None:
    parser.usage = "%(prog)s RECIPE --print --claim NAME [--section.key VALUE ...] [--nodes N] ..."
    parser.description = (
        "Checks the recipe against the nodes and prints a manifest for kubectl apply: a pod a node, each with the agent"
        " that `launch slurm` uses. Paths of the recipe are those that pods see: mount the shared volume at the same"
        " place here."
    )
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="YAML file")
    parser.add_argument("--print", dest="shown", action="store_true", help="print YAML; nothing is applied")
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0], help="default: %(default)s")
    nodes = parser.add_argument_group("nodes")
    nodes.add_argument("--nodes", metavar="N", type=count, help="default: as few as hold the layout")
    nodes.add_argument("--gpus-per-node", metavar="N", type=count, help="ranks a node; default: site.env's, or 8")
    nodes.add_argument("--fast-domain", metavar="N", type=count, help="GPUs that fast links join; default: a node's")
    nodes.add_argument("--spares", metavar="N", type=natural, default=0, help="nodes that take a bad one's place")
    nodes.add_argument("--node-selector", metavar="KEY=VALUE", action="append", default=[], help="labels of the nodes")
    nodes.add_argument("--host-network", action="store_true", help="pods use the node's network, InfiniBand too")
    nodes.add_argument("--rdma", metavar="NAME=N", help="devices of a pod, as a plugin names them: rdma/ib=8")
    pods = parser.add_argument_group("pods")
    pods.add_argument("--image", metavar="IMAGE", help="holds this project and its environment; default: site.env's")
    pods.add_argument("--python", metavar="PATH", default="python", help="in the image; default: %(default)s")
    pods.add_argument("--claim", metavar="NAME", help="of the PersistentVolumeClaim that all nodes share")
    pods.add_argument("--mount", metavar="DIR", type=Path, default=Path("/shared"), help="of it; default: %(default)s")
    help_text = "default: runs/NAME in the shared volume"
    pods.add_argument("--run", dest="run_folder", metavar="DIR", type=Path, help=help_text)
    pods.add_argument("--shared-memory", metavar="SIZE", default="64Gi", help="of /dev/shm; default: %(default)s")
    pods.add_argument("--name", metavar="NAME", help="of the job; default: the recipe's")
    pods.add_argument("--namespace", metavar="NAME", help="default: kubectl's")
    pods.add_argument("--queue", metavar="NAME", help="of Kueue")
    pods.add_argument("--site", metavar="FILE", type=Path, help="default: slurm/site.env of the checkout")
    add_recovery(parser, count=count, natural=natural)
    parser.set_defaults(run=_kubernetes)


def _kubernetes(*, overrides: Sequence[str] = (), **options: Any) -> int:
    from launch.kubernetes.verb import Options, launch

    return launch(Options(overrides=overrides, **options))
