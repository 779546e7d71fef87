"""The small language model of `training.py`: a byte-level transformer, several workers' copies at once (K first)."""

from __future__ import annotations

import math
import os
import statistics
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu, rms_norm, scaled_dot_product_attention

VOCAB, HEADS, LENGTH = 256, 4, 64

Parameters = dict[str, Tensor]


def start(seed: int, width: int, layers: int) -> Parameters:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    parameters = {"embed": draw(VOCAB, width, std=0.02), "place": draw(LENGTH, width, std=0.02)}
    deep = 1 / math.sqrt(2 * layers)
    for layer in range(layers):
        parameters |= {
            f"{layer}.norm1": torch.ones(width),
            f"{layer}.norm2": torch.ones(width),
            f"{layer}.qkv": draw(width, 3 * width, std=width**-0.5),
            f"{layer}.out": draw(width, width, std=width**-0.5 * deep),
            f"{layer}.up": draw(width, 4 * width, std=width**-0.5),
            f"{layer}.down": draw(4 * width, width, std=(4 * width) ** -0.5 * deep),
        }
    return parameters | {"norm": torch.ones(width), "head": draw(width, VOCAB, std=width**-0.5)}


def logits(p: Parameters, x_KBT: Tensor) -> Tensor:
    k, b, t = x_KBT.shape
    width, layers = p["embed"].shape[-1], sum(name.endswith(".up") for name in p)

    def normed(x_KND: Tensor, weight_KD: Tensor) -> Tensor:
        return rms_norm(x_KND, (width,), eps=1e-6) * weight_KD[:, None]

    h = (p["embed"][torch.arange(k)[:, None, None], x_KBT] + p["place"][:, None, :t]).view(k, b * t, width)
    for layer in range(layers):
        qkv = torch.bmm(normed(h, p[f"{layer}.norm1"]), p[f"{layer}.qkv"])
        q, key, v = qkv.view(k * b, t, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, key, v, is_causal=True).transpose(1, 2).reshape(k, b * t, width)
        h = h + torch.bmm(mixed, p[f"{layer}.out"])
        wide = gelu(torch.bmm(normed(h, p[f"{layer}.norm2"]), p[f"{layer}.up"]))
        h = h + torch.bmm(wide, p[f"{layer}.down"])
    return torch.bmm(normed(h, p["norm"]), p["head"])


def loss(p: Parameters, s_KBT: Tensor) -> Tensor:
    """Mean over all tokens of all workers."""
    return cross_entropy(logits(p, s_KBT[..., :-1]).flatten(0, 1), s_KBT[..., 1:].flatten())


def corpus() -> tuple[Tensor, Tensor]:
    """Bytes to train on, and the last twentieth to evaluate on."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    data = torch.frombuffer(bytearray(b"\n".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()
    cut = len(data) * 19 // 20
    return data[:cut], data[cut:]


@torch.no_grad()
def evaluated(p: Parameters, held_out: Tensor, windows: int) -> float:
    count = min(len(held_out) // (LENGTH + 1), windows)
    s_1NT = held_out[: count * (LENGTH + 1)].view(1, count, LENGTH + 1)
    one = {name: value[None] for name, value in p.items()}
    return statistics.fmean(float(loss(one, part)) for part in s_1NT.split(128, 1))
