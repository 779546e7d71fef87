"""What must hold for any bytes that are said to be a packet."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from memory import flat
from mutate import ELEMENTS, LIMIT, before

from nebula.errors import PacketError
from nebula.types import Slice
from nebula.wan.codec import decode
from nebula.wan.frame import unpack

MEMORY = 64 << 20
"""Bytes: the packet, ELEMENTS and as much padding as a layout may have (2^20 values), and scratch."""

MESSAGE = 1000
"""Letters: a peer does not fill the log."""

Result = dict[Slice, torch.Tensor] | str


def one_input(data: bytes) -> None:
    """Raises whatever escapes that is no PacketError, and AssertionError if the result is not what is documented."""
    for last in (None, before):
        with flat(MEMORY), warnings.catch_warnings():
            warnings.simplefilter("error")
            first = received(data, last)
            again = received(bytearray(data), last)  # views of it, not a copy
        assert same(first, again), "the same packet decodes to other bits"
        assert not isinstance(first, str) or len(first.encode()) < MESSAGE, "a peer decides how long a message is"


def received(data: bytes | bytearray, last: Callable[[Slice], torch.Tensor] | None) -> Result:
    """The values, or why there are none."""
    try:
        packet = unpack(data, max_bytes=LIMIT)
        decoded = decode(packet, max_elements=ELEMENTS, last=last)
    except PacketError as error:
        return error.message
    quantised = {entry.get("kind") for entry in packet.trail} - {"layout", "zstd"}
    assert not quantised or all(values.isfinite().all() for values in decoded.values()), "values are not finite"
    assert all(values.dtype is torch.float32 and values.shape == where.shape for where, values in decoded.items())
    assert sum(values.numel() for values in decoded.values()) <= ELEMENTS
    return decoded


def same(one: Result, other: Result) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    return one.keys() == other.keys() and all(
        torch.equal(values.view(torch.int32), other[where].view(torch.int32)) for where, values in one.items()
    )
