"""The formats of others, written from their published descriptions: what they put on the wire, packed to the bit.

A format turns one tensor into named arrays, and back. Their speeds are those of this code on a CPU, which works in
pieces that fit a core's cache as Nebula's does; the systems they come from have kernels of their own. What frames them
on the wire is not counted, in their favour. Scales that are published as fp16 are bf16 here: same bits, and deltas are
smaller than what fp16 reaches.

    int8/256        symmetric integers by the block's absolute maximum (arXiv 2110.02861 with uniform codes)
    min-max u8      256 steps between a tensor's extremes (PCCL's)
    6-sigma u8      256 steps over six standard deviations, then each step's mean as its value (hivemind's)
    nf4/64          quantiles of the normal distribution (arXiv 2305.14314, appendix E), fp32 scales as NVFlare sends
    int4/64         as int8/256
    E3M0/64         sign and a power of two: Streaming DiLoCo's outer gradients (arXiv 2501.18512)
    2 bit/64        the Lloyd–Max quantiser of a Gaussian with the block's energy
    1 bit/64        sign, and the block's mean magnitude (arXiv 1802.04434 with a scale)
    SparseLoCo      the 64 largest of 4096 as sign and one of two magnitudes, with indices of 12 bits (arXiv 2508.15706)
    PowerSGD        factors of rank 8 in fp32 (arXiv 1905.13727); what is no matrix, or too small, is sent as it is
    bf16
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from nebula.types import Slice
from nebula.wan.codec.measure import Tensors

Parts = Mapping[str, Tensor]

CHUNK = 1 << 16
"""Values worked on at a time."""

TINY = 1e-30
"""Scales are at least this: a block of zeros divides by something."""


class Format(Protocol):
    def encode(self, x: Tensor) -> Parts: ...
    def decode(self, parts: Parts, shape: tuple[int, ...]) -> Tensor: ...


class PerTensor:
    """A format as a measure.Coder: every tensor alone."""

    def __init__(self, form: Format) -> None:
        self._format = form

    def encode(self, tensors: Tensors) -> dict[Slice, Parts]:
        return {where: self._format.encode(x) for where, x in tensors.items()}

    def decode(self, sent: Mapping[Slice, Parts]) -> dict[Slice, Tensor]:
        return {where: self._format.decode(parts, where.shape) for where, parts in sent.items()}

    def sizes(self, sent: Mapping[Slice, Parts]) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for parts in sent.values():
            for name, array in parts.items():
                sizes[name] = sizes.get(name, 0) + array.nbytes
        return sizes


# --- blocks, each coded alone -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Blocks:
    """The last block is padded with zeros. `quantize`: [N, block] to arrays whose first axis is N."""

    block: int
    quantize: Callable[[Tensor], Parts]
    dequantize: Callable[[Parts], Tensor]

    def encode(self, x: Tensor) -> Parts:
        x_NB = F.pad(x.reshape(-1), (0, -x.numel() % self.block)).view(-1, self.block)
        pieces = [self.quantize(piece) for piece in x_NB.split(self._rows)]
        return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}

    def decode(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        pieces = zip(*(array.split(self._rows) for array in parts.values()), strict=True)
        x_NB = torch.cat([self.dequantize(dict(zip(parts, piece, strict=True))) for piece in pieces])
        return x_NB.view(-1)[: prod(shape)].view(shape)

    @property
    def _rows(self) -> int:
        return max(1, CHUNK // self.block)


def integers(bits: int, block: int) -> Blocks:
    limit = 2 ** (bits - 1) - 1

    def quantize(x_NB: Tensor) -> Parts:
        scales_N = (x_NB.abs().amax(1) / limit).clamp_min_(TINY).bfloat16()
        steps_NB = (x_NB / scales_N[:, None]).round_().clamp_(-limit, limit).add_(limit + 1)
        return {"codes": packed(steps_NB.to(torch.uint8), bits), "scales": scales_N}

    def dequantize(parts: Parts) -> Tensor:
        return (unpacked(parts["codes"], bits).float() - (limit + 1)).mul_(parts["scales"].float()[:, None])

    return Blocks(block, quantize, dequantize)


def levels(levels_L: Tensor, bits: int, block: int, scale_dtype: torch.dtype, rms: bool = False) -> Blocks:
    """The nearest of these levels, times the block's absolute maximum, or its root mean square."""
    borders = (levels_L[1:] + levels_L[:-1]) / 2

    def quantize(x_NB: Tensor) -> Parts:
        size_N = x_NB.square().mean(1).sqrt_() if rms else x_NB.abs().amax(1)
        scales_N = size_N.clamp_min_(TINY).to(scale_dtype)
        codes_NB = torch.bucketize(x_NB / scales_N[:, None], borders, out_int32=True)
        return {"codes": packed(codes_NB.to(torch.uint8), bits), "scales": scales_N}

    def dequantize(parts: Parts) -> Tensor:
        return levels_L[unpacked(parts["codes"], bits).int()].mul_(parts["scales"].float()[:, None])

    return Blocks(block, quantize, dequantize)


