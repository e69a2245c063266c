"""The words of `mcore-swift launch slurm`; imports nothing that takes time."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Count = Callable[[str], float]


def add_slurm(parser: argparse.ArgumentParser, *, count: Count, natural: Count) -> None:
    parser.usage = "%(prog)s RECIPE [--section.key VALUE ...] [--nodes N] [--dry-run] ..."
    parser.description = (
        "Checks the recipe against the nodes, makes the run's folder (code, recipe, environment, batch script) and"
        " submits it. slurm/README.md takes you from the login node to a running job."
    )
    _add_nodes(parser, count)
    parser.add_argument("--spares", metavar="N", type=natural, default=0, help="nodes that take a bad one's place")
    parser.add_argument("--time", metavar="LIMIT", help="as sbatch takes it; default: the partition's")
    parser.add_argument("--no-requeue", dest="requeue", action="store_false", help="end instead of queueing again")
    parser.add_argument("--array", metavar="TASKS", help="0-3%%1: a chain of jobs; with --sweep: which tasks to run")
    parser.add_argument(
        "--sweep", metavar="KEY=LIST", action="append", default=[], help="a value of KEY for each task of an array"
    )
    parser.add_argument("--dependency", metavar="WHAT", help="as sbatch takes it: afterok:JOB, singleton")
    parser.add_argument("--name", metavar="NAME", help="of the job; default: the recipe's")
    parser.add_argument("--site", metavar="FILE", type=Path, help="default: slurm/site.env of the checkout")
    add_recovery(parser, count=count, natural=natural)
    parser.add_argument("--no-preflight", action="store_true", help="don't test the nodes first")
    parser.add_argument("--here", action="store_true", help="run in this allocation (slurm/*.sh do)")
    parser.add_argument("--dry-run", action="store_true", help="print everything, ask sbatch --test-only, and stop")
    parser.set_defaults(run=_slurm)


def add_recovery(parser: argparse.ArgumentParser, *, count: Count, natural: Count) -> None:
    """What every way of launching a run that survives can be told."""
    help_text = "inside this start; default: %(default)s"
    parser.add_argument("--max-restarts", metavar="N", type=natural, default=10, help=help_text)
    help_text = "seconds in one step after which a silent rank hangs; default: 600"
    parser.add_argument("--step-timeout", metavar="S", type=count, help=help_text)
    help_text = "a step whose loss is not finite: stop, or leave its data out; default: %(default)s"
    parser.add_argument("--bad-steps", choices=["stop", "rewind"], default="stop", help=help_text)


def _slurm(*, overrides: Sequence[str] = (), **options: Any) -> int:
    from launch.slurm.verb import Options, launch

    return launch(Options(overrides=overrides, **options))


def _add_nodes(parser: argparse.ArgumentParser, count: Count) -> None:
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="YAML file")
    parser.add_argument("--nodes", metavar="N", type=count, help="default: as few as hold the layout")
    parser.add_argument("--gpus-per-node", metavar="N", type=count, help="ranks a node; default: site.env's, or 8")
    parser.add_argument("--fast-domain", metavar="N", type=count, help="GPUs that fast links join; default: a node's")
    parser.add_argument("--run", dest="run_folder", metavar="DIR", type=Path, help="default: runs/NAME-TIME")
