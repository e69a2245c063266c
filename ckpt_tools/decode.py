"""Block-scaled FP8 (DeepSeek's format): a float8_e4m3 weight and `weight_scale_inv`, a scale for each 128×128 block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcore_swift.errors import InputError

if TYPE_CHECKING:
    import torch

SCALE_SUFFIX = "_scale_inv"
BLOCK = 128


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales of a weight [rows, columns]."""
    return tuple(-(-size // BLOCK) for size in shape)


def decode_fp8(values: torch.Tensor, scales: torch.Tensor, *, first_row: int = 0) -> torch.Tensor:
    """Rows [first_row, first_row + n) of a block-scaled weight, bf16 [n, columns].

    values: float8_e4m3fn [n, columns]; scales: float32, of the whole weight. The product is taken in float32 and
    rounded once.
    """
    import torch

    rows = torch.arange(first_row, first_row + values.size(0)) // BLOCK
    wide = scales.float()[rows].repeat_interleave(BLOCK, dim=1)[:, : values.size(1)]
    return (values.float() * wide).to(torch.bfloat16)


def check_block_size(raw: dict[str, object], path: object) -> None:
    """Raises InputError when config.json speaks of a quantization other than MXFP4 and 128×128 block FP8."""
    quantization = raw.get("quantization_config")
    if not isinstance(quantization, dict):
        return
    method, size = quantization.get("quant_method"), quantization.get("weight_block_size")
    if method != "mxfp4" and (method != "fp8" or list(size or ()) != [BLOCK, BLOCK]):
        raise InputError(
            f"{path}/config.json: quantization_config: quant_method {method!r} with weight_block_size {size} is not"
            f" supported; allowed: 'fp8' with [{BLOCK}, {BLOCK}], 'mxfp4', or weights that are not quantized"
        )