def normal_floats() -> Tensor:
    """Eight quantiles above zero, seven below and zero itself, the outermost as far out as an average of the two
    natural choices puts it, over the largest."""
    end = 1 - (1 / 32 + 1 / 30) / 2
    above = torch.special.ndtri(torch.linspace(0.5, end, 9, dtype=torch.float64)[1:])
    below = -torch.special.ndtri(torch.linspace(0.5, end, 8, dtype=torch.float64)[1:])
    return (torch.cat([below.flip(0), torch.zeros(1), above]) / above[-1]).float()


def powers_of_two() -> Tensor:
    """±1, ±1/2, … ±1/128."""
    above = 2.0 ** torch.arange(-7, 1)
    return torch.cat([-above.flip(0), above])


LLOYD_MAX = torch.tensor([-1.5104, -0.4528, 0.4528, 1.5104])
"""Max (1960), table I, N = 4."""


def signs(block: int) -> Blocks:
    def quantize(x_NB: Tensor) -> Parts:
        return {"codes": packed((x_NB > 0).to(torch.uint8), 1), "scales": x_NB.abs().mean(1).bfloat16()}

    def dequantize(parts: Parts) -> Tensor:
        return (unpacked(parts["codes"], 1).float() * 2 - 1).mul_(parts["scales"].float()[:, None])

    return Blocks(block, quantize, dequantize)


def largest(count: int, block: int) -> Blocks:
    """Sign and size are a bit each; sizes are the means of the kept below and above their own mean."""
    assert block == 1 << 12, "indices have 12 bits"

    def quantize(x_NB: Tensor) -> Parts:
        at_NK = x_NB.abs().topk(count, dim=1).indices
        x_NK = x_NB.gather(1, at_NK)
        size_NK = x_NK.abs()
        large_NK = size_NK > size_NK.mean(1, keepdim=True)
        scales_N2 = torch.stack([_mean_where(size_NK, ~large_NK), _mean_where(size_NK, large_NK)], dim=1)
        codes_NK = (x_NK > 0).to(torch.uint8) | large_NK.to(torch.uint8) << 1
        return {"codes": packed(codes_NK, 2), "support": packed_twelve(at_NK), "scales": scales_N2.bfloat16()}

    def dequantize(parts: Parts) -> Tensor:
        codes_NK, scales_N2 = unpacked(parts["codes"], 2), parts["scales"].float()
        x_NK = scales_N2.gather(1, (codes_NK >> 1).long()).mul_((codes_NK & 1).float() * 2 - 1)
        return torch.zeros(len(x_NK), block).scatter_(1, unpacked_twelve(parts["support"]), x_NK)

    return Blocks(block, quantize, dequantize)


def _mean_where(x_NK: Tensor, chosen_NK: Tensor) -> Tensor:
    return (x_NK * chosen_NK).sum(1) / chosen_NK.sum(1).clamp_min(1)


# --- whole tensors ------------------------------------------------------------------------------------------------


