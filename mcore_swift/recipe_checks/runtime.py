"""Rules about number formats and the hardware."""

from __future__ import annotations

from mcore_swift.recipe import Recipe
from mcore_swift.recipe_checks.table import Row

RUNTIME: list[Row[Recipe]] = [
    Row(
        "precision.fp8",
        "any, with precision.dtype: fp32",
        lambda r: r.precision.fp8 and r.precision.dtype == "fp32",
        "{r.precision.fp8} needs precision.dtype: bf16 or auto, found fp32",
        "change one of them",
    ),
    Row(
        "precision.fp8",
        "any, with runtime.device: cpu",
        lambda r: r.precision.fp8 and r.runtime.device == "cpu",
        "{r.precision.fp8} needs a GPU, found runtime.device: cpu",
        "leave precision.fp8 out",
    ),
    Row(
        "precision.fp8_format",
        "e4m3, without precision.fp8",
        lambda r: r.precision.fp8_format != "hybrid" and not r.precision.fp8,
        "{r.precision.fp8_format} does nothing without precision.fp8",
        "set precision.fp8, or leave it out",
    ),
    Row(
        "runtime.profile_steps",
        "any, without checkpoint.dir",
        lambda r: r.runtime.profile_steps and r.checkpoint.dir is None,
        "traces are written into checkpoint.dir",
        "set it",
    ),
]
