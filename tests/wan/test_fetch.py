"""Fetching a payload over several lanes, from a coordinator that may let go of it meanwhile."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Callable, Sequence
from random import Random
from threading import Barrier, Event, Lock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula.clock import REAL
from nebula.errors import PacketError, UnreachableError
from nebula.proto.v1.run_pb2 import PullHead
from nebula.wan.chunks import Assembly, Coming, fetch, manifest, shared
from tests.chunked import CHUNK, pieces, sha

LANES = 4
SMALL = settings(deadline=None, max_examples=50)


class Source:
    """A coordinator whose newest payload is the last of `states`. After `moves[0]` chunks it is gone and the next one
    is there, and so on. With a head it sends `ahead` chunks of the share of lane 0, all of them if None."""

    def __init__(
        self, *states: bytes, moves: Sequence[int] = (), chunk: int = CHUNK, lanes: int = LANES, ahead: int | None = 0
    ) -> None:
        self.states, self.moves, self.size, self.lanes, self.ahead = states, list(moves), chunk, lanes, ahead
        self.version = 0
        self.sent: list[bytes] = []
        self.asked: list[tuple[int, list[bytes]]] = []
        """Lane, and what was asked for over it."""
        self._lock = Lock()

    def head(self) -> PullHead:
        payload = manifest(memoryview(self.states[self.version]), self.size)
        return PullHead(fragment="f0", version=self.version, payload=payload)

    def begin(self) -> tuple[PullHead, Coming]:
        head = self.head()
        share = (shared(head.payload.chunks, self.lanes) or [[]])[0][: self.ahead]
        return head, (self.send(chunk) for chunk in share)

    def chunks(self, head: PullHead, missing: list[bytes], state: Assembly, lane: int) -> bool:
        self.asked.append((lane, list(missing)))
        for chunk in missing:
            with self._lock:
                if self.moves and len(self.sent) >= self.moves[0]:
                    del self.moves[0]
                    self.version += 1
                if head.version != self.version:
                    return False
                data = self.send(chunk)
            state.put(chunk, data)
        return True

    def send(self, chunk: bytes) -> bytes:
        self.sent.append(chunk)
        return {sha(piece): piece for piece in pieces(self.states[self.version], self.size)}[chunk]

    def fetch(self) -> tuple[PullHead, bytes, int]:
        return fetch(self.begin, self.chunks, REAL, self.size, self.lanes)


LANES_AND_AHEAD = (st.integers(1, 6), st.none() | st.integers(0, 8))


@given(st.binary(min_size=1, max_size=100), *LANES_AND_AHEAD)
@SMALL
def test_a_payload_comes_whole_and_equal_chunks_come_once(payload, lanes, ahead):
    """However much of the share of lane 0 comes with the head."""
    source = Source(payload, lanes=lanes, ahead=ahead)
    head, whole, moved = source.fetch()
    assert (whole, head) == (payload, source.head())
    assert sorted(source.sent) == sorted(set(head.payload.chunks))
    assert moved == sum(map(len, set(pieces(payload))))


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 9 * CHUNK, 9 * CHUNK + 1])
def test_any_length(length):
    payload = Random(length).randbytes(length)
    source = Source(payload)
    assert source.fetch()[1:] == (payload, length)
    assert len(source.sent) == -(-length // CHUNK)


@pytest.mark.parametrize(("ahead", "left"), [(None, []), (2, [8]), (0, [0, 4, 8])])
def test_what_does_not_come_with_the_head_is_asked_for_over_lane_0(ahead, left):
    """And the other lanes ask for their shares, whatever comes."""
    source = Source(bytes(range(9 * CHUNK)), ahead=ahead)
    chunks = source.head().payload.chunks
    assert source.fetch()[1] == source.states[0]
    shares = {1: [1, 5], 2: [2, 6], 3: [3, 7], **({0: left} if left else {})}
    assert {lane: [list(chunks).index(chunk) for chunk in asked] for lane, asked in source.asked} == shares


def test_a_small_payload_takes_lane_0_alone():
    source = Source(b"abc", ahead=None)
    assert source.fetch()[1:] == (b"abc", 3)
    assert source.asked == []


@pytest.mark.parametrize("ahead", [0, None])
def test_a_payload_of_no_bytes_takes_no_chunks(ahead):
    source = Source(b"", ahead=ahead)
    assert source.fetch() == (source.head(), b"", 0)
    assert source.asked == []


def test_a_head_without_a_payload_is_all_there_is():
    head = PullHead(fragment="f0", status=PullHead.STATUS_GONE)
    source = Source(b"abc")
    assert fetch(lambda: (head, iter(())), source.chunks, REAL, CHUNK, LANES) == (head, b"", 0)
    assert source.asked == []


@given(st.binary(min_size=40, max_size=80), st.lists(st.integers(0, 79), max_size=4), st.integers(0, 20))
@SMALL
def test_when_the_state_is_replaced_only_what_differs_is_fetched(first, changed, after):
    second = bytearray(first)
    for at in changed:
        second[at % len(first)] ^= 1
    source = Source(first, bytes(second), moves=[after])
    head, whole, moved = source.fetch()
    expected = (bytes(second), 1) if after < len(set(pieces(first))) else (first, 0)
    assert (whole, head.version) == expected
    assert len(source.sent) == len(set(source.sent)), "nothing twice"
    assert moved <= len(first) + CHUNK * len(changed)


def test_a_state_that_shrinks_and_is_replaced_again_and_again():
    states = [Random(0).randbytes(200)[: 200 - 10 * n] for n in range(10)]
    source = Source(*states, moves=[3 * n for n in range(1, 10)])
    head, whole, moved = source.fetch()
    assert (whole, head.version) == (states[9], 9)
    assert moved < 200 + 10 * CHUNK  # the last chunk of each may have been fetched beside those they share


def test_a_state_that_is_gone_and_still_the_newest():
    source = Source(bytes(range(10)))
    with pytest.raises(PacketError, match="f0' version 0 is said to be gone"):
        fetch(source.begin, lambda *_: False, REAL, CHUNK, LANES)


# --- lanes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_all_lanes_are_under_way_at_once(lanes):
    together = Barrier(lanes, timeout=20)
    source = Source(bytes(range(2 * LANES * CHUNK)), lanes=lanes)

    def chunks(*asked) -> bool:
        together.wait()
        return source.chunks(*asked)

    assert fetch(source.begin, chunks, REAL, CHUNK, lanes)[1] == source.states[0]
    assert sorted(lane for lane, _ in source.asked) == list(range(lanes))


def test_what_comes_with_the_head_comes_beside_the_other_lanes():
    source, together = Source(bytes(range(LANES * CHUNK)), ahead=None), Barrier(LANES, timeout=20)

    def begin() -> tuple[PullHead, Coming]:
        head, coming = source.begin()
        return head, (data for data in coming if together.wait() >= 0)

    def chunks(*asked) -> bool:
        together.wait()
        return source.chunks(*asked)

    assert fetch(begin, chunks, REAL, CHUNK, LANES)[1] == source.states[0]


def broken_coming(source: Source, error: Exception) -> Callable[[], tuple[PullHead, Coming]]:
    def begin() -> tuple[PullHead, Coming]:
        head, coming = source.begin()

        def breaking() -> Coming:
            yield next(iter(coming))
            raise error

        return head, breaking()

    return begin


@pytest.mark.parametrize("where", ["coming", 0, 1, 3])
def test_an_error_ends_the_transfer_once_no_lane_is_under_way(where):
    """The others are in the middle of theirs when one fails, and end before its error is raised."""
    source = Source(bytes(range(64)), ahead=None if where == "coming" else 0)
    failed, ends, error = Event(), [], UnreachableError("nobody answers")
    before = threading.active_count()

    def chunks(head: PullHead, missing: list[bytes], state: Assembly, lane: int) -> bool:
        if lane == where:
            failed.set()
            raise error
        assert where == "coming" or failed.wait(20)
        source.chunks(head, missing, state, lane)
        ends.append(lane)
        return True

    begin = broken_coming(source, error) if where == "coming" else source.begin
    with pytest.raises(UnreachableError, match="nobody answers"):
        fetch(begin, chunks, REAL, CHUNK, LANES)
    assert sorted(ends) == [lane for lane in range(LANES) if lane != (0 if where == "coming" else where)]
    for thread in threading.enumerate():
        if thread.name == "chunks":
            thread.join(20)  # it has told its result, and may be on its last instruction
    assert threading.active_count() <= before


def test_chunks_that_are_not_what_the_head_says_are_refused():
    source = Source(bytes(range(64)), ahead=None)

    def begin() -> tuple[PullHead, Coming]:
        head, coming = source.begin()
        return head, reversed(list(coming))

    with pytest.raises(PacketError, match=r"f0' version 0: .* not chunk"):
        fetch(begin, source.chunks, REAL, CHUNK, LANES)


def test_the_payload_is_in_memory_once():
    size, chunk = 8 << 20, 1 << 20
    source = Source(Random(0).randbytes(size), chunk=chunk)
    head, known = source.head(), {sha(piece): piece for piece in pieces(source.states[0], chunk)}

    def chunks(_: PullHead, missing: list[bytes], state: Assembly, lane: int) -> bool:
        for digest in missing:
            state.put(digest, known[digest])
        return True

    tracemalloc.start()
    try:
        _, whole, _ = fetch(lambda: (head, iter(())), chunks, REAL, chunk, LANES)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert whole == source.states[0]
    assert size <= peak < 1.3 * size