class MinMax:
    def encode(self, x: Tensor) -> Parts:
        low, high = x.aminmax()
        step = ((high - low) / 255).clamp_min_(TINY)
        return {"codes": ((x - low) / step).round_().to(torch.uint8), "scales": torch.stack([low, step])}

    def decode(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        low, step = parts["scales"]
        return parts["codes"].float().mul_(step).add_(low).view(shape)


class SixSigma:
    def encode(self, x: Tensor) -> Parts:
        mean = x.mean()
        step = (6 / 256 * (x - mean).square().mean().sqrt()).clamp_min_(TINY)
        codes = ((x - mean) / step).round_().add_(128).clamp_(0, 255).to(torch.uint8).view(-1)
        sums = torch.zeros(256).scatter_add_(0, codes.long(), x.reshape(-1))
        return {"codes": codes, "scales": sums / torch.bincount(codes, minlength=256).clamp_min_(1)}

    def decode(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        return parts["scales"][parts["codes"].int()].view(shape)


@dataclass(frozen=True, slots=True)
class PowerSGD:
    """Every tensor stands alone here: a second iteration takes the place of the factors of the round before. All dims
    but the last are rows, so that experts, which come stacked, are not flattened."""

    rank: int
    iterations: int = 2

    def encode(self, x: Tensor) -> Parts:
        if not self._rows(tuple(x.shape)):
            return {"values": x.reshape(-1)}
        x_MN = x.reshape(-1, x.shape[-1])
        q_NR = torch.randn(x_MN.shape[1], self.rank, generator=torch.Generator().manual_seed(0))
        for _ in range(self.iterations):
            p_MR = torch.linalg.qr(x_MN @ q_NR).Q
            q_NR = x_MN.T @ p_MR
        return {"codes": torch.cat([p_MR, q_NR])}

    def decode(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        if not (rows := self._rows(shape)):
            return parts["values"].view(shape)
        p_MR, q_NR = parts["codes"].split([rows, shape[-1]])
        return (p_MR @ q_NR.T).view(shape)

    def _rows(self, shape: tuple[int, ...]) -> int:
        """Of the matrix; 0 if its factors would not be smaller than the tensor."""
        rows = prod(shape[:-1])
        return rows if shape and self.rank * (rows + shape[-1]) < prod(shape) else 0


class BFloat16:
    def encode(self, x: Tensor) -> Parts:
        return {"values": x.bfloat16()}

    def decode(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        return parts["values"].float().view(shape)


# --- bits ---------------------------------------------------------------------------------------------------------


def packed(codes_NB: Tensor, bits: int) -> Tensor:
    """8 / bits codes per byte, from as many stretches of the row."""
    if bits == 8:
        return codes_NB
    first, *others = codes_NB.chunk(8 // bits, dim=1)
    whole = first.clone()
    for index, part in enumerate(others, 1):
        whole |= part << (bits * index)
    return whole


def unpacked(bytes_NC: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return bytes_NC
    return torch.cat([bytes_NC >> (bits * index) & (2**bits - 1) for index in range(8 // bits)], dim=1)


def packed_twelve(at_NK: Tensor) -> Tensor:
    """Two indices in three bytes."""
    a, b = at_NK.int().chunk(2, dim=1)
    return torch.cat([a & 255, b & 255, a >> 8 | b >> 8 << 4], dim=1).to(torch.uint8)


def unpacked_twelve(bytes_NC: Tensor) -> Tensor:
    a, b, tops = bytes_NC.long().chunk(3, dim=1)
    return torch.cat([a | (tops & 15) << 8, b | tops >> 4 << 8], dim=1)


FORMATS: Mapping[str, Format] = {
    "int8/256": integers(8, 256),
    "min-max u8": MinMax(),
    "6-sigma u8": SixSigma(),
    "nf4/64": levels(normal_floats(), 4, 64, torch.float32),
    "int4/64": integers(4, 64),
    "E3M0/64": levels(powers_of_two(), 4, 64, torch.bfloat16),
    "2 bit/64": levels(LLOYD_MAX, 2, 64, torch.bfloat16, rms=True),
    "1 bit/64": signs(64),
    "SparseLoCo": largest(64, 4096),
    "PowerSGD rank 8": PowerSGD(8),
    "bf16": BFloat16(),
}
