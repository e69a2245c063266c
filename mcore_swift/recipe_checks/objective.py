"""Rules about objectives: which of the section's keys each reads, and what they may be."""

from __future__ import annotations

from dataclasses import fields, replace

from mcore_swift.recipe import ObjectiveSection, Recipe
from mcore_swift.recipe_checks.table import Row

COMPARES = ("reference", "reference_path")
# What each objective reads. A key that isn't here has to keep its default: it would do nothing.
READS: dict[str, tuple[str, ...]] = {
    "sft": ("dft", "label_smoothing"),
    "dpo": (
        *("loss", "losses", "beta", "label_smoothing", "sft_weight", "f_divergence", "f_alpha", "ld_alpha"),
        *("discopop_tau", *COMPARES),
    ),
    "kto": ("loss", "beta", "desirable_weight", "undesirable_weight", *COMPARES),
    "cpo": ("loss", "beta", "label_smoothing", "sft_weight", "alphapo"),
    "simpo": ("beta", "gamma", "label_smoothing", "sft_weight", "alphapo"),
    "orpo": ("beta",),
    "rm": ("centering",),
    "distill": ("loss", "beta", "teacher", "temperature", "top_k", "distill_weight"),
}
# Whose model has a score in place of the output layer.
SCORED = ("rm",)
# Those of pairs: a preferred answer and another one to the same prompt.
PAIRED = ("dpo", "cpo", "simpo", "orpo", "rm")
# Losses that compare what has the same rank among all pairs of the global batch.
SORTED = ("aot", "aot_unpaired")
# The losses of each; the first is the default.
LOSSES: dict[str, tuple[str, ...]] = {
    "dpo": (
        *("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard"),
        *("apo_zero", "apo_down", "discopop", *SORTED),
    ),
    "kto": ("kto", "apo_zero_unpaired"),
    "cpo": ("sigmoid", "hinge", "ipo"),
    "distill": ("forward_kl", "reverse_kl", "js"),
}
# Losses that read a further key, where not all do.
SMOOTHED = ("sigmoid", "robust", "exo_pair", *SORTED)
OF_A_DIFFERENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop")
DEFAULTS: dict[str, dict[str, float]] = {
    "dpo": {"beta": 0.1, "sft_weight": 0.0},
    "kto": {"beta": 0.1},
    "cpo": {"beta": 0.1, "sft_weight": 1.0},
    "simpo": {"beta": 2.0, "gamma": 1.0, "sft_weight": 0.0},
    "orpo": {"beta": 0.1},
    "distill": {"beta": 0.5},
}


def filled(section: ObjectiveSection) -> ObjectiveSection:
    """The section with the objective's own defaults where the recipe leaves a key open. The reference stays open."""
    values: dict[str, object] = {
        name: value for name, value in DEFAULTS.get(section.name, {}).items() if getattr(section, name) is None
    }
    if section.loss is None and not section.losses and section.name in LOSSES:
        values["loss"] = LOSSES[section.name][0]
    return replace(section, **values)  # type: ignore[arg-type]


def reference_of(recipe: Recipe) -> str:
    """Whom the objective compares with: a value of objective.reference."""
    section = recipe.objective
    if section.reference is not None:
        return section.reference
    if "reference" not in READS[section.name]:
        return "none"
    return "adapter_off" if recipe.adapter.name == "lora" else "model"


def losses_of(section: ObjectiveSection) -> list[str]:
    return list(section.losses) or [section.loss or LOSSES.get(section.name, ("",))[0]]


def _changed(section: ObjectiveSection) -> list[str]:
    default = ObjectiveSection()
    return [
        f.name for f in fields(section) if f.name != "name" and getattr(section, f.name) != getattr(default, f.name)
    ]


def _unread(recipe: Recipe) -> list[str]:
    return [name for name in _changed(recipe.objective) if name not in READS[recipe.objective.name]]


def _unknown_losses(recipe: Recipe) -> list[str]:
    section = recipe.objective
    return [name for name in losses_of(section) if section.name in LOSSES and name not in LOSSES[section.name]]


def _compares(recipe: Recipe) -> bool:
    return "reference" in READS[recipe.objective.name]


