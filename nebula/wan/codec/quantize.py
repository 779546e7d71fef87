"""Blockwise symmetric integers (block-wise absmax scaling as in arXiv 2110.02861, uniform codes).

For a block b with absolute maximum m_b and L = 2^(bits−1) − 1: scale s_b = m_b / L rounded up to bf16, code
q_i = round_half_even(x_i / s_b), decoded x̂_i = q_i · s_b. As s_b ≥ m_b / L, |q_i| ≤ L and |x_i − x̂_i| ≤ s_b / 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from nebula.errors import PacketError, UsageError
from nebula.types import Json, Packet
from nebula.wan.codec import layout, wire

CHUNK = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Values worked on at a time: what stays in a core's cache, what keeps a GPU busy. Bounds the scratch memory."""

LARGEST = 2.0**127
"""Inputs from here on are refused with infinities and NaN: their decoded form could overflow fp32."""

SMALLEST_SCALE = 2.0**-126
"""The smallest normal number. No scale is zero or subnormal, so decoding never depends on how a device treats those."""


class Blockwise:
    """Array "values" (F32, whole blocks) becomes "codes" (U8) and "scales" (BF16, one per block); other arrays pass.

    Four-bit codes are stored plus 8, two per byte: the low nibbles hold the first half of a block, the high ones the
    second, so that both are contiguous.
    """

    lossless: ClassVar[bool] = False

    def __init__(self, bits: int, block: int) -> None:
        self.bits, self.block, self.align = bits, block, block

    def encode(self, packet: Packet) -> Packet:
        """Raises PacketError on NaN, infinities and absurd magnitudes, UsageError where there are no fp32 values."""
        values = packet.arrays.get("values")
        if values is None or values.dtype is not torch.float32:
            raise UsageError("codec step 'blockwise' found no fp32 values", hint="put it before 'zstd', and only once")
        blocks_NB = values.view(-1, self.block)
        scales_N = _scales(blocks_NB, self.bits)
        codes_NC = torch.empty(len(blocks_NB), self.block * self.bits // 8, dtype=torch.uint8, device=values.device)
        for part in _chunks(blocks_NB):
            _quantize(blocks_NB[part], scales_N[part], codes_NC[part], self.bits)
        others = {name: other for name, other in packet.arrays.items() if name != "values"}
        entry: dict[str, Json] = {"kind": "blockwise", "bits": self.bits, "block": self.block}
        return Packet(others | {"codes": codes_NC.view(-1), "scales": scales_N}, (*packet.trail, entry))

    @staticmethod
    def decode(packet: Packet) -> Packet:
        """One fp32 multiplication per value, so the result is the same on any device. Raises PacketError."""
        bits = wire.integer(packet.trail[-1], "bits", 4, 8)
        block = wire.integer(packet.trail[-1], "block", 8, layout.MAX_ALIGN)
        codes = wire.array(packet, "codes", torch.uint8)
        scales_N = wire.array(packet, "scales", torch.bfloat16)
        count = scales_N.numel() * block
        if bits not in (4, 8) or block % 2 or codes.numel() * 8 != count * bits or count > layout.read(packet).padded:
            raise PacketError(
                f"{codes.numel()} bytes of {bits}-bit codes do not fit {scales_N.numel()} blocks of {block}"
            )
        if not (scales_N.float() * 2.0 ** (bits - 1)).isfinite().all():
            raise PacketError("the packet holds a scale that is not finite")
        blocks_NB = torch.empty(scales_N.numel(), block, dtype=torch.float32, device=codes.device)
        codes_NC = codes.view(-1, block * bits // 8)
        for part in _chunks(blocks_NB):
            _dequantize(codes_NC[part], scales_N[part], blocks_NB[part], bits)
        others = {name: other for name, other in packet.arrays.items() if name not in ("codes", "scales")}
        return Packet(others | {"values": blocks_NB.view(-1)}, packet.trail[:-1])


def _chunks(blocks_NB: Tensor) -> Iterator[slice]:
    step = max(1, CHUNK[blocks_NB.device.type] // blocks_NB.shape[1])
    return (slice(start, start + step) for start in range(0, len(blocks_NB), step))


def _scales(blocks_NB: Tensor, bits: int) -> Tensor:
    """One bf16 per block, rounded up. Raises PacketError unless all values are finite and below LARGEST."""
    if not len(blocks_NB):
        return torch.empty(0, dtype=torch.bfloat16, device=blocks_NB.device)
    peak_N = torch.maximum(blocks_NB.amax(1), blocks_NB.amin(1).neg_())
    if not (peak_N < LARGEST).all():  # false for NaN
        raise PacketError("cannot encode values that are not finite", hint="look for a diverging loss on this cluster")
    exact_N = (peak_N / (2 ** (bits - 1) - 1)).clamp_min_(SMALLEST_SCALE)
    # bf16 is the upper half of fp32; adding just under one unit of that half before cutting rounds up.
    upper_N: Tensor = (exact_N.view(torch.int32) + 0xFFFF) >> 16
    return upper_N.to(torch.int16).view(torch.bfloat16)


def _quantize(blocks_NB: Tensor, scales_N: Tensor, codes_NC: Tensor, bits: int) -> None:
    rounded_NB = (blocks_NB / scales_N.float()[:, None]).round_()
    if bits == 8:
        codes_NC.view(torch.int8).copy_(rounded_NB)
        return
    low_NC, high_NC = rounded_NB.chunk(2, dim=1)
    codes_NC.copy_(torch.add(low_NC, high_NC, alpha=16).add_(8 + 8 * 16))


def _dequantize(codes_NC: Tensor, scales_N: Tensor, blocks_NB: Tensor, bits: int) -> None:
    if bits == 8:
        blocks_NB.copy_(codes_NC.view(torch.int8))
    else:
        low_NC, high_NC = blocks_NB.chunk(2, dim=1)
        low_NC.copy_(codes_NC & 15)
        high_NC.copy_(codes_NC >> 4)
        blocks_NB.sub_(8)
    blocks_NB.mul_(scales_N.float()[:, None])
