"""Log-probabilities of a data set's answers under a policy that stays as it is: computed once, kept on disk.

An entry is known by the policy's content, and by the tokens of all answers, which the data, the tokenizer and its
template decide: so a change of any of them makes a new entry, and an old one is never used by mistake. Packing, order,
batch sizes and layout are no part of it. Entries appear complete or not at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from mcore_swift.data.batch import MicroBatch
from mcore_swift.data.cache import locked, new_folder
from mcore_swift.data.loader import JudgedSamples
from mcore_swift.data.map_loader import hash_of
from mcore_swift.data.sources import content_key
from mcore_swift.errors import InputError

VERSION = 1  # of an entry's content
FILE = "ref_logps.npy"
log = logging.getLogger(__name__)

# This rank's whole micro-batches of a global batch to float32 [n] of each, Σ log p of each answer's labels; [] on a
# rank that doesn't know them. Collective.
Compute = Callable[[list[MicroBatch]], Sequence[Tensor]]
# The elementwise maximum over all ranks of the job. Collective.
Merge = Callable[[np.ndarray], np.ndarray]


def model_key(folder: Path, *more: object) -> str:
    """Names a policy by its folder's content; `more`: what else decides its log-probabilities, such as the precision.

    Files beyond 1 GiB are known by path, size and date instead of their bytes.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    parts = [[str(file.relative_to(folder)), content_key(file)] for file in files]
    return hashlib.sha256(json.dumps([parts, more], default=str).encode()).hexdigest()


def add_ref_logps(samples: JudgedSamples, *, model: str, compute: Compute, merge: Merge, cache_dir: Path) -> bool:
    """From now on the samples' micro-batches hold `Sequences.ref_logps`. Returns whether they were in the cache.

    model: `model_key`. All ranks call it, with the same data; if one of them finds no entry, all compute. Raises
    InputError: an answer whose log-probability isn't finite (its row), an unwritable cache, an entry that is broken.
    """
    made = samples.samples
    begin = time.perf_counter()
    folder = cache_dir / "reference" / hash_of([VERSION, model, made.content_key()])
    known = not merge(np.array([not folder.is_dir()], dtype=np.float64))[0]
    if not known:
        found = merge(_computed(samples, compute))
        bad = np.unique(made.numbers[~np.isfinite(found).all(axis=1)])
        if len(bad):
            names = ", ".join(samples.row_name(int(row)) for row in bad[:5])
            raise InputError(f"{names}: the reference's log-probability is not finite ({len(bad)} such rows)")
        with locked(folder):
            if not folder.is_dir():
                with new_folder(folder) as scratch:
                    np.save(scratch / FILE, found.astype(np.float32))
    else:
        log.info("log-probabilities of the reference reused: %s", folder)
    seconds = 0.0 if known else time.perf_counter() - begin
    samples.use_ref_logps(_read(folder / FILE, made.pieces.prompts.shape), seconds=seconds)
    return known


def _computed(samples: JudgedSamples, compute: Compute) -> np.ndarray:
    """float64 [units, answers], −inf for what other ranks compute."""
    made, shape = samples.samples, samples.shape
    found = np.full(made.pieces.prompts.shape, -np.inf)
    for first in range(0, len(made), shape.global_batch_size):
        slots = [[n if (n := first + slot) < len(made) else None for slot in slots] for slots in shape.slots()]
        logps = compute([samples.micro_batch(numbers) for numbers in slots])
        for numbers, answers in zip(slots, logps, strict=False):
            units = [unit for number in numbers if number is not None for unit in made.units(number).tolist()]
            found[units] = answers.detach().double().cpu().numpy().reshape(len(units), made.answers)
    return found


def _read(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        found = np.load(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: this entry of the cache can't be read ({error}); remove its folder") from error
    if found.shape != shape or found.dtype != np.float32:
        raise InputError(f"{file}: this entry of the cache is {found.dtype} {found.shape}; remove its folder")
    return found
