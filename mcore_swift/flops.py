"""Model FLOPs of transformer training, and the peak of known GPUs: the two halves of TFLOP/s and MFU.

What is counted (so that numbers can be compared with others'):
* matrix products only, a multiply-add as 2; norms, RoPE, softmax, the loss and the optimizer are left out;
* *model* FLOPs: backward is twice forward, and recomputed activations are not counted again;
* causal attention counts half of the score matrix, and only inside documents: a batch is known by its number of tokens
  and by the sum of the squares of its documents' lengths (for unpacked rows of length s: rows · s²);
* of experts, those that a token is sent to, the router and the shared one; nothing for tokens dropped or padded;
* the output layer at the model's own vocabulary (without tensor-parallel padding), and where it is said how many
  labels count, for those positions only; the embedding look-up is free.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

BACKWARD_FACTOR = 2  # one product for the input's gradient, one for the weight's


@dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """The layers with experts: what a token passes of them, whichever experts it is sent to."""

    num_layers: int  # those of the decoder that have experts
    num_experts: int
    topk: int  # experts a token is sent to
    ffn_hidden_size: int  # of one expert
    shared_ffn_hidden_size: int = 0  # of the expert that every token passes
    shared_gate: bool = False


@dataclass(frozen=True, kw_only=True)
class LatentShape:
    """Multi-latent attention (DeepSeek-V2, arXiv 2405.04434): queries, keys and values come from narrow latents."""

    q_rank: int | None  # None: queries come straight from the hidden state
    kv_rank: int
    nope_dim: int  # a head's part without rotation
    rope_dim: int  # its rotated part, for keys the same for all heads
    v_dim: int


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """The sizes of a decoder that its FLOPs depend on, under Megatron's names."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int  # of a layer without experts
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int  # the size of one head
    vocab_size: int
    gated: bool  # SwiGLU-like feed-forward: three matrices instead of two
    experts: ExpertShape | None = None
    latent: LatentShape | None = None
    mtp_layers: int = 0  # trained layers of multi-token prediction, each like the last layer and with its own output


def _passes(backward: bool) -> int:
    return 1 + (BACKWARD_FACTOR if backward else 0)


def _attention_parameters(shape: DecoderShape) -> int:
    hidden, heads, latent = shape.hidden_size, shape.num_attention_heads, shape.latent
    if latent is None:
        query = heads * shape.kv_channels
        return hidden * (query + 2 * shape.num_query_groups * shape.kv_channels) + query * hidden
    query = heads * (latent.nope_dim + latent.rope_dim)
    queries = hidden * query if latent.q_rank is None else latent.q_rank * (hidden + query)
    keys_values = hidden * (latent.kv_rank + latent.rope_dim) + latent.kv_rank * heads * (
        latent.nope_dim + latent.v_dim
    )
    return queries + keys_values + heads * latent.v_dim * hidden


def _expert_parameters(shape: DecoderShape, experts: ExpertShape) -> int:
    """Of one layer with experts: the router, and what a token passes."""
    width = experts.topk * experts.ffn_hidden_size + experts.shared_ffn_hidden_size
    gates = experts.num_experts + experts.shared_gate
    return shape.hidden_size * ((3 if shape.gated else 2) * width + gates)


def matmul_parameters(shape: DecoderShape) -> int:
    """Parameters that take part in a matrix product with one token: the linear layers and the output layer.

    Of the experts, as many as a token is sent to: the active parameters.
    """
    dense = (3 if shape.gated else 2) * shape.hidden_size * shape.ffn_hidden_size
    attention, output = _attention_parameters(shape), shape.vocab_size * shape.hidden_size
    sparse = dense if shape.experts is None else _expert_parameters(shape, shape.experts)
    sparse_layers = 0 if shape.experts is None else shape.experts.num_layers
    decoder = shape.num_layers * attention + (shape.num_layers - sparse_layers) * dense + sparse_layers * sparse
    joined = 2 * shape.hidden_size * shape.hidden_size  # a hidden state and an embedding → a hidden state
    return decoder + output + shape.mtp_layers * (joined + attention + sparse + output)


def matmul_flops_per_token(shape: DecoderShape, *, backward: bool = True) -> int:
    """FLOPs of one token in all linear layers and the output layer; attention's core is `attention_flops`."""
    return 2 * matmul_parameters(shape) * _passes(backward)


