"""A payload in chunks, each named by its SHA-256. A transfer goes over several connections at once; one that breaks
loses the chunk under way and no other; and where a newer payload takes the place of the one that was asked for, only
the chunks in which they differ are fetched."""

from __future__ import annotations

import hashlib
import io
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from threading import Lock
from typing import TypeAlias

from nebula.clock import Clock, Task
from nebula.errors import PacketError
from nebula.proto.v1.run_pb2 import Manifest, PullHead

CHUNK_BYTES = 1 << 20
"""Of every chunk but the last: what a cut costs, for each connection."""

Coming: TypeAlias = Iterator[bytes]
"""The chunks that come with a head, in order; it may end before the last of them."""


def spans(size: int, chunk_bytes: int) -> list[tuple[int, int]]:
    """Offset and length of each chunk of `size` bytes."""
    return [(at, min(chunk_bytes, size - at)) for at in range(0, size, chunk_bytes)]


def manifest(payload: memoryview, chunk_bytes: int) -> Manifest:
    chunks = [hashlib.sha256(payload[at : at + length]).digest() for at, length in spans(len(payload), chunk_bytes)]
    return Manifest(bytes=len(payload), sha256=hashlib.sha256(payload).digest(), chunks=chunks)


def shared(chunks: Sequence[bytes], lanes: int) -> list[list[bytes]]:
    """What each of so many connections brings: every one of them a part from all along the payload, equal chunks once.
    Lanes for which nothing is left do not count."""
    once = list(dict.fromkeys(chunks))
    return [once[lane::lanes] for lane in range(min(lanes, len(once)))]


class Assembly:
    """The payload that a manifest describes, while its chunks come in, in any order and from any thread. What `before`
    has of them is taken over. `what`: how messages call it. `moved`: bytes that came.

    Raises PacketError if the manifest contradicts itself."""

    def __init__(self, manifest: Manifest, chunk_bytes: int, what: str, before: Assembly | None = None) -> None:
        size, chunks = manifest.bytes, manifest.chunks
        if len(chunks) != -(-size // chunk_bytes) or len(manifest.sha256) != hashlib.sha256().digest_size:
            raise PacketError(f"{what}: {size} bytes are not {len(chunks)} chunks")
        self._what, self._sha256, self.moved = what, manifest.sha256, 0
        self._chunks = tuple(chunks)
        self._places: dict[bytes, list[tuple[int, int]]] = {}
        for chunk, span in zip(chunks, spans(size, chunk_bytes), strict=True):
            self._places.setdefault(chunk, []).append(span)
        self._missing = dict.fromkeys(chunks)
        self._hash, self._unhashed = hashlib.sha256(), deque(chunks)
        self._whole = io.BytesIO()  # grows with what comes, and its value is no second copy
        self._lock = Lock()
        if before is not None:
            self._take(before)

    def missing(self) -> list[bytes]:
        """Each once, in the order of their first places."""
        with self._lock:
            return list(self._missing)

    def places(self) -> list[int]:
        """The numbers of all chunks that are missing."""
        missing = set(self.missing())
        return [number for number, chunk in enumerate(self._chunks) if chunk in missing]

    def put(self, chunk: bytes, data: bytes) -> None:
        """Raises PacketError if `data` is not that chunk, or that is none."""
        fits = all(length == len(data) for _, length in self._places.get(chunk, [(0, -1)]))
        if not fits or hashlib.sha256(data).digest() != chunk:
            raise PacketError(f"{self._what}: {len(data)} bytes came that are not chunk {chunk.hex()[:12]}…")
        with self._lock:
            self.moved += len(data)
            self._fill(chunk, data)

    def whole(self) -> bytes:
        """Once nothing is missing. Raises PacketError if that is not the payload the manifest names."""
        assert not self._missing
        if self._hash.digest() != self._sha256:
            raise PacketError(f"{self._what}: its chunks are right, and together they are something else")
        return self._whole.getvalue()

    def _fill(self, chunk: bytes, data: bytes) -> None:
        for at, _ in self._places[chunk]:
            self._whole.seek(at)
            self._whole.write(data)
        self._missing.pop(chunk, None)
        while self._unhashed and self._unhashed[0] not in self._missing:  # as it comes, and not all at the end
            self._hash.update(self._read(self._unhashed.popleft()))

    def _read(self, chunk: bytes) -> bytes:
        at, length = self._places[chunk][0]
        self._whole.seek(at)
        return self._whole.read(length)

    def _take(self, before: Assembly) -> None:
        for chunk in self._places.keys() & before._places.keys() - before._missing.keys():
            self._fill(chunk, before._read(chunk))


def fetch(
    begin: Callable[[], tuple[PullHead, Coming]],
    chunks: Callable[[PullHead, list[bytes], Assembly, int], bool],
    clock: Clock,
    chunk_bytes: int,
    lanes: int,
) -> tuple[PullHead, bytes, int]:
    """A head, the payload it describes, and how many bytes of chunks came for it; b"" if that head has none.

    `begin` asks for the head: with it come the chunks that are the share of lane 0, or none. `chunks` fetches some that
    it names, over a lane, whatever it takes; False says that this payload is no longer kept, and the newest head is
    asked for. Raises what the two raise, and PacketError if what they return contradicts itself."""
    moved, before, state = 0, None, None
    while True:
        head, coming = begin()
        if not head.HasField("payload"):
            return head, b"", moved
        if before is not None and head.version <= before:
            raise PacketError(f"fragment {head.fragment!r} version {before} is said to be gone, and to be the newest")
        before = head.version
        what = f"fragment {head.fragment!r} version {head.version}"
        state = Assembly(head.payload, chunk_bytes, what, state)
        shares = shared(state.missing(), lanes) or [[]]
        beside = [
            Task(clock, "chunks", partial(chunks, head, share, state, lane))
            for lane, share in enumerate(shares[1:], start=1)
        ]
        try:
            for chunk, data in zip(shares[0], coming, strict=False):
                state.put(chunk, data)
            left = [chunk for chunk in shares[0] if chunk in set(state.missing())]
            kept = not left or chunks(head, left, state, 0)
        finally:
            for lane in beside:  # whatever happens, none is left behind
                lane.wait()
        moved += state.moved
        if all([kept, *(lane.result() for lane in beside)]):
            return head, state.whole(), moved
