"""Models that give a text a score: a decoder with a single row, `score`, in place of the output layer.

transformers calls them …ForSequenceClassification; by that name in config.json a folder says that it holds one. A
reward model is one with a single label, read at a text's last token that isn't padding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mcore_swift.errors import InputError
from mcore_swift.weights.rules import Rule

if TYPE_CHECKING:
    from mcore_swift.models.build import ModelSource

KEY = "score.weight"  # Megatron's global key and Hugging Face's name
ENDING = "ForSequenceClassification"


def is_scored(raw: Mapping[str, Any]) -> bool:
    """Whether config.json is that of a model with a score."""
    return any(str(name).endswith(ENDING) for name in raw.get("architectures") or ())


def scored_config(raw: Mapping[str, Any], *, path: object) -> dict[str, Any]:
    """config.json of the model in `path` with a score of one label. Raises InputError where transformers has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSES

    if raw["model_type"] not in CLASSES:
        raise InputError(f"{path}: transformers has no {ENDING} for model_type {raw['model_type']}, to open it with")
    changed = {
        "architectures": [CLASSES[raw["model_type"]]],
        "id2label": {"0": "LABEL_0"},  # so many labels
        "label2id": {"LABEL_0": 0},
        "problem_type": "regression",
    }
    if raw.get("num_nextn_predict_layers"):  # there is no token to predict
        changed["num_nextn_predict_layers"] = 0
    return {**raw, **changed}


def with_padding(source: ModelSource, pad_id: int) -> ModelSource:
    """The source with the id of the token that pads texts, by which transformers finds their last one."""
    config = copy(source.config)
    config.pad_token_id = pad_id
    return replace(source, raw=source.raw | {"pad_token_id": pad_id}, config=config)


def scored_rules(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """A family's weight rules with the score in place of the output layer."""
    return *(rule for rule in rules if not rule.mcore.startswith(("head.", "mtp."))), Rule(KEY, KEY)


def spare_tensors(names: Iterable[str], *, num_layers: int) -> list[str]:
    """Tensors of a language model's folder that have no place in one with a score: they are left out."""
    layer = re.compile(r"model\.layers\.(\d+)\.")
    ahead = {name for name in names if (found := layer.match(name)) and int(found[1]) >= num_layers}
    return [name for name in names if name == "lm_head.weight" or name in ahead]
