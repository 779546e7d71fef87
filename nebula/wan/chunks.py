"""A state in chunks, each named by its SHA-256. A transfer that breaks loses those under way and no others; one whose
state was replaced meanwhile goes on with the chunks in which the new one differs."""

from __future__ import annotations

import hashlib
import io
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from threading import Lock

from nebula.clock import Clock, Task
from nebula.errors import PacketError
from nebula.proto.v1.run_pb2 import PullHead

CHUNK_BYTES = 4 << 20
"""Of every chunk but the last: what a cut costs, times those in flight."""

IN_FLIGHT = 4
"""Chunks asked for at once: while one is looked up and travels, others keep the line busy."""


def spans(size: int, chunk_bytes: int) -> list[tuple[int, int]]:
    """Offset and length of each chunk of `size` bytes."""
    return [(at, min(chunk_bytes, size - at)) for at in range(0, size, chunk_bytes)]


class Assembly:
    """The state that a manifest describes, while its chunks come in, in any order and from any thread. What `before`
    has of them is taken over.

    Raises PacketError if the manifest contradicts itself."""

    def __init__(self, manifest: PullHead, chunk_bytes: int, before: Assembly | None = None) -> None:
        size, chunks = manifest.payload_bytes, manifest.chunks
        if len(chunks) != -(-size // chunk_bytes) or len(manifest.sha256) != hashlib.sha256().digest_size:
            raise PacketError(f"{size} bytes of fragment {manifest.fragment!r} are not {len(chunks)} chunks")
        self._what = f"fragment {manifest.fragment!r} version {manifest.version}"
        self._version, self._sha256 = manifest.version, manifest.sha256
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
        return list(self._missing)

    def put(self, chunk: bytes, data: bytes) -> None:
        """Raises PacketError if `data` is not that chunk."""
        fits = all(length == len(data) for _, length in self._places[chunk])
        if not fits or hashlib.sha256(data).digest() != chunk:
            raise PacketError(f"{self._what}: {len(data)} bytes came that are not chunk {chunk.hex()[:12]}…")
        with self._lock:
            for at, _ in self._places[chunk]:
                self._whole.seek(at)
                self._whole.write(data)
            self._missing.pop(chunk, None)
            while self._unhashed and self._unhashed[0] not in self._missing:  # as it comes, and not all at the end
                self._hash.update(self._read(self._unhashed.popleft()))

    def whole(self) -> bytes:
        """Once nothing is missing. Raises PacketError if that is not the state the manifest names."""
        assert not self._missing
        if self._hash.digest() != self._sha256:
            raise PacketError(f"{self._what}: its chunks are right, and together they are something else")
        return self._whole.getvalue()

    def _read(self, chunk: bytes) -> bytes:
        at, length = self._places[chunk][0]
        self._whole.seek(at)
        return self._whole.read(length)

    def _take(self, before: Assembly) -> None:
        if self._version <= before._version:
            raise PacketError(f"{before._what} is said to be gone, and to be the newest")
        for chunk in self._places.keys() & before._places.keys() - before._missing.keys():
            self.put(chunk, before._read(chunk))


def fetch(
    manifest: Callable[[], PullHead],
    chunk: Callable[[PullHead, bytes], bytes | None],
    clock: Clock,
    chunk_bytes: int,
) -> tuple[PullHead, bytes, int]:
    """A manifest, the state it describes, and how many bytes of chunks were fetched for it. `chunk` fetches one that a
    manifest names, whatever it takes; None says that this state is no longer kept, and the newest manifest is asked
    for. Raises what the two raise, and PacketError if what they return contradicts itself."""
    moved, state = 0, None
    while True:
        head = manifest()
        state = Assembly(head, chunk_bytes, state)
        missing = state.missing()
        lanes = [
            Task(clock, "chunks", partial(_lane, missing[lane::IN_FLIGHT], partial(chunk, head), state))
            for lane in range(min(IN_FLIGHT, len(missing)))
        ]
        for lane in lanes:  # whatever happens, none is left behind
            lane.wait()
        moved += sum(lane.result() for lane in lanes)
        if not state.missing():
            return head, state.whole(), moved


def _lane(wanted: Sequence[bytes], chunk: Callable[[bytes], bytes | None], state: Assembly) -> int:
    """Fetch these one by one, as long as they are there. Returns their bytes."""
    moved = 0
    for digest in wanted:
        if (data := chunk(digest)) is None:
            break
        state.put(digest, data)
        moved += len(data)
    return moved
