"""What a run costs on paper: floating-point operations, and bytes over the WAN. Pure functions of the config."""

from __future__ import annotations

from nebula.config import Blockwise, Codec, Model


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


def bits_per_parameter(codec: Codec) -> float:
    """Before entropy coding, which makes it less: `bits` and a bf16 scale per block, or fp32 where nothing is lossy."""
    bits = 32.0
    for step in codec.steps:
        if isinstance(step, Blockwise):
            bits = step.bits + 16 / step.block
    return bits
