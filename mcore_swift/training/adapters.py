"""From a recipe's adapter section to adapters on the model, and to the folders that they are written to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_swift.errors import InputError
from mcore_swift.peft.peft_config import DEFAULT, SCORE, is_scored
from mcore_swift.recipe import AdapterSection, Recipe
from mcore_swift.weights.rules import TensorRule

if TYPE_CHECKING:
    import torch

    from mcore_swift.models.layers import DecoderModel
    from mcore_swift.peft.lora import LoraSettings
    from mcore_swift.peft.quantized import QuantizedBase
    from mcore_swift.training.setup import TrainingModel


def settings_of(section: AdapterSection, *, seed: int, scored: bool = False) -> tuple[LoraSettings, list[str]]:
    """The adapters' settings and targets: the recipe's, or those of the folder that it goes on from.

    `scored`: the model's score is trained in full beside them.
    """
    from mcore_swift.peft import peft_folder
    from mcore_swift.peft.lora import LoraSettings

    def with_score(modules: Sequence[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*modules, SCORE] if scored else modules))

    if section.path is not None:
        settings, targets = peft_folder.read_settings(Path(section.path))
        settings = replace(settings, share_a=section.share_a, dropout=section.dropout or settings.dropout)
        return replace(settings, modules_to_save=with_score(settings.modules_to_save)), targets
    settings = LoraSettings(
        rank=section.rank,
        alpha=section.alpha,
        dropout=section.dropout,
        rslora=section.rslora,
        dora=section.dora,
        pissa=section.init == "pissa",
        share_a=section.share_a,
        modules_to_save=with_score(section.modules_to_save),
        seed=seed,
    )
    return settings, section.targets


def block_method(name: str) -> Any:
    """The module of an adapter that isn't LoRA."""
    from mcore_swift.peft.methods import BLOCK_METHODS

    return BLOCK_METHODS[name]


def block_settings(section: AdapterSection, *, seed: int) -> Any:
    """Its settings: the recipe's, or those of the folder that it goes on from."""
    from mcore_swift.peft import own_folder

    method = block_method(section.name)
    if section.path is not None:
        return own_folder.read_settings(Path(section.path), section.name, method.Settings)
    return method.settings_of(section, seed)


def quantized_base(
    recipe: Recipe, chunks: Sequence[DecoderModel], rules: Mapping[str, TensorRule]
) -> QuantizedBase | None:
    """What takes the weights of a lean model in four or eight bits, if the recipe wants them so."""
    if recipe.adapter.quantization == "none":
        return None
    import torch

    from mcore_swift.peft.quantized import Quantization, QuantizedBase

    settings = Quantization(
        kind=recipe.adapter.quantization,
        double=recipe.adapter.double_quantization,
        gradients={"hybrid": torch.float8_e5m2, "e4m3": torch.float8_e4m3fn}[recipe.precision.fp8_format],
    )
    return QuantizedBase(chunks, rules, settings)


def adapters_of(section: AdapterSection) -> dict[str, AdapterSection]:
    """The recipe's adapters by name: the several, each a section of its own, or the one."""
    if not section.several:
        return {DEFAULT: section}
    own = {
        name: {key: value for key, value in vars(one).items() if value is not None}
        for name, one in section.several.items()
    }
    return {name: replace(section, several={}, **changes) for name, changes in own.items()}


def prepare(recipe: Recipe, chunks: Sequence[DecoderModel], rules: Mapping[str, TensorRule]) -> None:
    """Freezes the model and hangs the recipe's adapters on it, if it has any."""
    from mcore_swift.peft import adapters, own_folder, peft_folder

    section = recipe.adapter
    if section.name == "none":
        return
    if section.name != "lora":
        method = block_method(section.name)
        method.attach(chunks, rules, block_settings(section, seed=recipe.runtime.seed))
        if section.path is not None:
            own_folder.load(chunks, Path(section.path))
        return
    for name, section in adapters_of(recipe.adapter).items():
        settings, targets = settings_of(section, seed=recipe.runtime.seed, scored=is_scored(rules))
        if recipe.adapter.quantization != "none":
            _check_whole(settings, rules)
        modules = adapters.attach(chunks, rules, targets, settings, adapter=name)
        experts = [module for module in modules if ".experts." in module]
        if recipe.adapter.several and experts:
            raise InputError(
                f"adapter.several.{name}: {experts[0]} is one of the experts, which get tokens of all rows mixed; leave"
                " the experts out of its targets, or train the adapters one by one"
            )
        if section.path is not None:
            peft_folder.load(chunks, Path(section.path), name)


def _check_whole(settings: LoraSettings, rules: Mapping[str, TensorRule]) -> None:
    from mcore_swift.peft.saved import modules_of, select_saved
    from mcore_swift.peft.targets import is_linear

    chosen = select_saved(settings.modules_to_save, rules, adapted=())
    held = modules_of({key: rule for key, rule in chosen.items() if is_linear(rule)})
    if held:
        raise InputError(
            f"adapter.modules_to_save: {held[0]}: its weight is not held in full (adapter.quantization) and can't be"
            " trained; give it an adapter instead (adapter.targets)"
        )


def write(recipe: Recipe, model: TrainingModel, run_dir: Path) -> None:
    """Writes DIR/adapter, PEFT's where it has a format (several adapters: a folder of each in it), and, if asked,
    DIR/hf, the model with its adapter merged.

    Merged in float32; quantized weights are merged, and written, as what they stand for.
    """
    from mcore_swift.peft import own_folder, peft_folder, quantized
    from mcore_swift.weights.hf_folder import export

    base = str(model.source.folder)
    if recipe.adapter.name != "lora":
        chosen = block_settings(recipe.adapter, seed=recipe.runtime.seed)
        own_folder.save(model.chunks, run_dir / "adapter", recipe.adapter.name, chosen, base=base)
        return
    for name, section in adapters_of(recipe.adapter).items():
        settings, _ = settings_of(section, seed=recipe.runtime.seed, scored=is_scored(model.rules))
        folder = run_dir / "adapter" / name if recipe.adapter.several else run_dir / "adapter"
        peft_folder.save(model.chunks, model.rules, folder, settings, base=base, adapter=name)
    if merges(recipe.adapter):
        adapted: list[Any] = list(model.chunks)
        merged = quantized.values(adapted)
        merged |= {key: value for chunk in adapted for key, value in chunk.adapters.merged().items()}

        def value(parameter: torch.Tensor) -> torch.Tensor:
            return merged[id(parameter)]() if id(parameter) in merged else parameter.data

        export(model.chunks, model.rules, model.source, run_dir / "hf", dtype=model.export_dtype, value=value)


def merges(section: AdapterSection) -> bool:
    """Whether the adapters are folded into the model's weights at the end: by default where that is possible."""
    return section.name == "lora" and not section.several if section.merge is None else section.merge


def exports_model(recipe: Recipe) -> bool:
    """Whether the run ends with a Hugging Face folder of the whole model."""
    return recipe.checkpoint.export and (recipe.adapter.name == "none" or merges(recipe.adapter))
