"""What a payload is made of, who brings which part of it, and how it is put together again."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula.errors import PacketError
from nebula.proto.v1.run_pb2 import Manifest
from nebula.wan.chunks import Assembly, manifest, shared, spans
from tests.chunked import CHUNK, pieces, sha

SMALL = settings(deadline=None, max_examples=50)


def assembly(payload: bytes, before: Assembly | None = None) -> Assembly:
    return Assembly(manifest(memoryview(payload), CHUNK), CHUNK, "the delta of f0", before)


# --- what it is made of -------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.integers(1, 100))
@SMALL
def test_spans_cover_every_byte_once(size, chunk):
    assert [at for offset, length in spans(size, chunk) for at in range(offset, offset + length)] == list(range(size))
    assert all(length == chunk for _, length in spans(size, chunk)[:-1])


@given(st.binary(max_size=100), st.integers(1, 30))
@SMALL
def test_a_manifest_names_the_payload_and_each_chunk_of_it(payload, chunk):
    made = manifest(memoryview(payload), chunk)
    assert (made.bytes, made.sha256) == (len(payload), sha(payload))
    assert list(made.chunks) == [sha(piece) for piece in pieces(payload, chunk)]


def test_nothing_has_no_chunks():
    assert manifest(memoryview(b""), CHUNK) == Manifest(bytes=0, sha256=sha(b""))
    assert assembly(b"").whole() == b""
    assert assembly(b"").missing() == assembly(b"").places() == shared([], 4) == []


# --- who brings what ----------------------------------------------------------------------------------------------


@given(st.lists(st.binary(min_size=1, max_size=1), max_size=40), st.integers(1, 16))
@SMALL
def test_lanes_share_all_chunks_without_bringing_one_twice(chunks, lanes):
    shares = shared(chunks, lanes)
    brought = [chunk for share in shares for chunk in share]
    assert len(brought) == len(set(brought))
    assert set(brought) == set(chunks)
    assert all(shares), "who has nothing to bring opens no connection"
    assert len(shares) == min(lanes, len(set(chunks)))
    assert max(map(len, shares), default=0) - min(map(len, shares), default=0) <= 1


@given(st.integers(1, 40), st.integers(1, 16))
@SMALL
def test_each_lane_brings_its_part_from_all_along_the_payload(count, lanes):
    """So that lanes that are equally fast leave no hole, and the hash is not left to the end."""
    for lane, share in enumerate(shared([bytes([n]) for n in range(count)], lanes)):
        assert [chunk[0] for chunk in share] == list(range(lane, count, lanes))


# --- putting it together ------------------------------------------------------------------------------------------


@given(st.binary(max_size=100), st.randoms(use_true_random=False))
@SMALL
def test_chunks_may_come_in_any_order(payload, rng):
    state, made = assembly(payload), manifest(memoryview(payload), CHUNK)
    coming = list(dict(zip(made.chunks, pieces(payload), strict=True)).items())
    rng.shuffle(coming)
    for number, (chunk, data) in enumerate(coming):
        left = {chunk for chunk, _ in coming[number:]}
        assert set(state.missing()) == left
        assert state.places() == [place for place, chunk in enumerate(made.chunks) if chunk in left]
        state.put(chunk, data)
    assert state.missing() == state.places() == []
    assert state.whole() == payload
    assert state.moved == sum(len(data) for _, data in coming)


def test_chunks_may_come_from_several_threads_at_once():
    payload = Random(1).randbytes(2000 * CHUNK + 1)
    state = assembly(payload)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda piece: state.put(sha(piece), piece), pieces(payload)))
    assert state.whole() == payload
    assert state.moved == len(payload)


def test_a_chunk_that_comes_twice_is_moved_twice_and_there_once():
    state = assembly(b"abcdefgh")
    for piece in (b"efgh", b"efgh", b"abcd", b"abcd"):
        state.put(sha(piece), piece)
    assert (state.whole(), state.moved) == (b"abcdefgh", 16)


@given(st.binary(min_size=8, max_size=60), st.binary(max_size=60), st.data())
@SMALL
def test_what_is_there_of_the_one_before_is_taken_over(first, second, data):
    before = assembly(first)
    had = data.draw(st.sets(st.sampled_from(pieces(first))))
    for piece in had:
        before.put(sha(piece), piece)
    state = assembly(second, before)
    assert set(state.missing()) == {sha(piece) for piece in pieces(second) if piece not in had}
    for chunk, piece in zip(manifest(memoryview(second), CHUNK).chunks, pieces(second), strict=True):
        if chunk in state.missing():
            state.put(chunk, piece)
    assert state.whole() == second


@pytest.mark.parametrize("data", [b"", b"\0\1\2", b"\0\1\2\4", b"\0\1\2\3\4"])
def test_what_is_not_the_chunk_is_refused(data):
    state = assembly(bytes(range(10)))
    before = state.missing()
    with pytest.raises(PacketError, match=r"f0: .* not chunk"):
        state.put(before[0], data)
    assert (state.missing(), state.moved) == (before, 0)


def test_what_is_no_chunk_of_it_is_refused():
    state = assembly(bytes(range(10)))
    with pytest.raises(PacketError, match="not chunk"):
        state.put(sha(b"abcd"), b"abcd")
    assert len(state.missing()) == 3


# --- manifests that cannot be -------------------------------------------------------------------------------------


def lie(**changes: object) -> Callable[[], Manifest]:
    told = manifest(memoryview(bytes(range(10))), CHUNK)
    fields = {"bytes": told.bytes, "sha256": told.sha256, "chunks": list(told.chunks), **changes}
    return lambda: Manifest(**fields)


@pytest.mark.parametrize(
    "told",
    [
        lie(bytes=2**64 - 1),
        lie(bytes=13),
        lie(bytes=8),
        lie(bytes=0),
        lie(chunks=[]),
        lie(chunks=[], bytes=0, sha256=b""),
        lie(sha256=b"short"),
    ],
)
def test_a_manifest_that_contradicts_itself(told):
    with pytest.raises(PacketError, match=r"the delta of f0: .* chunks"):
        Assembly(told(), CHUNK, "the delta of f0")


@pytest.mark.parametrize(
    "told",
    [
        lie(sha256=sha(b"another")),
        lie(chunks=[sha(b"\0\1\2\3")] * 3),  # the last one is shorter
        lie(chunks=[b"short"] * 3),
    ],
)
def test_a_manifest_that_is_no_payloads(told):
    state = Assembly(told(), CHUNK, "the delta of f0")
    known = {sha(piece): piece for piece in pieces(bytes(range(10)))}

    def bring() -> bytes:
        for chunk in state.missing():
            state.put(chunk, known.get(chunk, b"x"))
        return state.whole()

    with pytest.raises(PacketError, match="f0"):
        bring()
