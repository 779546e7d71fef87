"""Deltas that come in parts, over several connections and in several sessions: what the coordinator answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path
from threading import Barrier

import pytest
import torch

from nebula.clock import RealClock
from nebula.config import Codec, Membership
from nebula.errors import PacketError
from nebula.federation.memory import MemoryStub
from nebula.proto.v1 import run_pb2 as pb
from nebula.proto.v1.packet_pb2 import Frame
from nebula.security.pki import Identity
from nebula.security.session import offer
from nebula.types import ROLE, Slice
from nebula.wan.chunks import manifest
from nebula.wan.codec import Encoder
from nebula.wan.frame import pack
from nebula.wan.transport import payload_context, receive, send
from tests.chunked import cut_into, pieces, sha
from tests.federated import Federated, clusters, tiny, write_corpus
from tests.wire.wired import wait_for

ACCEPTED, INCOMPLETE = pb.Receipt.STATUS_ACCEPTED, pb.Receipt.STATUS_INCOMPLETE
DUPLICATE, LATE = pb.Receipt.STATUS_DUPLICATE, pb.Receipt.STATUS_LATE
CHUNK = 4 << 10
"""Bytes; deltas have several."""


@pytest.fixture(scope="module")
def federate(tmp_path_factory) -> Callable[[Path], Federated]:
    folder = tmp_path_factory.mktemp("uploads")
    run = tiny(write_corpus(folder / "corpus"), membership=Membership(quorum=2, max_stall=60.0))
    return lambda where: Federated(run, clusters(north=1, south=1), where, folder / "cache")


@pytest.fixture
def federated(federate, tmp_path, monkeypatch) -> Iterator[Federated]:
    cut_into(CHUNK, monkeypatch)
    federated = federate(tmp_path)
    yield federated
    federated.hub.close()


class Sender:
    """A cluster that sends the chunks it is told to. `read`: how many frames the coordinator took of the last call."""

    def __init__(self, federated: Federated, name: str = "north") -> None:
        self.federated, self._name = federated, name
        self.read = 0
        self.join()

    def join(self) -> None:
        stub = MemoryStub(self.federated.hub)
        identity = Identity.load(self.federated.folder / "pki" / self._name)
        message, pending = offer(identity, self.federated.agreement.digest())
        response = stub.join(pb.JoinRequest(offer=message), timeout=1.0)
        self.session = pending.complete(response.answer)
        receive(self.session.receive, iter(response.welcome), pb.Welcome, b"welcome")

    def push(
        self, payload: bytes, following: Sequence[int], data: Mapping[int, bytes] | None = None, /, **changes: object
    ) -> pb.Receipt:
        """`data`: what to send in place of some chunks."""
        parts = {**dict(enumerate(pieces(payload, CHUNK))), **(data or {})}
        fields = {"role": ROLE, "fragment": "f0", "weight": 64.0, "parts": [len(payload)], "following": following}
        head = pb.PushHead(**{**fields, "payload": manifest(memoryview(payload), CHUNK), **changes})

        def frames() -> Iterator[Frame]:
            yield from send(self.session.send, head, b"push")
            for number in following:
                yield from self.session.send.seal(parts[number], context=payload_context(head))

        self.read = 0
        answer = MemoryStub(self.federated.hub).push(self._counted(frames()), timeout=1.0, lane=0)
        return receive(self.session.receive, answer, pb.Receipt, b"receipt")

    def missing(self, payload: bytes, **changes: object) -> list[int]:
        """What the coordinator lacks of a delta that it has not accepted."""
        receipt = self.push(payload, [], **changes)
        assert receipt.status == INCOMPLETE
        return list(receipt.missing)

    def _counted(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        for frame in frames:
            self.read += 1
            yield frame


def delta(federated: Federated, seed: int = 0, fragment: str = "f0", spoilt: float | None = None) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    shapes = federated.hub._merger.shapes[fragment]
    tensors = {Slice(n, (0,) * len(s), tuple(s)): torch.randn(s, generator=generator) for n, s in shapes.items()}
    if spoilt is not None:
        next(iter(tensors.values())).view(-1)[7] = spoilt
    return pack(Encoder(Codec(steps=(), feedback=None)).encode(tensors))


def numbers(payload: bytes) -> list[int]:
    count = len(pieces(payload, CHUNK))
    assert count > 4
    return list(range(count))


def refused(sender: Sender, match: str, *push: object, **how: object) -> None:
    before = sender.federated.hub.state.fragments
    with pytest.raises(PacketError, match=match):
        sender.push(*push, **how)
    assert sender.federated.hub.state.fragments == before


@pytest.fixture
def north(federated) -> Sender:
    return Sender(federated)


def commit(federated: Federated, round: int) -> None:
    """Both clusters deliver all of it."""
    for name in ("north", "south"):
        sender = Sender(federated, name)
        for fragment in federated.hub.state.fragments:
            payload = delta(federated, seed=round, fragment=fragment)
            receipt = sender.push(payload, numbers(payload), round=round, base=round, fragment=fragment)
            assert receipt.status == ACCEPTED
    wait_for(federated.hub, lambda: federated.hub.state.round > round)


def test_a_delta_comes_in_any_order_over_any_number_of_calls_and_sessions(north, federated):
    payload = delta(federated)
    left = numbers(payload)
    assert north.missing(payload) == left
    for brought in ([3, 1], [0], [len(left) - 1]):
        receipt = north.push(payload, brought)
        left = [number for number in left if number not in brought]
        assert (receipt.status, receipt.missing) == (INCOMPLETE, left)
        north.join()  # as after a cut
    assert north.missing(payload) == left
    assert north.push(payload, left).status == ACCEPTED
    (arrived,) = federated.hub.state.fragments["f0"].arrived.values()
    assert federated.hub._ledger.get(arrived.blob) == payload
    (event,) = federated.events("delta")
    assert event["bytes"] == len(payload)


def test_a_call_that_breaks_off_costs_the_chunk_under_way(north, federated, monkeypatch):
    payload = delta(federated)
    seal, sent = north.session.send.seal, []

    def breaking(message: bytes, *, context: bytes) -> Iterator[Frame]:
        sent.append(message)
        if len(sent) == 4:  # the head, and two chunks
            raise ConnectionError("the link broke")
        return seal(message, context=context)

    with monkeypatch.context() as patch:
        patch.setattr(north.session.send, "seal", breaking)
        with pytest.raises(ConnectionError):
            north.push(payload, numbers(payload))
    assert north.missing(payload) == numbers(payload)[2:]


def test_a_chunk_that_follows_twice_is_no_harm(north, federated):
    payload = delta(federated)
    assert north.push(payload, [0, 0, 0]).missing == numbers(payload)[1:]
    assert north.push(payload, [*numbers(payload), 1]).status == ACCEPTED


def test_equal_chunks_come_once(north, federated):
    """Zeros, which the delta of a parameter that nothing moves is made of."""
    shapes = federated.hub._merger.shapes["f0"]
    tensors = {Slice(n, (0,) * len(s), tuple(s)): torch.zeros(s) for n, s in shapes.items()}
    payload = pack(Encoder(Codec(steps=(), feedback=None)).encode(tensors))
    chunks = [sha(piece) for piece in pieces(payload, CHUNK)]
    once = sorted({chunk: number for number, chunk in enumerate(chunks)}.values())
    assert len(once) < len(chunks)
    assert north.push(payload, once).status == ACCEPTED


@pytest.mark.parametrize("number", ["one too many", 2**32 - 1])
def test_a_number_that_no_chunk_has(number, north, federated):
    payload = delta(federated)
    number = len(numbers(payload)) if isinstance(number, str) else number
    refused(north, f"none of number {number}", payload, [0, number, 1], {number: b"x"})
    assert north.missing(payload) == numbers(payload)[1:], "what came before it is there"


@pytest.mark.parametrize("wrong", [lambda p: p[:-1], lambda p: b"", lambda p: p[::-1], lambda p: p + b"x"])
def test_other_bytes_than_the_chunk_has(wrong, north, federated):
    payload = delta(federated)
    last = numbers(payload)[-1]
    bad = {last: wrong(pieces(payload, CHUNK)[last])}
    refused(north, f"the delta of north for fragment 'f0': {len(bad[last])} bytes came", payload, [0, last], bad)
    refused(north, "not chunk", payload, [0, last], {last: pieces(payload, CHUNK)[1]})
    assert north.missing(payload) == numbers(payload)[1:]
    assert north.push(payload, numbers(payload)[1:]).status == ACCEPTED


def test_a_manifest_is_judged_before_any_chunk_is_read(north, federated):
    payload = delta(federated)
    true = manifest(memoryview(payload), CHUNK)
    limit = federated.hub._limit("north", "f0")
    for told, match in [
        (pb.Manifest(bytes=len(payload), sha256=true.sha256, chunks=true.chunks[1:]), "chunks"),
        (pb.Manifest(bytes=len(payload), sha256=b"", chunks=true.chunks), "chunks"),
        (pb.Manifest(), "chunks"),
        (manifest(memoryview(bytes(limit + 1)), CHUNK), f"at most {limit} bytes"),
    ]:
        refused(north, match, payload, numbers(payload), payload=told)
        assert north.read == 1
    swapped = pb.Manifest(bytes=len(payload), sha256=sha(b""), chunks=true.chunks)
    refused(north, "together they are something else", payload, numbers(payload), payload=swapped)
    assert north.missing(payload) == numbers(payload)


def test_a_delta_that_was_accepted_is_not_asked_for_again(north, federated):
    payload = delta(federated)
    assert north.push(payload, numbers(payload)).status == ACCEPTED
    for following in ([], [0], numbers(payload)):
        assert north.push(payload, following).status == ACCEPTED
        assert north.read == 1
    assert len(federated.events("delta")) == 1
    other = delta(federated, seed=1)
    assert north.missing(other) == numbers(other), "and another may replace it"
    assert north.push(other, numbers(other)).status == ACCEPTED


@pytest.mark.parametrize(("round", "status"), [(1, DUPLICATE), (0, LATE)])
def test_what_comes_after_its_round_is_told_before_any_chunk_is_read(round, status, north, federated):
    old = delta(federated, seed=9)
    assert north.push(old, [0, 1]).status == INCOMPLETE
    commit(federated, 0)
    commit(federated, 1)
    north.join()
    for following in (numbers(old), [2, 3], []):  # each lane hears of it
        assert north.push(old, following, round=round, base=round).status == status
        assert north.read == 1
    assert len(federated.events("late")) == (status == LATE)
    assert federated.hub._uploads._open == {}


def test_a_delta_that_cannot_be_merged_is_not_kept(north, federated):
    payload = delta(federated, spoilt=float("nan"))
    refused(north, "finite", payload, numbers(payload))
    assert federated.hub._uploads._open == {}
    assert north.missing(payload) == numbers(payload)
    assert federated.events("delta") == []


class Meeting(RealClock):
    """Its conditions are not entered until `parties` threads want to."""

    def __init__(self, parties: int) -> None:
        self._together = Barrier(parties, timeout=20)
        self.entered = 0

    def condition(self) -> threading.Condition:
        meeting = self

        class Met(threading.Condition):
            def __enter__(self) -> bool:
                meeting.entered += 1
                meeting._together.wait()
                return super().__enter__()

        return Met()


def at_once(north: Sender, payload: bytes, lanes: int) -> list[pb.Receipt.Status.ValueType | str]:
    """Each of so many lanes brings its share, and each finds that nothing is missing any more."""
    north.federated.hub._uploads._clock = meeting = Meeting(lanes)

    def bring(lane: int) -> pb.Receipt.Status.ValueType | str:
        try:
            return copy(north).push(payload, numbers(payload)[lane::lanes]).status
        except PacketError as error:
            return str(error)

    with ThreadPoolExecutor(lanes) as pool:
        ends = list(pool.map(bring, range(lanes)))
    assert meeting.entered == lanes
    assert north.federated.hub._uploads._open == {}
    return ends


def test_calls_that_find_it_whole_at_once_deliver_it_once(north, federated, monkeypatch):
    payload, checked, check = delta(federated), [], federated.hub._merger.check

    def spy(*delta: object) -> bool:
        checked.append(delta)
        return check(*delta)

    monkeypatch.setattr(federated.hub._merger, "check", spy)
    assert at_once(north, payload, 4) == [ACCEPTED] * 4
    assert len(checked) == len(federated.events("delta")) == 1


def test_each_of_them_hears_why_it_is_refused(north, federated):
    ends = at_once(north, delta(federated, spoilt=float("inf")), 3)
    assert all("finite" in end for end in map(str, ends))
    assert federated.events("delta") == []