OBJECTIVE: list[Row[Recipe]] = [
    *(
        Row(
            "objective.name",
            f"{name}, with a key that it doesn't read",
            lambda r, name=name: r.objective.name == name and _unread(r),
            f"{{r.objective.name}} reads {', '.join(names)} only, so the section's other keys do nothing",
            "leave them out",
        )
        for name, names in READS.items()
    ),
    *(
        Row(
            "objective.loss objective.losses",
            f"a loss that {name} doesn't have",
            lambda r, name=name: r.objective.name == name and _unknown_losses(r),
            "{r.objective.name} has no such loss",
            f"allowed: {', '.join(names)}",
        )
        for name, names in LOSSES.items()
    ),
    Row(
        "objective.losses objective.loss",
        "both",
        lambda r: r.objective.losses and r.objective.loss,
        "they exclude each other",
        "name one loss, or several with their weights",
    ),
    Row(
        "objective.label_smoothing",
        "more than 0, without a loss that reads it",
        lambda r: (
            r.objective.label_smoothing
            and r.objective.name in ("dpo", "cpo")
            and not set(losses_of(r.objective)) & set(SMOOTHED)
        ),
        "{r.objective.label_smoothing}, but the loss doesn't read it",
        f"leave it out, or choose one of {', '.join(SMOOTHED)}",
    ),
    Row(
        "objective.label_smoothing",
        "0, with loss: exo_pair",
        lambda r: (
            r.objective.name == "dpo" and "exo_pair" in losses_of(r.objective) and not r.objective.label_smoothing
        ),
        "exo_pair divides by it",
        "set it; its paper advises 1.0e-3",
    ),
    Row(
        "objective.label_smoothing",
        "more than 0, with objective.dft: true or model.mtp_loss_scale",
        lambda r: (
            r.objective.label_smoothing and r.objective.name == "sft" and (r.objective.dft or r.model.mtp_loss_scale)
        ),
        "dft weighs tokens by probabilities that nobody smoothed, and multi-token prediction has no smoothed loss",
        "leave one of them out",
    ),
    Row(
        "objective.f_divergence",
        "another than reverse_kl, with a loss that isn't one of a difference",
        lambda r: r.objective.f_divergence != "reverse_kl" and set(losses_of(r.objective)) - set(OF_A_DIFFERENCE),
        "{r.objective.f_divergence} has no meaning for this loss, which isn't one of a difference of scores",
        f"leave it out, or choose of {', '.join(OF_A_DIFFERENCE)}",
    ),
    Row(
        "objective.losses",
        "both aot and aot_unpaired",
        lambda r: set(SORTED) <= set(r.objective.losses),
        "they sort pairs in two ways",
        "choose one of the two",
    ),
    Row(
        "objective.f_alpha",
        "any, without f_divergence: alpha",
        lambda r: r.objective.f_alpha != ObjectiveSection().f_alpha and r.objective.f_divergence != "alpha",
        "only objective.f_divergence: alpha reads it",
        "leave it out",
    ),
    Row(
        "objective.discopop_tau",
        "any, without loss: discopop",
        lambda r: (
            r.objective.discopop_tau != ObjectiveSection().discopop_tau and "discopop" not in losses_of(r.objective)
        ),
        "only objective.loss: discopop reads it",
        "leave it out",
    ),
    Row(
        "objective.reference",
        "none, with an objective that needs one",
        lambda r: _compares(r) and r.objective.reference == "none",
        "{r.objective.name} compares the policy with a reference",
        "choose adapter_off, model or precomputed",
    ),
    Row(
        "objective.reference",
        "adapter_off, without adapter.name: lora",
        lambda r: r.objective.reference == "adapter_off" and r.adapter.name != "lora",
        "adapter.name is {r.adapter.name}, and there is no LoRA to switch off",
        "choose model or precomputed, or train with lora",
    ),
    Row(
        "objective.reference",
        "left out, with adapter.path",
        lambda r: _compares(r) and r.objective.reference is None and r.adapter.path is not None,
        "the adapter in {r.adapter.path} is trained already, so the model without it isn't where this run starts",
        "say adapter_off to compare with the model without it, or name the merged folder: reference: model, with"
        " reference_path",
    ),
    Row(
        "objective.reference_path",
        "any, without reference: model or precomputed",
        lambda r: r.objective.reference_path is not None and reference_of(r) not in ("model", "precomputed"),
        "only objective.reference: model and precomputed read it",
        "leave it out, or set reference: model",
    ),
    Row(
        "objective.reference",
        "precomputed, with ld_alpha",
        lambda r: r.objective.reference == "precomputed" and r.objective.ld_alpha is not None,
        "what is kept with the data are sums in which every label weighs 1",
        "choose adapter_off or model, or leave ld_alpha out",
    ),
    Row(
        "adapter.several",
        "any, with another objective than sft",
        lambda r: r.objective.name != "sft" and r.adapter.several,
        "{r.objective.name}'s answers don't say which adapter they belong to",
        "train one adapter",
    ),
    Row(
        "objective.reference",
        "precomputed, with data.streaming: true",
        lambda r: r.objective.reference == "precomputed" and r.data.streaming,
        "streamed rows are not known beforehand",
        "choose adapter_off or model, or set data.streaming: false",
    ),
    Row(
        "model.mtp_loss_scale",
        "more than 0, with another objective than sft",
        lambda r: r.objective.name != "sft" and r.model.mtp_loss_scale,
        "the loss of multi-token prediction belongs to sft; {r.objective.name} would train on answers it should avoid",
        "leave it out",
    ),
    Row(
        "objective.name adapter.name",
        "rm, with an adapter other than lora",
        lambda r: r.objective.name in SCORED and r.adapter.name not in ("none", "lora"),
        "the score is new and has to be trained, which {r.adapter.name}'s folder has no place for",
        "choose lora, or none to train everything",
    ),
    Row(
        "optimizer.fsdp",
        "any, with objective.name: rm",
        lambda r: r.objective.name in SCORED and r.optimizer.fsdp,
        "sharded parameters are not proved for a model with a score",
        "leave it out",
    ),
]
