"""From a recipe's adapter section to adapters on the model, and to the folders that they are written to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_swift.recipe import AdapterSection, Recipe
from mcore_swift.weights.rules import TensorRule

if TYPE_CHECKING:
    import torch

    from mcore_swift.models.layers import DecoderModel
    from mcore_swift.peft.lora import LoraSettings
    from mcore_swift.training.setup import TrainingModel


def settings_of(section: AdapterSection, *, seed: int) -> tuple[LoraSettings, list[str]]:
    """The adapters' settings and targets: the recipe's, or those of the folder that it goes on from."""
    from mcore_swift.peft import peft_folder
    from mcore_swift.peft.lora import LoraSettings

    if section.path is not None:
        return peft_folder.read_settings(Path(section.path))
    settings = LoraSettings(
        rank=section.rank,
        alpha=section.alpha,
        dropout=section.dropout,
        rslora=section.rslora,
        dora=section.dora,
        pissa=section.init == "pissa",
        seed=seed,
    )
    return settings, section.targets


def prepare(recipe: Recipe, chunks: Sequence[DecoderModel], rules: Mapping[str, TensorRule]) -> None:
    """Freezes the model and hangs the recipe's adapters on it, if it has any."""
    from mcore_swift.peft import adapters, peft_folder

    if recipe.adapter.name == "none":
        return
    settings, targets = settings_of(recipe.adapter, seed=recipe.runtime.seed)
    adapters.attach(chunks, rules, targets, settings)
    if recipe.adapter.path is not None:
        peft_folder.load(chunks, Path(recipe.adapter.path))


def write(recipe: Recipe, model: TrainingModel, run_dir: Path) -> None:
    """Writes DIR/adapter, a PEFT folder, and DIR/hf, the model with its adapters merged in float32, if asked."""
    from mcore_swift.peft import peft_folder
    from mcore_swift.weights.hf_folder import export

    settings, _ = settings_of(recipe.adapter, seed=recipe.runtime.seed)
    base = str(model.source.folder)
    peft_folder.save(model.chunks, model.rules, run_dir / "adapter", settings, base=base)
    if recipe.adapter.merge:
        adapted: list[Any] = list(model.chunks)
        merged = {key: value for chunk in adapted for key, value in chunk.adapters.merged().items()}

        def value(parameter: torch.Tensor) -> torch.Tensor:
            return merged[id(parameter)]() if id(parameter) in merged else parameter.data

        export(model.chunks, model.rules, model.source, run_dir / "hf", dtype=model.export_dtype, value=value)


def exports_model(recipe: Recipe) -> bool:
    """Whether the run ends with a Hugging Face folder of the whole model."""
    return recipe.checkpoint.export and (recipe.adapter.name == "none" or recipe.adapter.merge)
