from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Callable, Sequence
from random import Random
from threading import Barrier, Lock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula.clock import REAL
from nebula.errors import PacketError, UnreachableError
from nebula.proto.v1.run_pb2 import PullHead
from nebula.wan.chunks import IN_FLIGHT, Assembly, fetch, spans

CHUNK = 4


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def manifest(state: bytes, version: int = 1, chunk: int = CHUNK) -> PullHead:
    chunks = [sha(state[at : at + length]) for at, length in spans(len(state), chunk)]
    return PullHead(fragment="f0", version=version, payload_bytes=len(state), sha256=sha(state), chunks=chunks)


class Source:
    """A coordinator whose newest state is the last of `states`. After `moves[0]` chunks it is gone and the next one is
    there, and so on."""

    def __init__(self, *states: bytes, moves: Sequence[int] = (), chunk: int = CHUNK) -> None:
        self.states, self.moves, self.size = states, list(moves), chunk
        self.version = 0
        self.asked: list[bytes] = []
        self._lock = Lock()

    def manifest(self) -> PullHead:
        return manifest(self.states[self.version], self.version, self.size)

    def chunk(self, of: PullHead, digest: bytes) -> bytes | None:
        with self._lock:
            if self.moves and len(self.asked) >= self.moves[0]:
                del self.moves[0]
                self.version += 1
            if of.version != self.version:
                return None
            self.asked.append(digest)
            state = self.states[self.version]
            return {sha(state[at : at + n]): state[at : at + n] for at, n in spans(len(state), self.size)}[digest]

    def fetch(self) -> tuple[PullHead, bytes, int]:
        return fetch(self.manifest, self.chunk, REAL, self.size)


@given(st.integers(0, 1000), st.integers(1, 100))
@settings(deadline=None, max_examples=50)
def test_spans_cover_every_byte_once(size, chunk):
    assert [at for offset, length in spans(size, chunk) for at in range(offset, offset + length)] == list(range(size))
    assert all(length == chunk for _, length in spans(size, chunk)[:-1])


@given(st.binary(min_size=1, max_size=100))
@settings(deadline=None, max_examples=50)
def test_a_state_comes_whole_and_equal_chunks_come_once(state):
    source = Source(state)
    head, whole, moved = source.fetch()
    assert (whole, head) == (state, manifest(state, 0))
    assert sorted(source.asked) == sorted(set(head.chunks))
    assert moved == sum({d: n for d, (_, n) in zip(head.chunks, spans(len(state), CHUNK), strict=True)}.values())


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 9 * CHUNK, 9 * CHUNK + 1])
def test_any_length(length):
    state = Random(length).randbytes(length)
    source = Source(state)
    assert source.fetch()[1:] == (state, length)
    assert len(source.asked) == -(-length // CHUNK)


@given(st.binary(min_size=40, max_size=80), st.lists(st.integers(0, 79), max_size=4), st.integers(0, 20))
@settings(deadline=None, max_examples=50)
def test_when_the_state_is_replaced_only_what_differs_is_fetched(first, changed, after):
    second = bytearray(first)
    for at in changed:
        second[at % len(first)] ^= 1
    source = Source(first, bytes(second), moves=[after])
    head, whole, moved = source.fetch()
    expected = (bytes(second), 1) if after < len(set(manifest(first).chunks)) else (first, 0)
    assert (whole, head.version) == expected
    assert len(source.asked) == len(set(source.asked)), "nothing twice"
    assert moved <= len(first) + CHUNK * len(changed)


def test_a_state_that_shrinks_and_is_replaced_again_and_again():
    states = [Random(0).randbytes(200)[: 200 - 10 * n] for n in range(10)]
    source = Source(*states, moves=[3 * n for n in range(1, 10)])
    head, whole, moved = source.fetch()
    assert (whole, head.version) == (states[9], 9)
    assert moved < 200 + 10 * CHUNK  # the last chunk of each may have been fetched beside those they share


def test_several_are_under_way_at_once():
    together = Barrier(IN_FLIGHT, timeout=20)
    source = Source(bytes(range(2 * IN_FLIGHT * CHUNK)))

    def chunk(of: PullHead, digest: bytes) -> bytes | None:
        together.wait()
        return source.chunk(of, digest)

    assert fetch(source.manifest, chunk, REAL, CHUNK)[1] == source.states[0]


def test_an_error_ends_the_transfer_once_nothing_is_under_way():
    source, done = Source(bytes(range(64))), []

    def chunk(of: PullHead, digest: bytes) -> bytes | None:
        if digest == of.chunks[0]:
            raise UnreachableError("nobody answers")
        done.append(digest)
        return source.chunk(of, digest)

    with pytest.raises(UnreachableError, match="nobody answers"):
        fetch(source.manifest, chunk, REAL, CHUNK)
    assert len(done) == 12  # three lanes of four chunks each


def lie(**changes: object) -> Callable[[], PullHead]:
    head = manifest(bytes(range(10)), 0)
    for name, value in changes.items():
        if name == "chunks":
            del head.chunks[:]
            head.chunks.extend(value)
        else:
            setattr(head, name, value)
    return lambda: head


@pytest.mark.parametrize(
    "told",
    [
        lie(payload_bytes=2**64 - 1),
        lie(payload_bytes=13),
        lie(payload_bytes=8),
        lie(payload_bytes=0),
        lie(chunks=[]),
        lie(chunks=[], payload_bytes=0, sha256=b""),
        lie(sha256=b"short"),
        lie(sha256=sha(b"another")),
        lie(chunks=[sha(b"\0\1\2\3")] * 3),  # the last one is shorter
        lie(chunks=[b"short"] * 3),
    ],
)
def test_a_manifest_that_cannot_be(told):
    source = Source(bytes(range(10)))
    known = source.manifest().chunks
    with pytest.raises(PacketError, match="f0"):
        fetch(told, lambda of, digest: source.chunk(of, digest) if digest in known else b"x", REAL, CHUNK)


def test_a_state_that_is_gone_and_still_the_newest():
    source = Source(bytes(range(10)))
    with pytest.raises(PacketError, match="f0' version 0 is said to be gone"):
        fetch(source.manifest, lambda of, digest: None, REAL, CHUNK)


@pytest.mark.parametrize("data", [b"", b"\0\1\2", b"\0\1\2\4", b"\0\1\2\3\4"])
def test_what_is_not_the_chunk_is_refused(data):
    state = Assembly(manifest(bytes(range(10))), CHUNK)
    before = state.missing()
    with pytest.raises(PacketError, match="not chunk"):
        state.put(before[0], data)
    assert state.missing() == before


def test_the_state_is_in_memory_once():
    size, chunk = 8 << 20, 1 << 20
    source = Source(Random(0).randbytes(size), chunk=chunk)
    head = source.manifest()
    pieces = {sha(data): data for data in (source.states[0][at : at + n] for at, n in spans(size, chunk))}
    tracemalloc.start()
    try:
        _, whole, _ = fetch(lambda: head, lambda _, digest: pieces[digest], REAL, chunk)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert whole == source.states[0]
    assert size <= peak < 1.3 * size
