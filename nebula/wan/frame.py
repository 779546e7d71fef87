"""Packets as bytes: magic, header length (u32), PacketHeader, then the raw arrays, little-endian and back to back.

The arrays come widest first, so each is aligned within the data. No pickle, no code, nothing that is not declared.
"""

from __future__ import annotations

import json
import reprlib
import struct
from collections.abc import Mapping, Sequence

import torch
import zstandard
from google.protobuf.message import DecodeError
from torch import Tensor

from nebula.errors import PacketError
from nebula.proto.v1.packet_pb2 import ArraySpec, PacketHeader
from nebula.types import Json, Packet
from nebula.wan.codec import wire
from nebula.wan.codec.entropy import inflate

MAGIC = b"NEBP"
VERSION = 2
PREAMBLE = struct.Struct("<4sI")

MAX_HEADER = 1 << 20
"""Bytes: room for about ten thousand slices."""

MAX_ARRAYS = 64


def pack(packet: Packet) -> bytes:
    """One copy of the arrays, wherever they lie. Raises PacketError if the receiver would refuse the header."""
    arrays = sorted(packet.arrays.items(), key=lambda item: (-item[1].itemsize, item[0]))
    trail = json.dumps(packet.trail, sort_keys=True, separators=(",", ":")).encode()
    header = PacketHeader(
        version=VERSION,
        arrays=[ArraySpec(name=name, dtype=wire.NAMES[x.dtype], shape=list(x.shape)) for name, x in arrays],
        trail=zstandard.ZstdCompressor(level=9, write_content_size=True).compress(trail),
        trail_size=len(trail),
    ).SerializeToString(deterministic=True)
    if len(trail) > MAX_HEADER or len(arrays) > MAX_ARRAYS:
        raise PacketError(
            f"{len(arrays)} arrays and a trail of {len(trail)} bytes exceed {MAX_ARRAYS} and {MAX_HEADER}",
            hint="split the fragment: it has too many slices",
        )
    return b"".join([PREAMBLE.pack(MAGIC, len(header)), header, *(wire.as_bytes(x) for _, x in arrays)])


def unpack(data: bytes | bytearray | memoryview, *, max_bytes: int) -> Packet:
    """The arrays are views of `data` if that is writable and aligned, else of one copy. Raises PacketError."""
    view = memoryview(data).cast("B")
    if not PREAMBLE.size <= len(view) <= max_bytes:
        raise PacketError(f"{len(view)} bytes are not a packet of {PREAMBLE.size} to {max_bytes} bytes")
    magic, length = PREAMBLE.unpack_from(view)
    if magic != MAGIC:
        raise PacketError(f"data that begins with {magic!r} is not a packet")
    if length > min(MAX_HEADER, len(view) - PREAMBLE.size):
        raise PacketError(
            f"a packet of {len(view)} bytes states a header of {length}, at most {MAX_HEADER} are allowed"
        )
    body = PREAMBLE.size + length
    header = _header(bytes(view[PREAMBLE.size : body]))
    return Packet(_arrays(header.arrays, view[body:]), _trail(header))


def _header(data: bytes) -> PacketHeader:
    try:
        header = PacketHeader.FromString(data)
    except DecodeError as error:
        raise PacketError(f"the packet header is damaged: {error}") from error
    if header.version != VERSION:
        raise PacketError(f"packet version {header.version}, supported: {VERSION}", hint="upgrade the older side")
    if len(header.arrays) > MAX_ARRAYS:
        raise PacketError(f"a packet of {len(header.arrays)} arrays, at most {MAX_ARRAYS} are allowed")
    return header


def _trail(header: PacketHeader) -> tuple[Mapping[str, Json], ...]:
    if header.trail_size > MAX_HEADER:
        raise PacketError(f"a packet with a trail of {header.trail_size} bytes, at most {MAX_HEADER} are allowed")
    text = inflate(memoryview(header.trail), header.trail_size)
    try:
        trail = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise PacketError(f"the packet trail is not JSON: {reprlib.repr(text)}") from error
    if not isinstance(trail, list) or not all(isinstance(entry, dict) for entry in trail):
        raise PacketError(f"the packet trail holds {reprlib.repr(text)}, not a list of objects")
    return tuple(trail)


def _refuse(constant: str) -> Json:
    raise ValueError(f"{constant} is not JSON")


def _arrays(specs: Sequence[ArraySpec], body: memoryview) -> dict[str, Tensor]:
    dtypes = [wire.dtype_of(spec.dtype) for spec in specs]
    sizes = [wire.numel(spec.shape) * dtype.itemsize for spec, dtype in zip(specs, dtypes, strict=True)]
    widths = [dtype.itemsize for dtype in dtypes]
    if len({spec.name for spec in specs}) != len(specs) or widths != sorted(widths, reverse=True):
        raise PacketError("the packet names one array twice, or its arrays do not come widest first")
    if sum(sizes) != len(body):
        raise PacketError(f"the packet declares {sum(sizes)} bytes of arrays and carries {len(body)}")
    pieces = torch.split(_tensor(body), sizes) if sizes else ()
    return {
        spec.name: piece.view(dtype).view(tuple(spec.shape))
        for spec, dtype, piece in zip(specs, dtypes, pieces, strict=True)
    }


def _tensor(body: memoryview) -> Tensor:
    """[bytes] U8, on memory that torch may write to and that is aligned for every dtype."""
    if body and not body.readonly:
        tensor = torch.frombuffer(body, dtype=torch.uint8)
        if tensor.data_ptr() % 8 == 0:
            return tensor
    return wire.from_bytes(body)
