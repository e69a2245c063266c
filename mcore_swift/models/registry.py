"""The families: adding one is a file of its own, a test, and a line here."""

from __future__ import annotations

import importlib.metadata

from mcore_swift.errors import InputError, nearest
from mcore_swift.models.deepseek_v2 import DEEPSEEK_V2
from mcore_swift.models.deepseek_v3 import DEEPSEEK_V3
from mcore_swift.models.family import Family
from mcore_swift.models.gemma2 import GEMMA2
from mcore_swift.models.gemma3 import GEMMA3
from mcore_swift.models.glm4_moe import GLM4_MOE
from mcore_swift.models.gpt_oss import GPT_OSS
from mcore_swift.models.llama import LLAMA
from mcore_swift.models.mistral import MISTRAL
from mcore_swift.models.mixtral import MIXTRAL
from mcore_swift.models.qwen2 import QWEN2
from mcore_swift.models.qwen2_moe import QWEN2_MOE
from mcore_swift.models.qwen3 import QWEN3
from mcore_swift.models.qwen3_moe import QWEN3_MOE

FAMILIES: dict[str, Family] = {
    model_type: family
    for family in (
        DEEPSEEK_V2,
        DEEPSEEK_V3,
        GEMMA2,
        GEMMA3,
        GLM4_MOE,
        GPT_OSS,
        LLAMA,
        MISTRAL,
        MIXTRAL,
        QWEN2,
        QWEN2_MOE,
        QWEN3,
        QWEN3_MOE,
    )
    for model_type in family.model_types
}

# Model types that could be taken for a family, and aren't: why, and what is needed instead.
NOT_SERVED = {
    "gemma3": "is a language model with a vision tower, which would be lost; needed is the language model alone, saved"
    " as gemma3_text (mcore_swift/models/gemma3.py says how)",
}


def family_of(model_type: str, *, source: str) -> Family:
    """The family that serves `model_type`, its package versions checked.

    Raises InputError naming `source` (the config's path) for an unknown family or a package that is too old for it.
    """
    if model_type in NOT_SERVED:
        raise InputError(f"{source}: model_type {model_type!r} {NOT_SERVED[model_type]}")
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise InputError(
            f"{source}: model_type {model_type!r} is not a known family; known: {known}."
            f"{nearest(model_type, list(FAMILIES))}"
        )
    family = FAMILIES[model_type]
    for package, least in family.requires.items():
        have = importlib.metadata.version(package)
        if _version(have) < _version(least):
            raise InputError(f"{source}: {family.name} needs {package} ≥ {least}, but {have} is installed")
    return family


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:3] if part.isdigit())
