"""site.env: what is true of a cluster and of no recipe: partition, account, network, container, scratch.

The file is shell (`NAME=value` lines, `#` comments), because scripts source it; it is read here without a shell, so a
line that would need one is refused. Names that are not listed below and look like a library's own (NCCL_…, UCX_…) are
exported to every rank.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mcore_swift.errors import InputError, nearest

ROOT = Path(__file__).parents[2]
DEFAULT = ROOT / "slurm" / "site.env"

# sbatch reads these itself from the environment; a written script gets them as #SBATCH lines.
SBATCH = {"SBATCH_PARTITION": "partition", "SBATCH_ACCOUNT": "account", "SBATCH_QOS": "qos"}
SBATCH |= {"SBATCH_RESERVATION": "reservation", "SBATCH_CONSTRAINT": "constraint"}
OURS = (
    "MCORE_SWIFT_VENV",
    "MCORE_SWIFT_RUNS",
    "MCORE_SWIFT_SCRATCH",
    "MCORE_SWIFT_INTERFACE",
    "MCORE_SWIFT_CONTAINER",
    "MCORE_SWIFT_IMAGE",
    "MCORE_SWIFT_MOUNTS",
    "MCORE_SWIFT_GPUS_PER_NODE",
    "MCORE_SWIFT_GPU_MEMORY_GIB",
    "MCORE_SWIFT_FAST_DOMAIN",
    "MCORE_SWIFT_PREFLIGHT",
    "MCORE_SWIFT_CACHE",
)
CONTAINERS = ("none", "apptainer", "pyxis")
_LINE = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(.*)")
_LIBRARY = re.compile(
    r"(NCCL|UCX|FI|GLOO|TORCH|NVTE|CUDA|NVIDIA|OMP|HF|TP|IB|PYTORCH|TRITON|WANDB|LD|http|https|no)_\w+"
)


@dataclass(frozen=True)
class Site:
    """A site.env that was read."""

    values: Mapping[str, str] = field(default_factory=dict)

    def get(self, name: str, default: str = "") -> str:
        assert name in SBATCH or name in OURS, name
        return self.values.get(name, "") or default

    def number(self, name: str, default: int) -> int:
        text = self.get(name, str(default))
        if not re.fullmatch(r"[1-9]\d*", text):
            raise InputError(f"site.env: {name}: found {text!r}; it must be a whole number, at least 1")
        return int(text)

    @property
    def sbatch(self) -> dict[str, str]:
        """Options of sbatch."""
        return {option: self.values[name] for name, option in SBATCH.items() if self.values.get(name)}

    @property
    def container(self) -> str:
        return self.get("MCORE_SWIFT_CONTAINER", "none")

    @property
    def exported(self) -> dict[str, str]:
        """Variables of every rank: the libraries' as they stand, and those that follow from our own names."""
        given = {name: value for name, value in self.values.items() if name not in SBATCH and name not in OURS}
        follow: dict[str, str] = {}
        if interface := self.get("MCORE_SWIFT_INTERFACE"):
            follow |= {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface}
        if scratch := self.get("MCORE_SWIFT_SCRATCH"):
            follow |= {"TMPDIR": scratch, "TRITON_CACHE_DIR": f"{scratch}/triton"}
        if cache := self.get("MCORE_SWIFT_CACHE"):
            follow["MCORE_SWIFT_CACHE"] = cache
        return follow | given

    def wrap(self, python: str) -> tuple[list[str], list[str]]:
        """Options of srun, and the words that start a Python on a node: bare, or in the site's container."""
        image, mounts = self.get("MCORE_SWIFT_IMAGE"), self.get("MCORE_SWIFT_MOUNTS")
        if self.container == "apptainer":
            binds = [f"--bind={mount}" for mount in mounts.split(",") if mount]
            return [], ["apptainer", "exec", "--nv", *binds, image, "python"]
        if self.container == "pyxis":
            options = [f"--container-image={image}", "--no-container-remap-root", "--no-container-mount-home"]
            return options + ([f"--container-mounts={mounts}"] if mounts else []), ["python"]
        return [], [python]


def read_site(path: Path | None) -> Site:
    """Reads site.env. `path` None: what MCORE_SWIFT_SITE names, as slurm/with_site.sh does, else slurm/site.env of the
    checkout, and nothing where there is none.

    Raises InputError with the file and line of what can't be read.
    """
    named = os.environ.get("MCORE_SWIFT_SITE")
    path = path or (Path(named) if named else DEFAULT)
    if path == DEFAULT and not DEFAULT.is_file():
        return Site()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the site's file can't be read: {error}") from None
    values: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            name, value = _assignment(f"{path}:{number}", line.strip())
            values[name] = value
    site = Site(values)
    if site.container not in CONTAINERS:
        near = nearest(site.container, list(CONTAINERS))
        raise InputError(f"{path}: MCORE_SWIFT_CONTAINER: found {site.container!r}; allowed: {CONTAINERS}.{near}")
    if site.container != "none" and not site.get("MCORE_SWIFT_IMAGE"):
        raise InputError(f"{path}: MCORE_SWIFT_CONTAINER is {site.container}, so MCORE_SWIFT_IMAGE must name the image")
    return site


def _assignment(where: str, line: str) -> tuple[str, str]:
    match = _LINE.fullmatch(line)
    if match is None:
        raise InputError(f"{where}: found {line!r}; expected NAME=value")
    name, text = match.groups()
    if re.search(r"[$`]|\(", text):
        raise InputError(f"{where}: {name}: found {text!r}; write the value out, no shell reads it")
    try:
        words = shlex.split(text, comments=True)
    except ValueError as error:
        raise InputError(f"{where}: {name}: found {text!r}: {error}") from None
    if len(words) > 1:
        raise InputError(f"{where}: {name}: found {text!r}; a value with blanks needs quotes")
    if name not in SBATCH and name not in OURS and not _LIBRARY.fullmatch(name):
        raise InputError(f"{where}: unknown name {name}.{nearest(name, [*SBATCH, *OURS])}")
    return name, words[0] if words else ""
