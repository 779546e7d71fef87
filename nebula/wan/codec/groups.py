"""Which slices of a packet share a step and tables, and the chunks in which they are coded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nebula.wan.codec.layout import Layout

CHUNK = 1 << 17
"""Values that share a stream: its fixed bytes are next to nothing, its arrays stay in a core's cache."""
SMALL = 1 << 12


@dataclass(frozen=True)
class Segment:
    """`count` values from `start` on of slice number `piece`; in "values" they begin at `at`."""

    piece: int
    start: int
    count: int
    at: int


Chunk = Sequence[Segment]


@dataclass(frozen=True)
class Group:
    """Slices by number, and their values in chunks of CHUNK, the last one shorter."""

    pieces: Sequence[int]
    chunks: Sequence[Chunk]


def groups(layout: Layout) -> tuple[Group, Group]:
    """The coarse slices, and the fine ones: of one dim (norms, biases) or few parameters (routers). If there are no
    others they are not small."""
    fine = [len(s.shape) < 2 or size < SMALL for s, size in zip(layout.slices, layout.sizes, strict=True)]
    if all(fine):
        fine = [False] * len(fine)
    starts = np.cumsum([0, *layout.rooms]).tolist()
    coarse, rest = ([number for number, small in enumerate(fine) if small is which] for which in (False, True))
    return _group(coarse, layout.sizes, starts), _group(rest, layout.sizes, starts)


def _group(pieces: Sequence[int], sizes: Sequence[int], starts: Sequence[int]) -> Group:
    chunks: list[list[Segment]] = []
    room = 0
    for piece in pieces:
        start = 0
        while start < sizes[piece]:
            if not room:
                chunks.append([])
                room = CHUNK
            count = min(room, sizes[piece] - start)
            chunks[-1].append(Segment(piece, start, count, starts[piece] + start))
            start, room = start + count, room - count
    return Group(pieces, chunks)
