"""What an objective learns from, and which data formats hold that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mcore_swift.errors import InputError

Unit = Literal["labels", "pairs", "answers"]
FORMATS: dict[Unit, tuple[str, ...]] = {  # the first is the one that auto stands for
    "labels": ("auto", "messages", "prompt_response", "text", "indexed", "synthetic", "chosen"),
    "pairs": ("preference",),
    "answers": ("labelled",),
}
NAMES: dict[Unit, str] = {
    "labels": "conversations and texts",
    "pairs": "pairs of a chosen and a rejected answer",
    "answers": "answers labelled true or false",
}


@dataclass(frozen=True)
class Form:
    """What all micro-batches of a data set have in common, those without an answer too.

    answers: documents of a unit; labelled: they are judged one by one (a second one is a probe), not a pair.
    scored: an answer's only label is the document's last token that isn't padding, where a model's score is read.
    """

    answers: int
    labelled: bool
    ref_logps: bool = False
    scored: bool = False


@dataclass(frozen=True)
class Wanted:
    """The data an objective asks for. unit: what its loss is a mean over; probes: answers to other rows' prompts, too.

    labels: tokens that count, whichever row they are from; pairs: two answers to one prompt; answers: single ones.
    scored: whole texts with what the chat template puts behind an answer, to be scored at their last token.
    unweighable: why rows can't have weights.
    """

    objective: str = "sft"
    unit: Unit = "labels"
    probes: bool = False
    scored: bool = False
    unweighable: str = ""

    def check_weights(self, weights: np.ndarray | None, source: object) -> None:
        """Raises InputError for rows' weights other than 1 (NaN: none is known) where they can't be honoured."""
        if self.unweighable and weights is not None and bool(((weights != 1) & ~np.isnan(weights)).any()):
            raise InputError(f"{source}: rows have a weight, but {self.unweighable}; leave the column out")

    @property
    def judged(self) -> bool:
        return self.unit != "labels"

    @property
    def form(self) -> Form:
        labelled = self.unit == "answers"
        return Form(answers=1 if labelled and not self.probes else 2, labelled=labelled, scored=self.scored)

    def format(self, setting: str) -> str:
        """The data format to read for `data.format`. Raises InputError when the objective can't use that one."""
        formats = FORMATS[self.unit]
        if setting == "auto":
            return formats[0]
        if setting not in formats:
            raise InputError(f"data.format: {setting}, but {self}")
        return setting

    def __str__(self) -> str:
        more = "; data.format: chosen takes the chosen answers of pairs" if self.unit == "labels" else ""
        return f"objective.name: {self.objective} learns from {NAMES[self.unit]}{more}"
