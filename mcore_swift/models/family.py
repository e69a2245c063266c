"""What a model family is: a table of config rows, in both directions, and of weight rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mcore_swift.errors import InputError
from mcore_swift.weights.rules import Rule

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

# A Hugging Face configuration object, its defaults filled in by transformers.
HFConfig = Any


@dataclass(frozen=True)
class ConfigRow:
    """One correspondence: `read` gives TransformerConfig fields from the Hugging Face config, `write` the way back."""

    read: Callable[[HFConfig], dict[str, object]]
    write: Callable[[TransformerConfig], dict[str, object]]


def same(hf: str, mcore: str, *, default: Callable[[HFConfig], object] | None = None) -> ConfigRow:
    """A row whose value is the same on both sides; `default` computes it when the config leaves it out."""

    def read(config: HFConfig) -> dict[str, object]:
        value = getattr(config, hf, None)
        if value is None:
            if default is None:
                raise InputError(f"config.json: {hf} is missing; it must be given for model_type {config.model_type}")
            value = default(config)
        return {mcore: value}

    return ConfigRow(read, lambda config: {hf: getattr(config, mcore)})


def only(hf: str, *allowed: object, default: object = None) -> ConfigRow:
    """A row that accepts only values which the family's layers implement."""

    def read(config: HFConfig) -> dict[str, object]:
        value = getattr(config, hf, default)
        if value not in allowed:
            raise InputError(f"config.json: {hf}: {value!r} is not supported; allowed: {', '.join(map(repr, allowed))}")
        return {}

    return ConfigRow(read, lambda config: {hf: allowed[0]})


def read_window(config: HFConfig) -> dict[str, object]:
    window = getattr(config, "sliding_window", None)
    kinds = (
        getattr(config, "layer_types", None)
        or ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    )
    if window is None or "sliding_attention" not in kinds:
        return {}
    # Hugging Face counts the token itself, Megatron and Transformer Engine only the tokens to its left.
    return {
        "window_size": (window - 1, 0),
        "window_attn_skip_freq": [int(kind == "sliding_attention") for kind in kinds],
    }


def _window(config: TransformerConfig) -> int | None:
    return config.window_size[0] + 1 if config.window_size is not None else None


def _write_window_by_layer(config: TransformerConfig) -> dict[str, object]:
    if config.window_size is None:
        return {"use_sliding_window": False, "sliding_window": None}
    flags = config.window_attn_skip_freq
    kinds = ["sliding_attention" if windowed else "full_attention" for windowed in flags]  # type: ignore[union-attr]
    return {"use_sliding_window": True, "sliding_window": _window(config), "layer_types": kinds}


SLIDING_WINDOW = ConfigRow(read_window, lambda config: {"sliding_window": _window(config)})  # in every layer
SLIDING_WINDOW_BY_LAYER = ConfigRow(read_window, _write_window_by_layer)

# Rows of every decoder with RMSNorm, grouped-query attention and a gated MLP.
GATED_DECODER_ROWS = (
    same("num_hidden_layers", "num_layers"),
    same("hidden_size", "hidden_size"),
    same("intermediate_size", "ffn_hidden_size"),
    same("num_attention_heads", "num_attention_heads"),
    same("num_key_value_heads", "num_query_groups", default=lambda config: config.num_attention_heads),
    same("head_dim", "kv_channels", default=lambda config: config.hidden_size // config.num_attention_heads),
    same("rms_norm_eps", "layernorm_epsilon"),
    same("initializer_range", "init_method_std"),
    same("attention_dropout", "attention_dropout", default=lambda config: 0.0),
)
DECODER_ROWS = (*GATED_DECODER_ROWS, only("hidden_act", "silu"))


def gated_decoder_fields() -> dict[str, object]:
    """TransformerConfig fields of a decoder with RMSNorm and a gated SiLU MLP without biases."""
    import torch

    return {
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
    }


@dataclass(frozen=True)
class Family:
    """A model family. `requires` maps packages to the lowest version that knows the family.

    group_rank: where experts are chosen among groups, how many of a group's best scores are added up to rank it; None:
    as many as Megatron-Core does, top_k // groups.
    """

    name: str
    model_types: tuple[str, ...]
    architecture: str
    rows: tuple[ConfigRow, ...]
    rules: tuple[Rule, ...]
    fields: Callable[[], dict[str, object]] = gated_decoder_fields
    # Those that are Megatron's own objects: asked for only where a model is built, since files are converted without.
    megatron_fields: Callable[[], dict[str, object]] = dict
    requires: Mapping[str, str] = field(default_factory=dict)
    group_rank: int | None = None

    @property
    def mtp(self) -> bool:
        """Whether the family's models may have layers of multi-token prediction."""
        return any(rule.mcore.startswith("mtp.") for rule in self.rules)

    def read_config(self, config: HFConfig) -> dict[str, object]:
        """TransformerConfig keyword arguments for a Hugging Face config. Raises InputError on what is not supported."""
        fields = self.fields()
        for row in self.rows:
            fields |= row.read(config)
        return fields

    def write_config(self, config: TransformerConfig) -> dict[str, object]:
        """The Hugging Face config keys of a TransformerConfig: the inverse of `read_config`."""
        written: dict[str, object] = {"model_type": self.model_types[0], "architectures": [self.architecture]}
        for row in self.rows:
            written |= row.write(config)
        return written
