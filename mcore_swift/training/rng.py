"""All random states of a rank: Python's, NumPy's, torch's, and Megatron's CUDA RNG tracker (dropout in TP regions)."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def get_states() -> dict[str, Any]:
    """A copy of every state, as tensors and plain values, so that `torch.load(weights_only=True)` reads it."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # type: ignore[misc]
    return {
        "python": random.getstate(),
        "numpy": (str(name), torch.tensor(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),  # the CPU platform answers with torch's own
        "tracker": {key: state.clone() for key, state in _tracker().get_states().items()},
    }


def set_states(states: dict[str, Any]) -> None:
    """Puts back what `get_states` returned."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["device"])
    _tracker().set_states(states["tracker"])


def reseed(seed: int, step: int) -> None:
    """New states from (seed, step): for a run that goes on at another layout, where the saved ones have no owner."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    number = int(np.random.SeedSequence([seed, step]).generate_state(1)[0]) >> 1
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
    model_parallel_cuda_manual_seed(number)


def _tracker() -> Any:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    return get_cuda_rng_tracker()
