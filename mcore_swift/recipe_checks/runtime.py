"""Rules about number formats, memory against time, and the hardware."""

from __future__ import annotations

from mcore_swift.recipe import Recipe
from mcore_swift.recipe_checks.table import Row

# Of TransformerConfig.recompute_modules (megatron-core 0.19.2), those that are tested here at every layout.
RECOMPUTE_MODULES = ("core_attn", "mlp")

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
        "runtime.recompute_modules",
        "others than " + ", ".join(RECOMPUTE_MODULES),
        lambda r: set(r.runtime.recompute_modules) - set(RECOMPUTE_MODULES),
        "found {r.runtime.recompute_modules}",
        "allowed: " + ", ".join(RECOMPUTE_MODULES),
    ),
    Row(
        "runtime.recompute_modules",
        "empty, with runtime.recompute: selective",
        lambda r: r.runtime.recompute == "selective" and not r.runtime.recompute_modules,
        "it is empty, but runtime.recompute is selective",
        "name one of " + ", ".join(RECOMPUTE_MODULES),
    ),
    Row(
        "runtime.recompute_modules",
        "any, with another runtime.recompute than selective",
        lambda r: r.runtime.recompute != "selective" and r.runtime.recompute_modules != ["core_attn"],
        "they are used by runtime.recompute: selective only, found {r.runtime.recompute}",
        "leave them out",
    ),
    Row(
        "runtime.recompute_layers",
        "any, with another runtime.recompute than full",
        lambda r: r.runtime.recompute != "full" and r.runtime.recompute_layers != 1,
        "it is used by runtime.recompute: full only, found {r.runtime.recompute}",
        "leave it out",
    ),
    Row(
        "runtime.profile_steps",
        "any, without checkpoint.dir",
        lambda r: r.runtime.profile_steps and r.checkpoint.dir is None,
        "traces are written into checkpoint.dir",
        "set it",
    ),
]
