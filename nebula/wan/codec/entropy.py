"""Lossless compression with zstandard, and decompression that a hostile peer cannot turn into an allocation."""

from __future__ import annotations

from typing import ClassVar

import torch
import zstandard
from torch import Tensor

from nebula.errors import PacketError
from nebula.types import Json, Packet
from nebula.wan.codec import layout, wire

MAX_WINDOW = 1 << 23
"""The largest window that any level up to 19 uses, bytes."""


class Zstd:
    """Each array becomes one zstd frame (U8); the trail keeps [name, dtype, shape] of what it was.

    Bytes are grouped by significance first: the exponents of neighbours are alike, their mantissas are noise.
    """

    lossless: ClassVar[bool] = True
    align: ClassVar[int] = 1

    def __init__(self, level: int) -> None:
        self.level = level

    def encode(self, packet: Packet) -> Packet:
        compressor = zstandard.ZstdCompressor(level=self.level, write_content_size=True)
        arrays: dict[str, Tensor] = {}
        specs: list[Json] = []
        for name, tensor in packet.arrays.items():
            arrays[name] = wire.from_bytes(compressor.compress(wire.as_bytes(_by_significance(tensor))))
            specs.append([name, wire.NAMES[tensor.dtype], list(tensor.shape)])
        entry: dict[str, Json] = {"kind": "zstd", "arrays": specs}
        return Packet(arrays, (*packet.trail, entry))

    @staticmethod
    def decode(packet: Packet) -> Packet:
        """Raises PacketError, before anything is allocated, unless the sizes that trail and frames state agree and
        are what a packet of this layout can need: at most 8 bytes per value."""
        budget = 8 * layout.read(packet).padded
        arrays = {}
        for name, dtype_name, dims in wire.rows(packet.trail[-1], "arrays", 3):
            dtype, shape = wire.dtype_of(dtype_name), wire.integers(dims)
            size = wire.numel(shape) * dtype.itemsize
            budget -= size
            if not isinstance(name, str) or name in arrays or budget < 0:
                raise PacketError("the packet compresses one array twice, or more than its layout can need")
            raw = inflate(wire.as_bytes(wire.array(packet, name, torch.uint8)), size)
            arrays[name] = _by_element(wire.from_bytes(raw), dtype).view(shape)
        if arrays.keys() != layout.without_last(packet).arrays.keys():
            raise PacketError("the packet holds arrays that its trail does not name")
        return Packet({**packet.arrays, **arrays}, packet.trail[:-1])


def inflate(data: memoryview, size: int) -> bytes:
    """Decompress exactly one frame of exactly `size` bytes. Raises PacketError on anything else.

    zstandard allocates what a frame's header declares (and ignores `max_output_size` then), so that is compared with
    `size` first. From then on the output buffer itself is the cap: a frame that holds more ends in an error, not in
    more memory; so do a truncated frame, a second one, and trailing bytes.
    """
    try:
        frame = zstandard.get_frame_parameters(data)
        if frame.content_size != size:
            declared = (
                "no size" if frame.content_size == zstandard.CONTENTSIZE_UNKNOWN else f"{frame.content_size} bytes"
            )
            raise PacketError(f"a zstd frame declares {declared} where {size} bytes are due")
        if frame.window_size > max(MAX_WINDOW, size):
            raise PacketError(
                f"a zstd frame wants a window of {frame.window_size} bytes, at most {MAX_WINDOW} are allowed"
            )
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        raw: bytes = decompressor.decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise PacketError(f"a zstd frame is damaged: {error}") from error
    if len(raw) != size:
        raise PacketError(f"a zstd frame holds {len(raw)} bytes where {size} are due")
    return raw


def _by_significance(tensor: Tensor) -> Tensor:
    """All lowest bytes, then all second lowest, …: [n] of w bytes each → [w, n]."""
    return tensor.cpu().reshape(-1, 1).view(torch.uint8).T.contiguous()


def _by_element(planes: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo `_by_significance`: [w · n] bytes → [n] of `dtype`."""
    return planes.view(dtype.itemsize, -1).T.reshape(-1).view(dtype)
