"""The objectives by their recipe name: adding one is a file of its own, a test, and a line here."""

from mcore_swift.objectives.objective import Objective
from mcore_swift.objectives.sft import sft

OBJECTIVES: dict[str, Objective] = {"sft": sft}
