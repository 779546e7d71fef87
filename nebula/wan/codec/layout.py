"""Many slices as one flat array: the first step of every pipeline, and the last of every decoding.

Each slice is padded with zeros to a multiple of `align`, so that no block of a later step mixes two tensors. The trail
entry is the only place where a packet states its size; every step bounds its own allocations by it.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from nebula.errors import PacketError, UsageError
from nebula.types import Json, Packet, Slice
from nebula.wan.codec import wire

MAX_ALIGN = 65536
MAX_SLICES = 1 << 14
"""In a packet: what it says of each takes a hundred times the memory that it takes on the wire."""
LAST = "last."


def capacity(elements: int) -> int:
    """The most values, padding included, that `elements` may take up: what keeps a hostile layout (many slices of one
    element, each padded to a huge block) from growing without bound."""
    return 2 * elements + 2**20


@dataclass(frozen=True)
class Layout:
    align: int
    slices: tuple[Slice, ...]

    @cached_property
    def sizes(self) -> list[int]:
        """Values of each slice."""
        return [wire.numel(piece.shape) for piece in self.slices]

    @cached_property
    def rooms(self) -> list[int]:
        """Values that each slice takes up, its padding included."""
        return [-(-size // self.align) * self.align for size in self.sizes]

    @cached_property
    def elements(self) -> int:
        return sum(self.sizes)

    @cached_property
    def padded(self) -> int:
        return sum(self.rooms)


def flatten(
    tensors: Mapping[Slice, Tensor],
    align: int,
    minus: Mapping[Slice, Tensor] | None = None,
    into: Tensor | None = None,
) -> Packet:
    """fp32 tensors, or what they differ by from `minus` (of any dtype), as one array "values", sorted by slice so that
    equal input gives equal packets; on the device of `minus`, or theirs. `into`: an array to use if it fits: one that
    the system has already given is faster to fill by half than a new one.

    Raises UsageError if `align` is so large that the packet would be mostly padding, or there are too many slices.
    """
    layout = Layout(align, tuple(sorted(tensors, key=lambda piece: (piece.name, piece.offset, piece.shape))))
    if len(tensors) > MAX_SLICES:
        raise UsageError(
            f"a fragment of {len(tensors)} tensors, at most {MAX_SLICES} are supported",
            hint="train with more fragments",
        )
    if layout.padded > capacity(layout.elements):
        raise UsageError(
            f"codec blocks of {align} would pad {layout.elements} parameters to {layout.padded}",
            hint="choose a smaller block",
        )
    device = next(iter((minus or tensors).values())).device if tensors else torch.device("cpu")
    if into is None or into.shape != (layout.padded,) or into.device != device:
        into = torch.empty(layout.padded, dtype=torch.float32, device=device)
    for piece, room in views(into, layout):
        tensor = tensors[piece]
        assert tensor.dtype is torch.float32, f"{piece} is {tensor.dtype}"
        assert tensor.shape == piece.shape, f"{piece} comes with {tuple(tensor.shape)}"
        if minus is None:
            room.copy_(tensor)
        elif tensor.device == device:
            torch.sub(tensor, minus[piece], out=room)
        else:
            room.copy_(tensor).sub_(minus[piece])
    packet = Packet({"values": into}, (_entry(layout),))
    clear_padding(packet)
    return packet


def _entry(layout: Layout) -> dict[str, Json]:
    slices: list[Json] = [[piece.name, list(piece.offset), list(piece.shape)] for piece in layout.slices]
    return {"kind": "layout", "align": layout.align, "slices": slices}


def read(packet: Packet) -> Layout:
    """What the packet says it holds. Raises PacketError if that is malformed or mostly padding."""
    entry = packet.trail[0] if packet.trail else {}
    if entry.get("kind") != "layout":
        raise PacketError("the packet's trail does not begin with a layout")
    align = wire.integer(entry, "align", 1, MAX_ALIGN)
    pieces = []
    rows = wire.rows(entry, "slices", 3)
    if len(rows) > MAX_SLICES:
        raise PacketError(f"the packet has {len(rows)} slices, at most {MAX_SLICES} are supported")
    for name, offset, shape in rows:
        piece = Slice(str(name), wire.integers(offset), wire.integers(shape))
        if not isinstance(name, str) or len(piece.offset) != len(piece.shape):
            raise PacketError("a slice of the packet has no name or an offset of another rank than its shape")
        pieces.append(piece)
    layout = Layout(align, tuple(pieces))
    if len(set(pieces)) != len(pieces):
        raise PacketError("the packet names one slice twice")
    if layout.padded > capacity(layout.elements):
        raise PacketError(f"the packet pads {layout.elements} parameters to {layout.padded}")
    return layout


def unflatten(packet: Packet) -> dict[Slice, Tensor]:
    """Views of "values", one per slice. Raises PacketError unless it is all there is and exactly as long as it says."""
    layout = read(packet)
    values = wire.array(packet, "values", torch.float32)
    if len(packet.trail) != 1 or len(packet.arrays) != 1 or values.numel() != layout.padded:
        raise PacketError(f"the packet does not hold just the {layout.padded} values that its layout needs")
    return dict(views(values, layout))


def with_last(packet: Packet, last: Mapping[Slice, Tensor]) -> Packet:
    """A packet with the update before it as arrays "last.0", "last.1" ..., one per slice; nothing is copied. Raises
    PacketError if a slice is missing there."""
    slices = read(packet).slices
    if missing := [piece for piece in slices if piece not in last]:
        raise PacketError(f"there is no update before this packet for {reprlib.repr(missing[0].name)}")
    return Packet({**packet.arrays, **{f"{LAST}{n}": last[piece] for n, piece in enumerate(slices)}}, packet.trail)


def last_of(packet: Packet) -> list[Tensor] | None:
    """What `with_last` put in, per slice; None without. Raises PacketError if it is not bf16 of the slices' shapes."""
    slices = read(packet).slices
    found = [packet.arrays.get(f"{LAST}{n}") for n in range(len(slices))]
    last = [values for values in found if values is not None]
    if not last:
        return None
    if [(v.dtype, v.shape) for v in last] != [(torch.bfloat16, piece.shape) for piece in slices]:
        raise PacketError("the update before this packet is of other shapes, or not bf16")
    return last


def without_last(packet: Packet) -> Packet:
    return Packet({n: a for n, a in packet.arrays.items() if not n.startswith(LAST)}, packet.trail)


def filled(packet: Packet) -> Tensor:
    """How many values of each block of `align` are no padding, on the host."""
    layout = read(packet)
    counts = torch.full((layout.padded // layout.align,), layout.align)
    pairs = zip(layout.sizes, accumulate(layout.rooms), layout.rooms, strict=True)
    last = [(end // layout.align - 1, layout.align - (room - size)) for size, end, room in pairs if room]
    if last:
        where, count = torch.tensor(last).T
        counts[where] = count
    return counts


def clear_padding(packet: Packet) -> None:
    """Put the zeros of `flatten` back into "values", where a step has worked in place."""
    layout = read(packet)
    for size, room in zip(layout.sizes, torch.split(packet.arrays["values"], layout.rooms), strict=True):
        room[size:].zero_()


def views(values: Tensor, layout: Layout) -> Iterator[tuple[Slice, Tensor]]:
    """Where each slice lies in "values", as views of its shape."""
    rooms = torch.split(values, layout.rooms) if layout.rooms else ()
    for piece, size, room in zip(layout.slices, layout.sizes, rooms, strict=True):
        yield piece, room[:size].view(piece.shape)
