"""Adapters from Python, for programs that build a Megatron model with this library and train it with their own loop.

from mcore_swift import LoRAConfig, Swift

model = Swift.prepare_model(model, LoRAConfig(rank=8, target_modules=["q_proj", "v_proj"]))
Swift.print_trainable_parameters(model)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich import print
from torch import Tensor

from mcore_swift import parallel
from mcore_swift.peft import adapters, peft_folder
from mcore_swift.peft.lora import LoraSettings
from mcore_swift.peft.peft_config import DEFAULT
from mcore_swift.peft.targets import select


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """As the recipe's adapter section; `target_modules` are Hugging Face names, groups such as attention, or globs."""

    rank: int = 16
    alpha: float = 32.0
    target_modules: Sequence[str] = ("attention", "mlp")
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init: str = "default"  # or pissa
    share_a: bool = False
    modules_to_save: Sequence[str] = ()
    quantization: str = "none"  # nf4 or fp4: the frozen weights in four bits (QLoRA)
    double_quantization: bool = True  # their scales in eight
    seed: int = 1234

    def settings(self) -> LoraSettings:
        """Raises ValueError for a value that is out of bounds."""
        for name, holds, bound in (
            ("rank", self.rank >= 1, "at least 1"),
            ("alpha", self.alpha > 0, "greater than 0"),
            ("dropout", 0 <= self.dropout < 1, "at least 0 and less than 1"),
            ("init", self.init in ("default", "pissa"), "default or pissa"),
            ("quantization", self.quantization in ("none", "nf4", "fp4"), "none, nf4 or fp4"),
            ("quantization", self.quantization == "none" or self.init != "pissa", "none with init: pissa"),
            ("share_a", not (self.share_a and self.init == "pissa"), "False with init pissa (each module has its own)"),
        ):
            if not holds:
                raise ValueError(f"LoRAConfig.{name}: found {getattr(self, name)!r}; it must be {bound}")
        return LoraSettings(
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            rslora=self.use_rslora,
            dora=self.use_dora,
            pissa=self.init == "pissa",
            share_a=self.share_a,
            modules_to_save=tuple(self.modules_to_save),
            seed=self.seed,
        )


class Swift:
    """`model` is what `models.build.build_chunks` gave: a chunk, or the list of this rank's chunks."""

    @staticmethod
    def prepare_model[Model](model: Model, config: LoRAConfig, adapter_name: str = DEFAULT) -> Model:
        """Freezes the model, whose weights must be loaded, and hangs an adapter on it. Called by all ranks.

        Raises InputError (a ValueError) for a target that matches nothing or a rank that is larger than a layer.
        """
        chunks = _chunks(model)
        select(list(config.target_modules), chunks[0].tensor_rules)  # before anything is changed
        config.settings()
        if config.quantization != "none":
            Swift.quantize(model, config.quantization, double=config.double_quantization)
        Swift.add_adapter(model, adapter_name, config)
        return model

    @staticmethod
    def quantize[Model](model: Model, kind: str = "nf4", *, double: bool = True) -> Model:
        """Holds the decoder layers' linear weights, which must be loaded, in four bits. Called by all ranks.

        `prepare_model` does it if its config says so; before `from_pretrained`, call it yourself. Raises InputError for
        a model that can't be held so, or without the package bitsandbytes.
        """
        from mcore_swift.peft.quantized import Quantization, QuantizedBase

        chunks = _chunks(model)
        QuantizedBase(chunks, chunks[0].tensor_rules, Quantization(kind=kind, double=double))  # type: ignore[arg-type]
        return model

    @staticmethod
    def add_adapter(model: Any, adapter_name: str, config: LoRAConfig) -> None:
        """One more adapter on the same base; the one that is active stays so. Raises as `prepare_model` does."""
        chunks, targets = _chunks(model), list(config.target_modules)
        adapters.attach(chunks, chunks[0].tensor_rules, targets, config.settings(), adapter=adapter_name)

    @staticmethod
    def set_adapter(model: Any, adapter_name: str) -> None:
        """Switches to this adapter, which acts and is trained; the others rest."""
        adapters.activate(_chunks(model), adapter_name)

    @staticmethod
    def disable_adapter(model: Any) -> contextlib.AbstractContextManager[None]:
        """A context in which the model is its base, bit for bit."""
        return adapters.disabled(_chunks(model))

    @staticmethod
    @contextlib.contextmanager
    def mixed_batch(model: Any, adapter_numbers: Tensor) -> Iterator[None]:
        """A context for one forward and backward pass in which each position takes its own adapter.

        adapter_numbers: int64 [batch, sequence], 0 for the adapter that was added first, and so on; −1: the base.
        """
        for chunk in _chunks(model):
            adapters.route(chunk, adapter_numbers)
        try:
            yield
        finally:
            for chunk in _chunks(model):
                adapters.route(chunk, None)

    @staticmethod
    def from_pretrained[Model](model: Model, folder: str | Path, adapter_name: str = DEFAULT) -> Model:
        """Hangs the adapter of a PEFT folder on the model. Called by all ranks; raises as `prepare_model` does."""
        chunks = _chunks(model)
        settings, targets = peft_folder.read_settings(Path(folder))
        adapters.attach(chunks, chunks[0].tensor_rules, targets, settings, adapter=adapter_name)
        peft_folder.load(chunks, Path(folder), adapter_name)
        return model

    @staticmethod
    def save_pretrained(
        model: Any, folder: str | Path, config: LoRAConfig, *, base: str, adapter_name: str = DEFAULT
    ) -> None:
        """Writes an adapter as a PEFT folder, all ranks together. `base`: the base model's name."""
        chunks = _chunks(model)
        rules = chunks[0].tensor_rules
        peft_folder.save(chunks, rules, Path(folder), config.settings(), base=base, adapter=adapter_name)

    @staticmethod
    def print_trainable_parameters(model: Any) -> None:
        """Prints, on the first rank, how many parameters are trained of how many. Called by all ranks."""
        trained, every = count_parameters(_chunks(model))
        if dist.get_rank() == 0:
            print(f"trainable parameters: {trained:,} of {every:,} ({trained / every:.4%})")


def count_parameters(chunks: Sequence[Any]) -> tuple[int, int]:
    """Parameters of the adapters, and of the model with them, over all ranks; each counted once."""
    from mcore_swift.weights import live

    first = chunks[0]
    tensors = {tensor.place: tensor for chunk in chunks for tensor in chunk.adapters.tensors()}
    own = {f"{tensor.adapter}.{tensor.name}": tensor.whole_size for tensor in tensors.values()}
    added = sum(parallel.union_over_model(own).values())
    shapes = live.global_shapes(chunks)
    specs = live.hf_specs(first.tensor_rules, shapes, vocab_size=first.true_vocab_size, dtype=lambda name: "U8")
    trained = added + sum(
        spec.nbytes for spec in peft_folder.saved_specs(chunks, "U8", first.adapters.names[0]).values()
    )
    return trained, added + sum(spec.nbytes for spec in specs.values())


def _chunks(model: Any) -> list[Any]:
    chunks = list(model) if isinstance(model, Sequence) else [model]
    for chunk in chunks:
        if not hasattr(chunk, "tensor_rules"):
            raise ValueError(f"{type(chunk).__name__} was not built by mcore_swift.models.build.build_chunks")
    return chunks
