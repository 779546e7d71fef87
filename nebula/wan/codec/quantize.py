"""One scale and one code per value for each block (block-wise scaling as in arXiv 2110.02861); bf16 by truncation.

For a block b with scale s_b: code q_i = the grid's code for x_i / s_b, decoded x̂_i = level(q_i) · s_b. For integers of
peak m_b and L = 2^(bits−1) − 1, s_b = m_b / L rounded up to bf16, so |q_i| ≤ L and |x_i − x̂_i| ≤ s_b / 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from nebula.errors import PacketError
from nebula.types import Json, Packet
from nebula.wan.codec import grids, layout, wire

CHUNK = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Values worked on at a time: what stays in a core's cache, what keeps a GPU busy. Bounds the scratch memory."""


class Blockwise:
    """Array "values" (F32, whole blocks) becomes "codes" (U8) and "scales" (BF16, one per block); others pass."""

    lossless: ClassVar[bool] = False

    def __init__(self, format: str, block: int) -> None:
        self._format, self._grid, self._block, self.align = format, grids.GRIDS[format], block, block

    def encode(self, packet: Packet) -> Packet:
        """Leaves x − x̂ in "values". Raises PacketError on NaN, infinities and absurd magnitudes."""
        values = packet.arrays["values"]
        blocks_NB = values.view(-1, self._block)
        peak_N = grids.peaks(blocks_NB)
        filled_N = layout.filled(packet).to(values.device)
        scales_N = torch.empty(len(blocks_NB), dtype=torch.bfloat16, device=values.device)
        width = self._block * self._grid.bits // 8
        codes_NC = torch.empty(len(blocks_NB), width, dtype=torch.uint8, device=values.device)
        for part in chunks(blocks_NB):
            scales_N[part] = grids.scales(self._grid, blocks_NB[part], peak_N[part], filled_N[part])
            codes_NC[part] = grids.encode(self._grid, blocks_NB[part], scales_N[part])
            decoded_NB = grids.values(self._grid, codes_NC[part]).mul_(scales_N[part].float()[:, None])
            blocks_NB[part].sub_(decoded_NB)
        entry: dict[str, Json] = {"kind": "blockwise", "format": self._format, "block": self._block}
        return replaced(packet, ("values",), {"codes": codes_NC.view(-1), "scales": scales_N}, entry)

    @staticmethod
    def decode(packet: Packet) -> Packet:
        """One fp32 multiplication per value, so the result is the same on any device. Raises PacketError."""
        name = packet.trail[-1].get("format")
        if not isinstance(name, str) or name not in grids.GRIDS:
            raise PacketError(f"unknown number format, supported: {', '.join(grids.GRIDS)}")
        grid, block = grids.GRIDS[name], wire.integer(packet.trail[-1], "block", 8, layout.MAX_ALIGN)
        codes = wire.array(packet, "codes", torch.uint8)
        count, rest = divmod(layout.read(packet).padded, block)
        scales_N = finite(wire.array(packet, "scales", torch.bfloat16), grid.largest)
        if rest or block * grid.bits % 8 or len(scales_N) != count or codes.numel() * 8 != count * block * grid.bits:
            raise PacketError(
                f"{codes.numel()} bytes of {name} and {len(scales_N)} scales do not fit blocks of {block}"
            )
        codes_NC = codes.view(count, block * grid.bits // 8)
        blocks_NB = torch.empty(count, block, dtype=torch.float32, device=codes.device)
        for part in chunks(blocks_NB):
            torch.mul(grids.values(grid, codes_NC[part]), scales_N[part].float()[:, None], out=blocks_NB[part])
        return replaced(packet, ("codes", "scales"), {"values": blocks_NB.view(-1)})


class BFloat16:
    """Array "values" (F32) becomes "codes" (BF16), rounded to the nearest; others pass. Zstd splits the byte planes."""

    lossless: ClassVar[bool] = False
    align: ClassVar[int] = 1

    def encode(self, packet: Packet) -> Packet:
        """Leaves x − x̂ in "values". Raises PacketError on NaN, infinities and absurd magnitudes."""
        values = packet.arrays["values"]
        if len(values):
            grids.peaks(values[None])
        codes = torch.empty_like(values, dtype=torch.bfloat16)
        for part in chunks(values[:, None]):
            codes[part] = values[part]
            values[part].sub_(codes[part])
        return replaced(packet, ("values",), {"codes": codes}, {"kind": "bf16"})

    @staticmethod
    def decode(packet: Packet) -> Packet:
        """Raises PacketError."""
        codes = finite(wire.array(packet, "codes", torch.bfloat16), 1.0)
        if len(codes) != layout.read(packet).padded:
            raise PacketError(f"the packet holds {len(codes)} bf16 values, not those of its layout")
        return replaced(packet, ("codes",), {"values": codes.float()})


def chunks(blocks_NB: Tensor, times: int = 1) -> Iterator[slice]:
    """Rows to work on at a time, `times` CHUNK values; at least one chunk even of no rows."""
    step = max(1, times * CHUNK[blocks_NB.device.type] // blocks_NB.shape[1])
    return (slice(start, start + step) for start in range(0, max(1, len(blocks_NB)), step))


def finite(numbers: Tensor, factor: float) -> Tensor:
    """Numbers from a peer. Raises PacketError unless they are finite, times `factor` too."""
    if len(numbers) and not float(numbers.abs().amax()) * factor <= torch.finfo(torch.float32).max:  # false for NaN
        raise PacketError("the packet holds a number that is not finite")
    return numbers


def replaced(
    packet: Packet, gone: tuple[str, ...], new: dict[str, Tensor], entry: dict[str, Json] | None = None
) -> Packet:
    """The packet with arrays `new` for those `gone`, and one trail entry more, or else the last one less."""
    arrays = {name: array for name, array in packet.arrays.items() if name not in gone} | new
    return Packet(arrays, (*packet.trail, entry) if entry is not None else packet.trail[:-1])
