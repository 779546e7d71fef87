"""Payloads over several connections: large ones use all of them, and what breaks costs what was under way on each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest

from nebula.config import Codec, Link, Membership, Wan
from nebula.proto.v1 import run_pb2 as pb
from nebula.proto.v1.packet_pb2 import Frame
from nebula.runtime.gateway import Gateway
from nebula.types import ROLE, PushTicket
from nebula.wan.chunks import Assembly
from tests.chunked import cut_into
from tests.federated import TINY, Federated, clusters, tiny, write_corpus
from tests.wire.test_stubs import delta
from tests.wire.wired import Wired, wait_for, wired

CHUNK = 64 << 10
LANES = 3
FRAGMENT = "f0"
HANDSHAKE = 8 << 10
"""Bytes that opening a connection takes, at the most, and beginning its calls again, in each direction."""
LINK = Link(rate_mbps=200.0, rtt_ms=2.0)
"""It has less under way than a chunk."""

Transfer: TypeAlias = Callable[[Wired, Gateway], None]


@pytest.fixture(scope="module")
def federate(tmp_path_factory) -> Callable[[Path], Federated]:
    folder = tmp_path_factory.mktemp("lanes")
    model = TINY.model_copy(update={"dim": 128, "ffn_dim": 256})
    plain = Codec(steps=(), feedback=None)
    wan = Wan(up=plain, down=plain, streams=LANES)
    membership = Membership(quorum=2, max_stall=60.0)
    run = tiny(write_corpus(folder / "corpus"), model=model, membership=membership, wan=wan)
    return lambda where: Federated(run, clusters(north=1, south=1), where, folder / "cache")


@pytest.fixture
def wires(federate, tmp_path, monkeypatch) -> Iterator[Wired]:
    cut_into(CHUNK, monkeypatch)
    with wired(federate(tmp_path), LINK) as wires:
        yield wires


def ticket(fragment: str = FRAGMENT) -> PushTicket:
    return PushTicket(role=ROLE, fragment=fragment, round=0, base=0, weight=64.0)


def push(wires: Wired, gateway: Gateway) -> None:
    assert gateway.push(ticket(), [delta(wires.federated, FRAGMENT, 0)]) == "accepted"


def pull(wires: Wired, gateway: Gateway) -> None:
    pulled, payload = gateway.pull("update", FRAGMENT, 1)
    commit = wires.hub.state.fragments[FRAGMENT].chain[-1]
    assert (pulled.status, pulled.digest) == ("ready", commit.digest)
    assert payload == wires.hub._ledger.get(commit.blobs["update"])


TRANSFERS = {"push": push, "pull": pull}


def prepare(wires: Wired, method: str) -> None:
    """An update can be pulled once both have pushed."""
    for name in ("north", "south") if method == "pull" else ():
        gateway = wires.gateway(name)
        for fragment in wires.hub.state.fragments:
            assert gateway.push(ticket(fragment), [delta(wires.federated, fragment, 1)]) == "accepted"
        gateway.close()
    if method == "pull":
        wait_for(wires.hub, lambda: wires.hub.state.round > 0)


@pytest.mark.parametrize("method", TRANSFERS)
@pytest.mark.parametrize(("chunk", "connections"), [(CHUNK, LANES), (8 << 20, 1)])
def test_a_large_payload_uses_every_lane_and_a_small_one_a_single_one(method, chunk, connections, wires, monkeypatch):
    cut_into(chunk, monkeypatch)
    prepare(wires, method)
    before = wires.relays["north"].traffic.connections
    gateway = wires.gateway("north")
    TRANSFERS[method](wires, gateway)
    gateway.close()
    assert wires.relays["north"].traffic.connections - before == connections
    assert gateway._caller.retries == 0


def moved(wires: Wired, method: str, seen: Callable[[Frame], None], patch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Bytes and connections that a life takes in which nothing but this is transferred. `seen`: every frame that
    arrives at its other end."""
    relay, inner = wires.relays["north"], getattr(wires.hub, method)

    def noted(frames: Iterator[Frame]) -> Iterator[Frame]:
        for frame in frames:
            seen(frame)
            yield frame

    before = relay.traffic
    gateway = wires.gateway("north")
    with patch.context() as patched:
        if method == "push":
            patched.setattr(wires.hub, method, lambda peer, frames: inner(peer, noted(frames)))
        else:
            stub = gateway._caller.stub
            patched.setattr(stub, method, lambda *a, pull=stub.pull, **how: noted(pull(*a, **how)))
        TRANSFERS[method](wires, gateway)
    gateway.close()
    after = relay.traffic
    way = "up_bytes" if method == "push" else "down_bytes"
    return getattr(after, way) - getattr(before, way), after.connections - before.connections


@pytest.mark.parametrize("method", TRANSFERS)
def test_a_cut_costs_what_was_under_way_on_each_lane(method, federate, tmp_path, wires, monkeypatch):
    """Two runs of the same, one of which is cut when most of the payload has arrived."""
    with wired(federate(tmp_path / "undisturbed"), LINK) as others:
        prepare(others, method)
        undisturbed, lanes = moved(others, method, lambda frame: None, monkeypatch)
    prepare(wires, method)
    arrived: list[int] = []
    lock = threading.Lock()

    def cut_late(frame: Frame) -> None:
        with lock:
            before = sum(arrived)
            arrived.append(len(frame.ciphertext))
            late = before < 0.7 * undisturbed <= sum(arrived)
        if late:
            wires.relays["north"].cut()

    disturbed, connections = moved(wires, method, cut_late, monkeypatch)
    assert lanes == LANES
    assert undisturbed > 12 * LANES * CHUNK / 3
    assert connections > LANES
    assert undisturbed < disturbed <= undisturbed + LANES * CHUNK + (connections - LANES) * HANDSHAKE


def test_a_coordinator_that_is_replaced_in_the_middle_of_a_push(wires, monkeypatch):
    """The next one knows of no chunk, and is told the rest of none: it gets all of them, once."""
    put, arrived, replaced = Assembly.put, [], []

    def replacing(state: Assembly, chunk: bytes, data: bytes) -> None:
        put(state, chunk, data)
        arrived.append(chunk)
        if len(arrived) == 5:
            threading.Thread(target=lambda: replaced.append(wires.restart()), daemon=True).start()
            raise ConnectionError("the coordinator goes away")

    monkeypatch.setattr(Assembly, "put", replacing)
    first, payload = wires.hub, delta(wires.federated, FRAGMENT, 0)
    gateway = wires.gateway("north")
    assert gateway.push(ticket(), [payload]) == "accepted"
    gateway.close()
    assert wires.hub is not first
    assert replaced == [None]
    (arrival,) = wires.hub.state.fragments[FRAGMENT].arrived.values()
    assert wires.hub._ledger.get(arrival.blob) == payload
    count = -(-len(payload) // CHUNK)
    assert count + 5 <= len(arrived) <= 2 * count + LANES


def test_the_lane_that_completes_a_delta_is_heard(wires, monkeypatch):
    """Another one that ends just after it finds the delta merged already, and is told that it comes twice."""
    answers = [pb.Receipt.STATUS_DUPLICATE, pb.Receipt.STATUS_ACCEPTED, pb.Receipt.STATUS_DUPLICATE]
    gateway = wires.gateway("north")
    monkeypatch.setattr(gateway, "_bring", lambda head, payload, share, lane: pb.Receipt(status=answers[lane]))
    assert gateway.push(ticket(), [delta(wires.federated, FRAGMENT, 0)]) == "accepted"
    gateway.close()
