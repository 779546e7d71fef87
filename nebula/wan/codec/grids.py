"""Number formats of 1 to 8 bits: which values a code stands for, in units of a scale per block.

    int8, int4   integers; the scale is the block's peak / (2^(bits−1) − 1)
    e3m0         0 and ±2^−6 … ±2^0 (the 4-bit floats of Streaming DiLoCo, arXiv 2501.18512); peak
    fp8          e4m3 without infinities (arXiv 2209.05433); peak / 448
    lloyd2       ±0.4528 and ±1.5104 (Max 1960, table I: the best four levels for a Gaussian); its σ, from the mean
                 magnitude of the block, which is σ·√(2/π)
    sign         −1 and +1; the mean magnitude, which is the scale of least squared error. The bit is set where x > 0,
                 as in daBNN (arXiv 1908.05858): zero counts as negative

`lloyd2` and `sign` have no zero: their zeros decode to a level.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from nebula.errors import PacketError

LARGEST = 2.0**127
"""Inputs from here on are refused with infinities and NaN: their decoded form could overflow fp32."""

SMALLEST_SCALE = 2.0**-126
"""The smallest normal number. No scale is zero or subnormal, so decoding never depends on how a device treats those."""


@dataclass(frozen=True)
class Grid:
    """`encode`: ratios to scales [N, B] → codes [N, B] U8, one each; may overwrite the ratios. Codes stand for
    `levels`, or, of 8 bits, are a `dtype`; none stands for a magnitude above `largest`. scale = peak of the block, or
    its `mean` magnitude, / `divisor`."""

    bits: int
    divisor: float
    largest: float
    encode: Callable[[Tensor], Tensor]
    levels: tuple[float, ...] = ()
    dtype: torch.dtype | None = None
    mean: bool = False


def _e3m0(ratios: Tensor) -> Tensor:
    """sign · 8 + exponent. Adding half a mantissa rounds the exponent up from 1.5 · 2^k on, the middle of 2^k and
    2^(k+1); what is above 2^−7, the middle of 0 and 2^−6, is at least 2^−6."""
    above = ratios.abs() > 2.0**-7
    bits = ratios.view(torch.int32)
    exponents = (((bits & 0x7FFFFFFF) + 0x400000) >> 23).sub_(127 - 7).clamp_(0, 7)
    return torch.maximum(exponents, above).add_((bits >> 28) & 8).to(torch.uint8)


def _lloyd2(ratios: Tensor) -> Tensor:
    middle = (0.4528 + 1.5104) / 2
    return (ratios > 0).to(torch.uint8).add_(ratios > middle).add_(ratios > -middle)


_POWERS = (0.0, *(2.0 ** (exponent - 7) for exponent in range(1, 8)))

GRIDS = {
    "int8": Grid(8, 127, 128, lambda x: x.round_().to(torch.int8).view(torch.uint8), dtype=torch.int8),
    "int4": Grid(4, 7, 8, lambda x: x.round_().add_(8).to(torch.uint8), levels=tuple(map(float, range(-8, 8)))),
    "e3m0": Grid(4, 1, 1, _e3m0, levels=(*_POWERS, *(-power for power in _POWERS))),
    "fp8": Grid(8, 448, 448, lambda x: x.to(torch.float8_e4m3fn).view(torch.uint8), dtype=torch.float8_e4m3fn),
    "lloyd2": Grid(2, math.sqrt(2 / math.pi), 1.5104, _lloyd2, levels=(-1.5104, -0.4528, 0.4528, 1.5104), mean=True),
    "sign": Grid(1, 1, 1, lambda x: (x > 0).to(torch.uint8), levels=(-1.0, 1.0), mean=True),
}
"""By the name that trails use."""


def peaks(blocks_NB: Tensor) -> Tensor:
    """[N] largest magnitudes. Raises PacketError unless all values are finite and below LARGEST."""
    peak_N = torch.maximum(blocks_NB.amax(1), blocks_NB.amin(1).neg_())
    if not (peak_N < LARGEST).all():  # false for NaN
        raise not_finite()
    return peak_N


def not_finite() -> PacketError:
    """For inputs that are infinite, NaN, or LARGEST and above."""
    return PacketError("cannot encode values that are not finite", hint="look for a diverging loss on this cluster")


def sums(x_NB: Tensor) -> Tensor:
    """[N] sums over rows, which are overwritten. Halves are added elementwise until one column is left: a fixed tree of
    single IEEE additions, so that the bits are the same on any device and for any number of threads."""
    while (width := x_NB.shape[1]) > 1:
        half = (width + 1) // 2
        x_NB[:, : width - half].add_(x_NB[:, half:])
        x_NB = x_NB[:, :half]
    return x_NB[:, 0]


def scales(grid: Grid, blocks_NB: Tensor, peak_N: Tensor, filled_N: Tensor) -> Tensor:
    """[N] bf16, rounded up, of which the mean is over the `filled_N` values that are no padding."""
    size_N = peak_N
    if grid.mean:
        # 2^−16: even the longest block of the largest values sums to less than infinity.
        size_N = sums(blocks_NB.abs().mul_(2.0**-16)).div_(filled_N).mul_(2.0**16)
    exact_N = (size_N / grid.divisor).clamp_min_(SMALLEST_SCALE)
    # bf16 is the upper half of fp32; adding just under one unit of that half before cutting rounds up.
    upper_N: Tensor = (exact_N.view(torch.int32) + 0xFFFF) >> 16
    return upper_N.to(torch.int16).view(torch.bfloat16)


def encode(grid: Grid, blocks_NB: Tensor, scales_N: Tensor) -> Tensor:
    """[N, B · bits / 8] bytes; the first value of a byte lies in its lowest bits."""
    codes_NB = grid.encode(blocks_NB / scales_N.float()[:, None])
    return pack(codes_NB.view(-1), grid.bits).view(len(blocks_NB), blocks_NB.shape[1] * grid.bits // 8)


def values(grid: Grid, codes_NC: Tensor) -> Tensor:
    """[N, B] fp32 in units of the scale. Raises PacketError if a code stands for NaN."""
    if grid.dtype is not None:
        if grid.dtype.is_floating_point and ((codes_NC & 0x7F) == 0x7F).any():
            raise PacketError("the packet holds codes that stand for NaN")
        return codes_NC.view(grid.dtype).float()
    rows = _table(grid.levels, grid.bits, codes_NC.device).index_select(0, codes_NC.reshape(-1).int())
    return rows.view(len(codes_NC), codes_NC.shape[1] * 8 // grid.bits)


def pack(codes: Tensor, bits: int) -> Tensor:
    """U8 codes below 2^bits → bytes of 8 / bits codes each.

    The codes of one byte are read as one integer of as many bytes; one multiplication moves code j from bit 8·j to bit
    bits·j of the top byte, and everything else out of it.
    """
    if bits == 8:
        return codes
    count = 8 // bits
    factor = sum(1 << (8 * (count - 1) - (8 - bits) * j) for j in range(count))
    wide = codes.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[count])
    return ((wide * factor) >> (8 * (count - 1))).to(torch.uint8)


@cache
def _table(levels: tuple[float, ...], bits: int, device: torch.device) -> Tensor:
    """[256, 8 / bits]: the values of each byte."""
    codes = torch.arange(256)[:, None] >> torch.arange(0, 8, bits)
    return torch.tensor(levels, dtype=torch.float32)[codes & (2**bits - 1)].to(device)
