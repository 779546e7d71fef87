"""Deltas that come in parts: what is kept of them."""

from __future__ import annotations

import tracemalloc

import pytest

from nebula.clock import REAL
from nebula.errors import PacketError
from nebula.federation.uploads import Uploads
from nebula.proto.v1 import run_pb2 as pb
from nebula.wan.chunks import manifest
from tests.chunked import CHUNK, cut_into, pieces, sha


@pytest.fixture
def uploads(monkeypatch) -> Uploads:
    cut_into(CHUNK, monkeypatch)
    return Uploads(REAL)


def about(payload: bytes, fragment: str = "f0", chunk: int = CHUNK, **changes: object) -> pb.PushHead:
    return pb.PushHead(fragment=fragment, payload=manifest(memoryview(payload), chunk), **changes)


def missing(uploads: Uploads, payload: bytes, cluster: str = "north", fragment: str = "f0") -> list[int]:
    return uploads.open(cluster, about(payload, fragment), limit=100).state.places()


def bring(uploads: Uploads, payload: bytes, number: int, cluster: str = "north", fragment: str = "f0") -> None:
    piece = pieces(payload)[number]
    uploads.open(cluster, about(payload, fragment), limit=100).state.put(sha(piece), piece)


def test_what_has_come_of_a_delta_stays(uploads):
    assert missing(uploads, b"abcdefghij") == [0, 1, 2]
    bring(uploads, b"abcdefghij", 1)
    assert missing(uploads, b"abcdefghij") == [0, 2]
    heads = (about(b"abcdefghij"), about(b"abcdefghij", weight=7.0, following=[2]))
    assert len({id(uploads.open("north", head, limit=100)) for head in heads}) == 1


def test_each_cluster_and_fragment_has_one_of_its_own(uploads):
    bring(uploads, b"abcdefgh", 0)
    for cluster, fragment in [("south", "f0"), ("north", "f1")]:
        assert missing(uploads, b"abcdefgh", cluster, fragment) == [0, 1]
        uploads.close(cluster, about(b"abcdefgh", fragment))
    assert missing(uploads, b"abcdefgh") == [1]


def test_a_newer_delta_takes_the_place_of_one_that_was_never_finished(uploads):
    bring(uploads, b"abcdefgh", 0)
    assert missing(uploads, b"abcdxxxx") == [0, 1]
    assert missing(uploads, b"abcdefgh") == [0, 1], "nothing was kept of the one before"


def test_what_was_closed_is_forgotten(uploads):
    bring(uploads, b"abcdefgh", 0)
    uploads.close("north", about(b"a delta before it"))
    assert missing(uploads, b"abcdefgh") == [1], "a call of another delta that ends late"
    uploads.close("north", about(b"abcdefgh"))
    assert missing(uploads, b"abcdefgh") == [0, 1]
    uploads.close("south", about(b"abcdefgh", "f9"))  # there was none


@pytest.mark.parametrize(
    "head",
    [
        about(b"x" * 101),
        pb.PushHead(fragment="f0", payload=pb.Manifest(bytes=2**64 - 1, sha256=bytes(32), chunks=[bytes(32)])),
        pb.PushHead(fragment="f0", payload=pb.Manifest(bytes=8, sha256=bytes(32), chunks=[bytes(32)])),
        pb.PushHead(fragment="f0", payload=pb.Manifest(bytes=8, sha256=b"", chunks=[bytes(32)] * 2)),
        pb.PushHead(fragment="f0"),
    ],
    ids=["a byte too many", "far too many", "chunks", "sha256", "none"],
)
def test_a_delta_that_cannot_be_is_refused_and_displaces_none(head, uploads):
    bring(uploads, b"abcdefgh", 0)
    with pytest.raises(PacketError, match="f0"):
        uploads.open("north", head, limit=100)
    assert missing(uploads, b"abcdefgh") == [1]
    assert uploads.open("north", about(b"x" * 100), limit=100).state.places()  # as many as it may have


def test_memory_is_bounded_however_many_deltas_are_begun():
    size = 1 << 20
    uploads = Uploads(REAL)
    tracemalloc.start()
    try:
        for number in range(50):
            payload = bytes([number]) * size
            head = about(payload, chunk=size)
            uploads.open("north", head, limit=size).state.put(sha(payload), payload)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5 * size  # two, for a moment, and what this test holds
