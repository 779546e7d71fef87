"""How tensors become bytes, and the checks on whatever a peer wrote about them."""

from __future__ import annotations

import math
import reprlib
import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nebula.errors import PacketError
from nebula.types import Json, Packet

DTYPES: Mapping[str, torch.dtype] = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}
"""All that may cross the WAN, by the names of safetensors."""

NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

MAX_DIMS = 8
MAX_NUMEL = 2**48
"""Far beyond any tensor; keeps every product of sizes within 64 bits."""

assert sys.byteorder == "little", "packets are little-endian and are neither swapped on the way out nor in"


def dtype_of(name: Json) -> torch.dtype:
    if not isinstance(name, str) or name not in DTYPES:
        raise PacketError(f"unknown dtype {reprlib.repr(name)}, supported: {', '.join(DTYPES)}")
    return DTYPES[name]


def numel(shape: Sequence[int]) -> int:
    """Elements of a tensor of this shape. Raises PacketError where torch could not even describe it."""
    if len(shape) > MAX_DIMS:
        raise PacketError(f"a shape of {len(shape)} dims, at most {MAX_DIMS} are supported")
    count, least = math.prod(shape), min(shape, default=1)
    if least < 0 or (count if least else math.prod(max(size, 1) for size in shape)) > MAX_NUMEL:
        raise PacketError(f"impossible shape {reprlib.repr(list(shape))}")
    return count


def integer(entry: Mapping[str, Json], key: str, low: int, high: int) -> int:
    """`entry[key]`, if it is an integer in [low, high]. Raises PacketError otherwise."""
    value = entry.get(key)
    if type(value) is not int or not low <= value <= high:  # bool is an int, JSON's true is not one
        raise PacketError(f"{key} is {reprlib.repr(value)}, expected an integer from {low} to {high}")
    return value


def integers(value: Json) -> tuple[int, ...]:
    """A JSON list of at most MAX_DIMS non-negative integers."""
    if not isinstance(value, list) or len(value) > MAX_DIMS:
        raise PacketError(f"{reprlib.repr(value)} is not a list of at most {MAX_DIMS} integers")
    if {*map(type, value)} - {int} or not 0 <= min(value, default=0) <= max(value, default=0) <= MAX_NUMEL:
        raise PacketError(f"{reprlib.repr(value)} holds something other than integers from 0 to {MAX_NUMEL}")
    return tuple(value)


def rows(entry: Mapping[str, Json], key: str, columns: int) -> list[list[Json]]:
    """`entry[key]`, if it is a list of lists of `columns` items each. Raises PacketError otherwise."""
    value = entry.get(key)
    if not isinstance(value, list) or not all(isinstance(row, list) and len(row) == columns for row in value):
        raise PacketError(f"{key} is not a list of rows of {columns}")
    return value


def array(packet: Packet, name: str, dtype: torch.dtype) -> Tensor:
    """The 1-D array `name` of a packet. Raises PacketError if it is missing or something else."""
    found = packet.arrays.get(name)
    if found is None or found.dtype is not dtype or found.ndim != 1:
        raise PacketError(f"the packet has no 1-D {NAMES[dtype]} array {name!r}")
    return found


def from_bytes(data: bytes | memoryview) -> Tensor:
    """[bytes] U8: a copy, for torch wants memory that it may write to."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def as_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a tensor, copied only if it is on a device or not contiguous."""
    if not tensor.numel():  # may have strides that bytes cannot have
        return memoryview(b"")
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
