"""Rules about distillation: what its options ask of each other, and of the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mcore_swift.recipe import Recipe
from mcore_swift.recipe_checks.table import Row


def _on(recipe: Recipe) -> bool:
    return recipe.objective.name == "distill"


DISTILL: list[Row[Recipe]] = [
    Row(
        "objective.teacher",
        "left out, with objective.name: distill",
        lambda r: _on(r) and r.objective.teacher is None,
        "distill learns from a teacher",
        "name a Hugging Face folder with the student's vocabulary",
    ),
    Row(
        "objective.beta",
        "any, with distill and another loss than js",
        lambda r: _on(r) and r.objective.beta is not None and r.objective.loss != "js",
        "only objective.loss: js reads it",
        "leave it out, or set loss: js",
    ),
    Row(
        "objective.beta",
        "1 or more, with loss: js",
        lambda r: _on(r) and r.objective.loss == "js" and (r.objective.beta or 0) >= 1,
        "{r.objective.beta}, but it is the teacher's share of the mixture that both are compared with",
        "choose it between 0 and 1, or loss: forward_kl or reverse_kl, which js tends to at the ends",
    ),
    Row(
        "optimizer.fsdp runtime.ep_overlap",
        "any, with objective.name: distill",
        lambda r: _on(r) and (r.optimizer.fsdp or r.runtime.ep_overlap),
        "distill computes the output layer's gradients itself, which is proved with neither",
        "leave them out",
    ),
]


@dataclass(frozen=True)
class Lesson:
    """A recipe with the vocabulary sizes of its model and of the frozen one beside it; `key` names that one."""

    recipe: Recipe
    key: str
    folder: Path
    vocab_size: int
    own_folder: Path
    own_vocab_size: int


LESSON: list[Row[Lesson]] = [
    *(
        Row(
            key,
            "a model of another vocabulary size",
            lambda r, key=key: r.key == key and r.vocab_size != r.own_vocab_size,
            "{r.folder} has {r.vocab_size} tokens, {r.own_folder} has {r.own_vocab_size}",
            "choose a model with the same vocabulary",
        )
        for key in ("objective.teacher", "objective.reference_path")
    ),
    Row(
        "objective.top_k",
        "more than the vocabulary",
        lambda r: (r.recipe.objective.top_k or 0) > r.vocab_size,
        "{r.recipe.objective.top_k}, but the vocabulary has {r.vocab_size} tokens ({r.folder})",
        "lower it, or leave it out to compare at all of them",
    ),
]
