"""The run's own copy of the code, and a record of what it ran with: a queued job must not change with the checkout."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
from importlib import metadata
from io import BytesIO
from pathlib import Path
from typing import Any

from launch.agent.job import write_json

ROOT = Path(__file__).parents[2]
PACKAGES = ("mcore_swift", "launch", "ckpt_tools", "perf")
# Variables whose values belong in a record; others may hold secrets.
RECORDED = re.compile(r"(NCCL|UCX|GLOO|TORCH|NVTE|CUDA|OMP|SLURM|SBATCH|MCORE_SWIFT)_")


def snapshot_code(destination: Path) -> dict[str, Any]:
    """Copies the project's packages into `destination`; returns what is known of their version.

    From git, changes to tracked files included, where this is a checkout; else the installed packages.
    """
    destination.mkdir(parents=True)
    commit = _git("rev-parse", "HEAD") if _git("rev-parse", "--show-toplevel") == str(ROOT) else None
    # A commit of the working tree as it stands; nothing in the checkout or its stash list changes.
    tree = _git("-c", "user.name=mcore-swift", "-c", "user.email=mcore-swift", "stash", "create")
    if commit is None or tree is None:
        for package in PACKAGES:
            shutil.copytree(ROOT / package, destination / package, ignore=shutil.ignore_patterns("__pycache__"))
        return {"version": metadata.version("mcore-swift")}
    command = ["git", "archive", "--format=tar", tree or commit, *PACKAGES]
    archive = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        tar.extractall(destination, filter="data")
    return {"commit": commit, "changes": (_git("status", "--porcelain", "--", *PACKAGES) or "").splitlines()}


def record_environment(path: Path, code: dict[str, Any]) -> None:
    """Writes what the run was started with: code, command, Python, packages, the variables that steer libraries."""
    packages = {dist.metadata["Name"]: dist.version for dist in metadata.distributions()}
    write_json(
        path,
        {
            "code": code,
            "command": sys.argv,
            "folder": os.getcwd(),
            "host": platform.node(),
            "user": os.environ.get("USER", ""),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "python": sys.version,
            "variables": {name: value for name, value in sorted(os.environ.items()) if RECORDED.match(name)},
            "packages": dict(sorted(packages.items())),
        },
    )


def _git(*words: str) -> str | None:
    """A git command's output in the checkout; None where it fails."""
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
