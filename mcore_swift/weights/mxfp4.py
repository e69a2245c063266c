"""MXFP4, as the hub's gpt-oss folders hold their experts: `NAME_blocks` and `NAME_scales` in place of `NAME`.

A block is 32 numbers of 4 bits in 16 bytes, a scale its exponent: E2M1 and E8M0 of the Open Compute Project's
Microscaling Formats 1.0, sections 5.3.3 and 5.4.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mcore_swift.errors import InputError
from mcore_swift.weights.coverage import Spec
from mcore_swift.weights.safetensors_io import TensorSpec

if TYPE_CHECKING:
    import torch

BLOCKS, SCALES = "_blocks", "_scales"
BLOCK = 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the three lower bits; the highest is the sign


def decode_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Blocks uint8 [rows, n, 16] with scales uint8 [rows, n] → bf16 [rows, 32 · n]. The lower four bits come first."""
    import torch

    values = torch.tensor([*E2M1, *(-value for value in E2M1)])
    numbers = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    wide = torch.ldexp(values[numbers.int()], scales.int()[..., None] - 127)
    wide.masked_fill_(scales[..., None] == 255, torch.nan)  # what that exponent stands for
    return wide.to(torch.bfloat16).flatten(-2)


def decoded_specs(found: Mapping[str, Spec], folder: Path) -> dict[str, TensorSpec]:
    """The folder's MXFP4 tensors as transformers decodes them: bf16 [experts, columns, rows]. From headers alone.

    Raises InputError naming a tensor without its scales, or whose shape or dtype is not the format's.
    """
    specs = {}
    for name in [name.removesuffix(BLOCKS) for name in found if name.endswith(BLOCKS)]:
        blocks, scales = found[name + BLOCKS], found.get(name + SCALES)
        if scales is None:
            raise InputError(f"{folder}: {name}{BLOCKS} has no {name}{SCALES} with its scales")
        shape = tuple(blocks.shape)
        fits = len(shape) == 4 and shape[-1] == BLOCK // 2 and tuple(scales.shape) == shape[:-1]
        if not fits or {blocks.dtype, scales.dtype} != {"U8"}:
            raise InputError(
                f"{folder}: {name}{BLOCKS} is {blocks.dtype} {list(shape)} and its scales {scales.dtype}"
                f" {list(scales.shape)}; needed are U8 [experts, rows, n, {BLOCK // 2}] and U8 [experts, rows, n]"
            )
        specs[name] = TensorSpec("BF16", (shape[0], shape[2] * BLOCK, shape[1]))
    return specs
