"""What a disk holds, twice: as programs see it, and as it would be found after a power failure.

POSIX promises little: the bytes of a file are safe once the file was fsynced, a name once its folder was. Whatever came
after the last fsync may have reached the disk whole, in part, or not at all, in any order; sectors of 512 bytes alone
are atomic, and so is a rename. A file may have grown without its bytes: zeros or another file's old sectors are there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, MutableMapping
from typing import TypeAlias

SECTOR = 512

Fill: TypeAlias = Callable[[int], bytes]


class File:
    """Bytes. `data` is what programs see."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._durable = bytearray()
        self._pending: list[tuple[int, bytes | None]] = []  # (offset, bytes written) or (new size, None), oldest first

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        _place(self.data, offset, data)
        self._pending.append((offset, data))

    def truncate(self, size: int) -> None:
        _resize(self.data, size)
        self._pending.append((size, None))

    def sync(self) -> None:
        for offset, data in self._pending:
            _apply(self._durable, offset, data)
        self._pending.clear()

    def lose_power(self, rng: random.Random) -> None:
        luck = _luck(rng)
        for offset, data in self._pending:
            fate = luck()
            if fate == "kept":
                _apply(self._durable, offset, data)
            elif fate == "torn" and data:
                _tear(self._durable, offset, data, rng)
        self._pending.clear()
        self.data = bytearray(self._durable)

    def rot(self, rng: random.Random) -> None:
        """Flip one bit of what is on the disk, if anything is."""
        if not self._durable:
            return
        place, bit = rng.randrange(len(self._durable)), 1 << rng.randrange(8)
        for image in (self.data, self._durable):
            if place < len(image):
                image[place] ^= bit


class Folder:
    """Files and folders by name. `names` is what programs see."""

    def __init__(self) -> None:
        self.names: dict[str, Node] = {}
        self._durable: dict[str, Node] = {}
        self._pending: list[Mapping[str, Node | None]] = []

    def change(self, names: Mapping[str, Node | None]) -> None:
        """Give each name its new meaning, None for none: all of them or, after a power failure, none."""
        _rename(self.names, names)
        self._pending.append(names)

    def sync(self) -> None:
        for change in self._pending:
            _rename(self._durable, change)
        self._pending.clear()

    def lose_power(self, rng: random.Random) -> None:
        luck = _luck(rng)
        for change in self._pending:
            if luck() == "kept":
                _rename(self._durable, change)
        self._pending.clear()
        self.names = dict(self._durable)
        for node in self.names.values():
            node.lose_power(rng)


Node: TypeAlias = File | Folder


def _luck(rng: random.Random) -> Callable[[], str]:
    """The fate of each change since an fsync. All lost and all kept are likely: they are what mostly happens, and long
    strings of single fates would hardly ever lead there."""
    fates = rng.choice((["lost"], ["kept"], ["lost", "kept", "torn"]))
    return lambda: rng.choice(fates)


def _apply(image: bytearray, offset: int, data: bytes | None) -> None:
    if data is None:
        _resize(image, offset)
    else:
        _place(image, offset, data)


def _place(image: bytearray, offset: int, data: bytes, fill: Fill = bytes) -> None:
    if offset > len(image):
        image.extend(fill(offset - len(image)))
    image[offset : offset + len(data)] = data


def _resize(image: bytearray, size: int) -> None:
    del image[size:]
    image.extend(bytes(size - len(image)))


def _tear(image: bytearray, offset: int, data: bytes, rng: random.Random) -> None:
    """Let some sectors of a write reach the disk: the first ones, or any."""
    end = offset + len(data)
    sectors = range(offset // SECTOR, -(-end // SECTOR))
    first = rng.randrange(len(sectors) + 1)
    kept = sectors[:first] if rng.random() < 0.5 else sorted(rng.sample(sectors, first))
    fill: Fill = rng.choice((bytes, rng.randbytes))
    for sector in kept:
        start, stop = max(offset, sector * SECTOR), min(end, (sector + 1) * SECTOR)
        _place(image, start, data[start - offset : stop - offset], fill)
    if len(image) < end and rng.random() < 0.5:
        image.extend(fill(end - len(image)))


def _rename(names: MutableMapping[str, Node], change: Mapping[str, Node | None]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node
