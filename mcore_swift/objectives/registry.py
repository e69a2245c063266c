"""The objectives by their recipe name: adding one is a file of its own, a test, and a line here.

What each reads of the recipe's section, and its defaults, are in `recipe_checks/objective.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from mcore_swift.objectives.cpo import cpo, simpo
from mcore_swift.objectives.distill import distill
from mcore_swift.objectives.dpo import dpo, shorten
from mcore_swift.objectives.kto import kto
from mcore_swift.objectives.objective import Objective
from mcore_swift.objectives.orpo import orpo
from mcore_swift.objectives.reward import rm
from mcore_swift.objectives.sft import sft
from mcore_swift.recipe import ObjectiveSection
from mcore_swift.recipe_checks.objective import filled, losses_of

OBJECTIVES: dict[str, Objective] = {
    "sft": Objective(sft, "labels"),
    "dpo": Objective(dpo, "pairs", reference=True, weigh=shorten),
    "cpo": Objective(cpo, "pairs"),
    "simpo": Objective(simpo, "pairs"),
    "orpo": Objective(orpo, "pairs"),
    "kto": Objective(kto, "answers", reference=True, divergence=True),
    "rm": Objective(rm, "pairs", scored=True),
    "distill": Objective(distill, "labels"),
}
# Losses that sort the global batch.
MATCHING: dict[str, Literal["pairs", "answers"]] = {"aot": "pairs", "aot_unpaired": "answers"}


def build_objective(section: ObjectiveSection) -> Objective:
    """The recipe's objective with its options, those that it leaves open filled in."""
    found = replace(OBJECTIVES[section.name], options=filled(section))
    matching = [kind for loss, kind in MATCHING.items() if loss in losses_of(found.options)]
    divergence = found.divergence and found.options.loss != "apo_zero_unpaired"
    return replace(found, divergence=divergence, matching=matching[0] if matching else None)
