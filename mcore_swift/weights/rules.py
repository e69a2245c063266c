"""Weight rules: how Megatron's global tensors and Hugging Face's tensors correspond, one row a tensor kind.

A rule names a Megatron tensor by its place in the model ("mixer.linear_qkv.weight": the mixer half of a layer), the
Hugging Face tensors that it is made of, and the layout that fuses them. `models.keys.GLOBAL_KEYS` turns places into
Megatron's global keys; `expand` writes the rules out for every layer. Load, save, conversion and gradient comparison
all use the same expanded rules.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig


@dataclass(frozen=True)
class Layout:
    """How several Hugging Face tensors are fused along axis 0 into one global tensor.

    `rows` gives each part's rows; the parts are cut into `groups` equal blocks and interleaved block by block:
    q₀ k₀ v₀ q₁ k₁ v₁ … for QKV (one block a query group), gate up for the gated MLP (one block).
    """

    groups: Callable[[TransformerConfig], int]
    rows: Callable[[TransformerConfig], tuple[int, ...]]


def _qkv_rows(config: TransformerConfig) -> tuple[int, ...]:
    head = config.kv_channels or 0
    groups = config.num_query_groups or 0
    return (config.num_attention_heads * head, groups * head, groups * head)


def is_moe_layer(config: TransformerConfig, layer: int) -> bool:
    """Whether layer number `layer`, from 0, has experts. An MTP layer (num_layers and up) is like the last layer."""
    if config.num_moe_experts is None:
        return False
    layer = min(layer, config.num_layers - 1)
    frequency = config.moe_layer_freq  # a pattern of 0 and 1, or n: every n-th layer from the first on
    return bool(frequency[layer]) if isinstance(frequency, list) else layer % frequency == 0


QKV = Layout(groups=lambda config: config.num_query_groups or 1, rows=_qkv_rows)
GATED = Layout(groups=lambda config: 1, rows=lambda config: (config.ffn_hidden_size or 0,) * 2)
EXPERT_GATED = Layout(groups=lambda config: 1, rows=lambda config: (config.moe_ffn_hidden_size or 0,) * 2)
EXPERT_DOWN = Layout(groups=lambda config: 1, rows=lambda config: (config.hidden_size,))
SHARED_GATED = Layout(
    groups=lambda config: 1, rows=lambda config: (config.moe_shared_expert_intermediate_size or 0,) * 2
)


@dataclass(frozen=True)
class Rule:
    """One row: Megatron tensor ↔ Hugging Face tensor(s). `{i}` stands for the layer's number, `{e}` for the expert's.

    `experts`: the Megatron tensor stacks all experts along a leading axis; it needs a layout whose `groups` is 1.
    `packed`: so does the Hugging Face tensor, and the layout's parts, all of one length, are its rows in turn:
    g₀ u₀ g₁ u₁ …. `transposed`: a packed tensor is [experts, columns, rows].
    `mtp_copy`: what Hugging Face's folder calls the copy of the tensor that each layer of multi-token prediction has.
    """

    mcore: str
    hf: tuple[str, ...] | str
    layout: Layout | None = None  # None: one tensor, as it is
    when: Callable[[TransformerConfig], bool] = lambda config: True
    vocabulary: bool = False  # axis 0 is the vocabulary, padded in Megatron
    experts: bool = False
    packed: bool = False
    transposed: bool = False
    layers: Callable[[TransformerConfig, int], bool] = lambda config, layer: True
    mtp_copy: str | None = None


@dataclass(frozen=True)
class TensorRule:
    """A rule written out for one tensor of one model.

    With `stack` the global tensor is [stack, rows, …], one slice an expert, and everything here speaks of it as
    [stack · rows, …]: row r of expert e is row e · rows + r.

    With `packed` there is one Hugging Face tensor, a stack too, and an expert's slice is the smallest piece that is
    read and written: `unpack` and `pack` turn it into the global tensor's slice and back.

    `copies` are further Hugging Face tensors that hold the same as the only part; a folder has them all.
    """

    key: str
    hf: tuple[str, ...]
    groups: int
    rows: tuple[int, ...]  # rows of each part; () for a single part of any length
    vocabulary: bool
    stack: int = 0  # length of the leading axis of experts; 0: there is none
    packed: bool = False
    transposed: bool = False
    expert: int | None = None  # of a packed stack's slice: its number
    copies: tuple[str, ...] = ()

    def parts(self) -> Iterator[tuple[int, str]]:
        """(part, name) of all Hugging Face tensors: the parts, and the copies of part 0."""
        yield from enumerate(self.hf)
        yield from ((0, name) for name in self.copies)

    def of_expert(self, expert: int) -> TensorRule:
        """The rule of one slice of a stack, whose global tensor is [rows, …]."""
        parts = len(self.rows) // self.stack
        own = slice(expert * parts, (expert + 1) * parts)
        if self.packed:
            return replace(self, rows=self.rows[own], stack=0, expert=expert)
        return replace(self, hf=self.hf[own], rows=self.rows[own], stack=0)

    def hf_shapes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The Hugging Face tensors' shapes. shape: the global tensor's, with its axis of experts, without padding."""
        inner = shape[1 + bool(self.stack) :]
        if self.packed:
            rows = (sum(self.rows) // self.stack,)
            return ((self.stack, *inner, *rows) if self.transposed else (self.stack, *rows, *inner),)
        return tuple((rows, *inner) for rows in self.rows or shape[:1])

    def global_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """The inverse of `hf_shapes`, for Hugging Face tensors of equal width."""
        if self.packed:
            stack, *own = shapes[0]
            return (stack, *(reversed(own) if self.transposed else own))
        rows = sum(shape[0] for shape in shapes)
        return (*((self.stack, rows // self.stack) if self.stack else (rows,)), *shapes[0][1:])

    def unpack(self, packed: Any) -> Any:
        """An expert's slice of the packed Hugging Face tensor → its slice [rows, …] of the global one.

        A torch tensor or a numpy array; a view where it can be.
        """
        own = packed.swapaxes(0, 1) if self.transposed else packed
        parts = len(self.rows) // (self.stack or 1)
        return own.reshape(-1, parts, *own.shape[1:]).swapaxes(0, 1).reshape(own.shape)

    def pack(self, whole: Any) -> Any:
        """The inverse of `unpack`."""
        parts = len(self.rows) // (self.stack or 1)
        mixed = whole.reshape(parts, -1, *whole.shape[1:]).swapaxes(0, 1).reshape(whole.shape)
        return mixed.swapaxes(0, 1) if self.transposed else mixed

    def segments(self, start: int, stop: int, part_rows: tuple[int, ...]) -> Iterator[tuple[int, int, int, int]]:
        """Where rows [start, stop) of the global tensor come from.

        Yields (part, first, last, target): rows [first, last) of part `part` are rows [target, target + last − first)
        counted from `start`.
        """
        block = [rows // self.groups for rows in part_rows]
        ends = list(accumulate(block))  # a stack of experts has hundreds of parts: don't walk through all of them
        group_rows = ends[-1]
        for group in range(start // group_rows, -(-stop // group_rows)):
            origin = group * group_rows
            for part in range(bisect_right(ends, start - origin), len(block)):
                position = origin + ends[part] - block[part]
                if position >= stop:
                    break
                low, high = max(position, start), min(position + block[part], stop)
                if low < high:
                    first = group * block[part] + (low - position)
                    yield part, first, first + high - low, low - start


def expand(
    rules: tuple[Rule, ...],
    config: TransformerConfig,
    *,
    keys: Mapping[str, str],
    mtp_keys: Mapping[str, str],
    mtp_layers: int,
    tied: bool,
) -> dict[str, TensorRule]:
    """Writes the rules out for every layer: global key → TensorRule.

    `keys` maps the first word of `Rule.mcore` to a global key prefix, `mtp_keys` does so for the `mtp_layers` layers
    of multi-token prediction, which Hugging Face counts on after the decoder's and Megatron from 0. A rule for the
    output layer is left out when the embeddings are tied.
    """
    expanded: dict[str, TensorRule] = {}
    ahead = range(config.num_layers, config.num_layers + mtp_layers)
    for rule in rules:
        place, _, rest = rule.mcore.partition(".")
        if not rule.when(config) or (tied and place == "head"):
            continue
        prefixes = {i: mtp_keys[place].replace("{i}", str(i - config.num_layers)) for i in ahead if place in mtp_keys}
        if place in keys:
            own = range(config.num_layers if "{i}" in keys[place] else 1)
            prefixes |= {i: keys[place].replace("{i}", str(i)) for i in own}
        names = (rule.hf,) if isinstance(rule.hf, str) else rule.hf
        stack = (config.num_moe_experts or 0) if rule.experts else 0
        for i, prefix in sorted(prefixes.items()):
            if not rule.layers(config, i):
                continue
            key = f"{prefix}.{rest}"
            expanded[key] = TensorRule(
                key=key,
                hf=tuple(
                    name.replace("{i}", str(i)).replace("{e}", str(e))
                    for e in range(1 if rule.packed else stack or 1)
                    for name in names
                ),
                groups=rule.layout.groups(config) if rule.layout else 1,
                rows=(rule.layout.rows(config) if rule.layout else ()) * (stack or 1),
                vocabulary=rule.vocabulary,
                copies=tuple(rule.mtp_copy.replace("{i}", str(layer)) for layer in ahead) if rule.mtp_copy else (),
                stack=stack,
                packed=rule.packed,
                transposed=rule.transposed,
            )
    return expanded


# Rule groups that families share (Hugging Face's decoder naming). The two halves of a layer: mixer and ffn.
EMBEDDINGS = (
    Rule(
        "embedding.weight",
        "model.embed_tokens.weight",
        vocabulary=True,
        mtp_copy="model.layers.{i}.embed_tokens.weight",
    ),
    Rule("final_norm.weight", "model.norm.weight"),
    Rule("head.weight", "lm_head.weight", vocabulary=True, mtp_copy="model.layers.{i}.shared_head.head.weight"),
)
# What a layer of multi-token prediction has beside an ordinary layer (which the other rules give it).
MTP = (
    Rule("mtp.enorm.weight", "model.layers.{i}.enorm.weight"),
    Rule("mtp.hnorm.weight", "model.layers.{i}.hnorm.weight"),
    Rule("mtp.eh_proj.weight", "model.layers.{i}.eh_proj.weight"),
    Rule("mtp.final_layernorm.weight", "model.layers.{i}.shared_head.norm.weight"),
)
_SELF_ATTENTION = "model.layers.{i}.self_attn."
_PROJECTIONS = tuple(f"{_SELF_ATTENTION}{name}_proj" for name in "qkv")
ATTENTION = (
    Rule("mixer.linear_qkv.layer_norm_weight", "model.layers.{i}.input_layernorm.weight"),
    Rule("mixer.linear_qkv.weight", tuple(f"{name}.weight" for name in _PROJECTIONS), QKV),
    Rule(
        "mixer.linear_qkv.bias",
        tuple(f"{name}.bias" for name in _PROJECTIONS),
        QKV,
        when=lambda config: config.add_qkv_bias or config.add_bias_linear,
    ),
    Rule("mixer.linear_proj.weight", f"{_SELF_ATTENTION}o_proj.weight"),
    Rule("mixer.linear_proj.bias", f"{_SELF_ATTENTION}o_proj.bias", when=lambda config: config.add_bias_linear),
    Rule("mixer.q_layernorm.weight", f"{_SELF_ATTENTION}q_norm.weight", when=lambda config: config.qk_layernorm),
    Rule("mixer.k_layernorm.weight", f"{_SELF_ATTENTION}k_norm.weight", when=lambda config: config.qk_layernorm),
)
_GATE_UP = ("model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj")


def _dense(config: TransformerConfig, layer: int) -> bool:
    return not is_moe_layer(config, layer)


GATED_MLP = (
    Rule("ffn.linear_fc1.layer_norm_weight", "model.layers.{i}.post_attention_layernorm.weight", layers=_dense),
    Rule("ffn.linear_fc1.weight", tuple(f"{name}.weight" for name in _GATE_UP), GATED, layers=_dense),
    Rule(
        "ffn.linear_fc1.bias",
        tuple(f"{name}.bias" for name in _GATE_UP),
        GATED,
        when=lambda config: config.add_bias_linear,
        layers=_dense,
    ),
    Rule("ffn.linear_fc2.weight", "model.layers.{i}.mlp.down_proj.weight", layers=_dense),
    Rule(
        "ffn.linear_fc2.bias",
        "model.layers.{i}.mlp.down_proj.bias",
        when=lambda config: config.add_bias_linear,
        layers=_dense,
    ),
)


def experts(*, prefix: str, gate: str, up: str, down: str, router: str) -> tuple[Rule, ...]:
    """The feed-forward half of a MoE layer: router, and gated experts whose Hugging Face names start with `prefix`."""
    expert = f"{prefix}experts.{{e}}."
    return (
        Rule("layer.pre_mlp_layernorm.weight", "model.layers.{i}.post_attention_layernorm.weight", layers=is_moe_layer),
        Rule("ffn.router.weight", f"{prefix}{router}.weight", layers=is_moe_layer),
        Rule(
            "experts.linear_fc1.weight",
            (f"{expert}{gate}.weight", f"{expert}{up}.weight"),
            EXPERT_GATED,
            experts=True,
            layers=is_moe_layer,
        ),
        Rule("experts.linear_fc2.weight", f"{expert}{down}.weight", EXPERT_DOWN, experts=True, layers=is_moe_layer),
    )


def shared_experts(prefix: str) -> tuple[Rule, ...]:
    """The expert that every token passes, whose Hugging Face names start with `prefix`."""

    def there(config: TransformerConfig) -> bool:
        return config.moe_shared_expert_intermediate_size is not None

    gate, up, down = (f"{prefix}{name}_proj.weight" for name in ("gate", "up", "down"))
    return (
        Rule("shared.linear_fc1.weight", (gate, up), SHARED_GATED, when=there, layers=is_moe_layer),
        Rule("shared.linear_fc2.weight", down, when=there, layers=is_moe_layer),
    )


EXPERTS = experts(prefix="model.layers.{i}.mlp.", gate="gate_proj", up="up_proj", down="down_proj", router="gate")
# A number an expert, added to its score where the top k are chosen and nowhere else: a buffer, not a parameter.
CORRECTION_BIAS = Rule(
    "ffn.router.expert_bias", "model.layers.{i}.mlp.gate.e_score_correction_bias", layers=is_moe_layer
)