def attention_flops(shape: DecoderShape, *, sum_squared_lengths: int, backward: bool = True) -> int:
    """FLOPs of causal attention's two products (QKᵀ and PV) over documents with Σ length² = `sum_squared_lengths`.

    Each product takes 2·length²·head_dim a head; the causal half of it is counted.
    """
    latent = shape.latent
    both = 2 * shape.kv_channels if latent is None else latent.nope_dim + latent.rope_dim + latent.v_dim
    layers = shape.num_layers + shape.mtp_layers
    products = 2 * layers * shape.num_attention_heads * both * sum_squared_lengths
    return products // 2 * _passes(backward)


def training_flops(
    shape: DecoderShape, *, tokens: int, sum_squared_lengths: int, labels: int | None = None, frozen: bool = False
) -> int:
    """Model FLOPs, forward and backward, of `tokens` positions in documents with the given Σ length².

    `labels`: how many of them have a label that counts; the others don't pass the output layer. None: all of them.
    `frozen`: the linear layers' weights get no gradient, so theirs are two products a layer in place of three. What
    adapters beside them take is not counted.
    """
    matmul = matmul_flops_per_token(shape, backward=False) * tokens
    if labels is not None:
        matmul -= 2 * shape.vocab_size * shape.hidden_size * (tokens - labels)
    matmul *= 2 if frozen else _passes(True)
    return matmul + attention_flops(shape, sum_squared_lengths=sum_squared_lengths)


# Dense tensor-core peaks in TFLOP/s, (bf16, fp8), both with fp32 accumulation. Source: NVIDIA's datasheets of the
# products (HGX, DGX and NVL72 pages for Blackwell) and, for GeForce and RTX, the architecture whitepapers' appendices.
# Datasheets quote the rate with 2:4 sparsity: halved here. None: the tensor cores lack the type.
_PEAK_TFLOPS: dict[str, tuple[float, float | None]] = {
    "A10": (125.0, None),
    "A30": (165.0, None),
    "A40": (149.7, None),
    "A100": (312.0, None),
    "A100 PCIE": (312.0, None),
    "A800": (312.0, None),
    "A800 PCIE": (312.0, None),
    "L4": (121.0, 242.5),
    "L40": (181.05, 362.1),
    "L40S": (362.05, 733.0),
    "H20": (148.0, 296.0),
    "H100": (989.5, 1979.0),
    "H100 PCIE": (756.5, 1513.0),
    "H100 NVL": (835.5, 1670.5),
    "H800": (989.5, 1979.0),
    "H800 PCIE": (756.5, 1513.0),
    "H200": (989.5, 1979.0),
    "H200 NVL": (835.5, 1670.5),
    "GH200": (989.5, 1979.0),
    "B200": (2250.0, 4500.0),
    "GB200": (2500.0, 5000.0),
    "B300": (2250.0, 4500.0),
    "GB300": (2500.0, 5000.0),
    "RTX 3090": (71.0, None),
    "RTX 4090": (165.2, 330.3),
    "RTX 5090": (209.5, 419.0),
    "RTX 6000 ADA": (364.2, 728.5),
}

# Words of a device's name that don't change its peak: maker, memory size and kind, module generation.
_PLAIN_WORDS = re.compile(r"NVIDIA|GEFORCE|GENERATION|TESLA|HGX|\d+G(I?B)?|HBM\d\w?|3E|SXM\d?|AC")


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak in FLOP/s of the device that `torch.cuda.get_device_name()` calls `device_name`, or None if unknown.

    `dtype` is "bf16" or "fp8"; other types have no entry. Every word of the name must be understood, so that a cut-down
    sibling ("RTX 4090 D", "RTX 4090 Laptop GPU", a MIG slice) is unknown rather than wrong.
    """
    words = [word for word in re.split(r"[\s-]+", device_name.upper()) if not _PLAIN_WORDS.fullmatch(word)]
    peaks = _PEAK_TFLOPS.get(" ".join(words))
    if peaks is None or dtype not in ("bf16", "fp8"):
        return None
    peak = peaks[0] if dtype == "bf16" else peaks[1]
    return None if peak is None else peak * 1e12
