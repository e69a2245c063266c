"""What a recipe must not say: bounds of single values, and combinations that are impossible or unsafe.

Everything here is decided from the recipe alone, before a file is opened or a process group made. What also depends
on the job's ranks is in `job`, on the model in `models.layout_rules`: rows of the same kind.
"""

from __future__ import annotations

from operator import attrgetter

from mcore_swift.errors import InputError
from mcore_swift.recipe import Recipe
from mcore_swift.recipe_checks.adapter import ADAPTER
from mcore_swift.recipe_checks.bounds import BOUNDS
from mcore_swift.recipe_checks.data import DATA, SHARE_PROMPTS
from mcore_swift.recipe_checks.distill import DISTILL
from mcore_swift.recipe_checks.freezing import FREEZING
from mcore_swift.recipe_checks.galore import GALORE
from mcore_swift.recipe_checks.layout import LAYOUT
from mcore_swift.recipe_checks.levers import LEVERS
from mcore_swift.recipe_checks.lisa import LISA
from mcore_swift.recipe_checks.methods import METHODS
from mcore_swift.recipe_checks.moe import EXPERTS
from mcore_swift.recipe_checks.objective import OBJECTIVE
from mcore_swift.recipe_checks.optimizer import OPTIMIZER
from mcore_swift.recipe_checks.outputs import OUTPUTS
from mcore_swift.recipe_checks.pipeline import PIPELINE
from mcore_swift.recipe_checks.runtime import RUNTIME
from mcore_swift.recipe_checks.schedule import SCHEDULE
from mcore_swift.recipe_checks.table import Row, refuse

RECIPE_RULES: list[Row[Recipe]] = [
    *LAYOUT,
    *PIPELINE,
    *DATA,
    *SHARE_PROMPTS,
    *SCHEDULE,
    *RUNTIME,
    *LEVERS,
    *OPTIMIZER,
    *EXPERTS,
    *FREEZING,
    *LISA,
    *GALORE,
    *ADAPTER,
    *METHODS,
    *OBJECTIVE,
    *DISTILL,
    *OUTPUTS,
]


def check_recipe(recipe: Recipe) -> None:
    """Raises InputError, naming the keys, for values out of bounds and for keys that contradict each other.

    Only what needs no file, model or hardware: those are checked by who opens them.
    """
    for bound, holds, keys in BOUNDS:
        for key in keys.split():
            value = attrgetter(key)(recipe)
            if value is not None and not holds(value):
                raise InputError(f"{key}: found {value!r}; it must be {bound}")
    refuse(RECIPE_RULES, recipe)
