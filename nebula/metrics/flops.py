"""What a run costs on paper: floating-point operations, and bytes over the WAN. Pure functions of the config."""

from __future__ import annotations

import math

from nebula.config import Adaptive, Blockwise, Codec, LowRank, Minifloat, Model, RandomK, TopK


def flops_per_token(model: Model, seq_len: int) -> float:
    """Forward and backward of one token: 6 per weight it passes through (Kaplan et al., arXiv 2001.08361, table 1),
    plus attention's 12 · layers · seq_len · dim, halved because it is causal. Recomputation does not count."""
    return 6.0 * active_parameters(model) + 6.0 * model.layers * seq_len * model.dim


def active_parameters(model: Model) -> int:
    """Weights of the matrix products one token passes through: the embedding is a lookup, the head is not; a dense
    block is as wide as `top_k` experts (gate, up and down each)."""
    head_dim = model.dim // model.heads
    attention = 2 * model.dim * model.dim + 2 * model.dim * model.kv_heads * head_dim
    feed_forward = 3 * model.dim * model.ffn_dim * model.top_k
    routers = (model.layers - model.dense_layers) * model.dim * model.experts
    return model.layers * (attention + feed_forward) + routers + model.dim * model.vocab


def data_parallel_bytes(params: int, inner_steps: int, clusters: int) -> int:
    """What the same training would send if every inner step exchanged bf16 gradients with the coordinator: 2 bytes
    per parameter, up and down, for each of `inner_steps` steps of each cluster."""
    return 2 * params * 2 * inner_steps * clusters


def bits_per_parameter(codec: Codec, model: Model) -> float:
    """Before entropy coding of the values, which makes it less; 32 where nothing is lossy. Low rank: of a matrix of
    `dim` rows and columns."""
    for step in codec.steps:
        match step:
            case Adaptive():
                return step.bits
            case Blockwise():
                return step.bits + 16 / step.block
            case Minifloat():
                return {"e3m0": 4 + 16 / step.block, "fp8": 8 + 16 / step.block, "bf16": 16.0}[step.format]
            case TopK():
                return (_kept_bits(step) + _support_bits(step.block, step.keep)) / step.block
            case RandomK():
                return _kept_bits(step) / step.block
            case LowRank():
                return min(32.0, 16 * step.rank * 2 / model.dim)
    return 32.0


def _kept_bits(step: TopK | RandomK) -> float:
    """The values of one block, and its scales: one bf16 for integers, two for two magnitudes."""
    return step.keep * step.bits + {2: 32, 8: 16, 32: 0}[step.bits]


def _support_bits(block: int, keep: int) -> float:
    """log2 of the number of ways to choose `keep` of `block`."""
    return (math.lgamma(block + 1) - math.lgamma(keep + 1) - math.lgamma(block - keep + 1)) / math.log(2)
