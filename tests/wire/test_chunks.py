"""States over real wires, chunk by chunk: what breaks costs no more than was under way, and what arrives is right."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from nebula.checkpoint.ledger import Ledger
from nebula.config import Codec, Membership, Wan
from nebula.errors import JournalError, PacketError
from nebula.federation import pulls
from nebula.federation.events import Committed
from nebula.federation.merge import read_state, state_digest
from nebula.proto.v1 import run_pb2 as pb
from nebula.proto.v1.packet_pb2 import Frame
from nebula.runtime.gateway import Gateway
from nebula.security.session import Session
from nebula.types import ROLE, Beat, Held, PushTicket, Slice
from nebula.wan.codec import Encoder, decode
from nebula.wan.frame import pack, unpack
from tests.chunked import cut_into
from tests.federated import TINY, Federated, clusters, tiny, write_corpus
from tests.wire.wired import Wired, wait_for, wired

CHUNK = 16 << 10
LANES = 3
FRAGMENT = "f0"
HANDSHAKE = 4 << 10
"""Bytes down that TLS takes, at the most."""


@pytest.fixture(scope="module")
def federate(tmp_path_factory) -> Callable[[Path], Federated]:
    folder = tmp_path_factory.mktemp("chunks")
    model = TINY.model_copy(update={"dim": 64, "ffn_dim": 128})
    membership, wan = Membership(quorum=1, max_stall=60.0), Wan(streams=LANES)
    run = tiny(write_corpus(folder / "corpus"), model=model, rounds=9, inner_steps=2, membership=membership, wan=wan)
    return lambda where: Federated(run, clusters(north=1, south=1), where, folder / "cache")


@pytest.fixture
def wires(federate, tmp_path, monkeypatch) -> Iterator[Wired]:
    """South is away. North has trained one round."""
    cut_into(CHUNK, monkeypatch)
    with wired(federate(tmp_path)) as wires:
        with gateway(wires, "south") as south:
            south.beat(Beat(leaving=True))
        train(wires, 0)
        yield wires


@contextmanager
def gateway(wires: Wired, cluster: str) -> Iterator[Gateway]:
    """A new life of it, that has joined."""
    gateway = wires.gateway(cluster)
    gateway.join()
    yield gateway
    gateway.close()


def train(wires: Wired, *rounds: int) -> None:
    """North moves one small parameter of each fragment, so that most chunks of the state stay what they were."""
    with gateway(wires, "north") as north:
        for round in rounds:
            for fragment, shapes in wires.hub._merger.shapes.items():
                moved = min(shapes, key=lambda name, shapes=shapes: (torch.Size(shapes[name]).numel(), name))
                delta = {n: torch.full(s, 0.5 + round if n == moved else 0.0) for n, s in shapes.items()}
                slices = {Slice(n, (0,) * v.dim(), tuple(v.shape)): v for n, v in delta.items()}
                packet = pack(Encoder(Codec(steps=(), feedback=None)).encode(slices))
                ticket = PushTicket(role=ROLE, fragment=fragment, round=round, base=round, weight=64.0)
                assert north.push(ticket, [packet]) == "accepted"
            wait_for(wires.hub, lambda round=round: wires.hub.state.round > round)


def newest(wires: Wired) -> Committed:
    return wires.hub.state.fragments[FRAGMENT].chain[-1]


def blob(wires: Wired, commit: Committed, kind: str) -> Path:
    return wires.federated.folder / "journal" / "blobs" / commit.blobs[kind]


class Chunks:
    """What coordinators read of states for clusters, one after the other. From number `at` on, all lanes wait; if
    they are `lost`, in vain."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[tuple[int, bytes]] = []
        self.at, self.lost = 1 << 30, False
        self.reached, self.go = threading.Event(), threading.Event()
        self._lock, self._waiting = threading.Lock(), 0
        self._chunk = pulls.chunk
        monkeypatch.setattr(pulls, "chunk", self.read)

    def read(self, ledger: Ledger, commit: Committed, request: pb.PullRequest, sha256: bytes) -> bytes:
        if request.kind != pb.PullRequest.KIND_STATE:
            return self._chunk(ledger, commit, request, sha256)
        if len(self.sent) >= self.at:
            with self._lock:
                self._waiting += 1
            if self._waiting == LANES:  # no other call comes in the midst of what is done meanwhile
                self.reached.set()
            assert self.go.wait(30)
            if self.lost:
                raise ConnectionError("the coordinator goes away")
        found = self._chunk(ledger, commit, request, sha256)
        with self._lock:
            self.sent.append((request.version, sha256))
        return found

    @contextmanager
    def paused(self, at: int) -> Iterator[None]:
        self.at = at
        assert self.reached.wait(30)
        yield
        self.at = 1 << 30
        self.go.set()


@pytest.fixture
def chunks(monkeypatch) -> Chunks:
    return Chunks(monkeypatch)


@contextmanager
def fetching(gateway: Gateway) -> Iterator[Future]:
    """A state, beside whoever does something else meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(gateway.pull, "state", FRAGMENT, 0)


@pytest.mark.parametrize("size", ["much larger", "as large", "a byte smaller", "much smaller"])
def test_a_state_of_any_number_of_chunks(size, wires, chunks, monkeypatch):
    commit = newest(wires)
    length = commit.state_bytes
    cut_into({"much larger": 4 << 20, "as large": length, "a byte smaller": length - 1}.get(size, CHUNK), monkeypatch)
    with gateway(wires, "south") as south:
        pulled, state = south.pull("state", FRAGMENT, 0)
    assert state == blob(wires, commit, "params").read_bytes()
    assert (pulled.status, pulled.version, pulled.contributors) == ("ready", 1, ("north",))
    assert pulled.digest == commit.digest == state_digest(read_state(state))
    asked = {"much larger": 1, "as large": 1, "a byte smaller": 2}.get(size, -(-length // CHUNK))
    assert len(chunks.sent) == len(set(chunks.sent)) == asked
    assert south._payload_down == length


def test_a_cut_costs_at_most_what_was_under_way(wires, monkeypatch):
    relay, length, pull = wires.relays["south"], newest(wires).state_bytes, wires.hub.pull
    sent: list[int] = []

    def cut_late(peer: str, frames: Iterator[Frame]) -> Iterator[Frame]:
        for frame in pull(peer, frames):
            yield frame
            before = sum(sent)
            sent.append(len(frame.ciphertext))
            if before < 0.8 * length <= sum(sent):
                relay.cut()

    def cost() -> int:
        """Bytes of a whole life that does nothing else."""
        before = relay.traffic.down_bytes
        with gateway(wires, "south") as south:
            _, state = south.pull("state", FRAGMENT, 0)
        assert state_digest(read_state(state)) == newest(wires).digest
        return relay.traffic.down_bytes - before

    undisturbed, connections = cost(), relay.traffic.connections
    monkeypatch.setattr(wires.hub, "pull", cut_late)
    disturbed = cost()
    assert relay.traffic.connections > connections + 1
    handshakes = (relay.traffic.connections - connections - 1) * HANDSHAKE
    assert length < undisturbed < disturbed <= undisturbed + LANES * CHUNK + handshakes


def test_a_state_that_is_fetched_stays_however_many_are_newer(wires, chunks):
    with gateway(wires, "south") as south, fetching(south) as transfer:
        with chunks.paused(at=5):
            lent = newest(wires)
            train(wires, 1, 2, 3)
        pulled, state = transfer.result()
        assert (pulled.version, pulled.digest) == (1, lent.digest)
        assert len(chunks.sent) == len(set(chunks.sent))
        params = read_state(state)
        for version in (2, 3, 4):  # and from there on, by updates
            _, update = south.pull("update", FRAGMENT, version)
            step = decode(unpack(update, max_bytes=len(update)), max_elements=1 << 20)
            params |= {where.name: params[where.name] + values for where, values in step.items()}
        assert state_digest(params) == newest(wires).digest
        assert blob(wires, lent, "params").exists()
        south.plan({name: Held(f.version, f.digest) for name, f in wires.hub.state.fragments.items()}, None)
        train(wires, 4)
        wait_for(wires.hub, lambda: not blob(wires, lent, "params").exists())


def test_a_state_that_is_gone_costs_what_differs_in_the_newest(wires, chunks):
    """The coordinator is another one now, which has lent nothing."""
    with gateway(wires, "south") as south, fetching(south) as transfer:
        with chunks.paused(at=5):
            wires.hub._loans.give_back("south", now=0.0)
            train(wires, 1, 2, 3)
        pulled, state = transfer.result()
    commit = newest(wires)
    assert (pulled.version, pulled.digest) == (4, commit.digest)
    assert state_digest(read_state(state)) == commit.digest
    hashes = [hash for _, hash in chunks.sent]
    assert len(hashes) == len(set(hashes))
    assert {version for version, _ in chunks.sent} == {1, 4}
    assert commit.state_bytes <= south._payload_down <= commit.state_bytes + 2 * CHUNK  # of 21


def test_a_coordinator_that_is_replaced_in_mid_transfer(wires, chunks):
    with gateway(wires, "south") as south, fetching(south) as transfer:
        with chunks.paused(at=5):
            chunks.lost = True
            chunks.go.set()
            wires.restart()
            chunks.lost = False
        pulled, state = transfer.result()
    assert pulled.digest == newest(wires).digest == state_digest(read_state(state))
    count = -(-len(state) // CHUNK)
    assert count == len(set(chunks.sent)) <= len(chunks.sent) <= count + LANES
    assert wires.hub.state.epochs["south"] == 3  # once when it left, once here, once more here


def supervised(wires: Wired) -> list[JournalError]:
    """Replace a coordinator that ends."""
    tick, ends = wires.tick, []

    def tick_or_replace() -> None:
        try:
            tick()
        except JournalError as error:
            ends.append(error)
            wires.restart()

    wires.tick = tick_or_replace
    return ends


def test_a_chunk_that_is_damaged_on_disk_is_repaired_by_the_next_coordinator(wires, chunks):
    ends = supervised(wires)
    path = blob(wires, newest(wires), "params")
    with gateway(wires, "south") as south, fetching(south) as transfer:
        with chunks.paused(at=5):
            whole = path.read_bytes()
            path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        pulled, state = transfer.result()
    assert [str(error) for error in ends] == [
        f"blob {path.name} in {path.parent} is corrupt: its content does not match its name"
    ]
    assert state == path.read_bytes() == whole
    assert pulled.digest == newest(wires).digest
    assert len(wires.federated.events("repaired")) == 1


@pytest.mark.parametrize("kind", ["update", "state"])
def test_damage_that_a_pull_meets_first_does_not_end_the_agent(kind, wires):
    ends = supervised(wires)
    path = blob(wires, newest(wires), "update" if kind == "update" else "params")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with gateway(wires, "south") as south:
        assert south.pull(kind, FRAGMENT, 1)[1] == whole
    assert len(ends) == 1


def test_what_is_deleted_while_it_is_read_is_no_damage(wires, monkeypatch):
    head, once = pulls.head, []

    def slow(ledger, commit, request):
        if request.kind == pb.PullRequest.KIND_STATE and not once:
            once.append(commit)
            wires.hub._loans.give_back("south", now=0.0)
            train(wires, 1, 2, 3)
            assert not blob(wires, commit, "params").exists()
        return head(ledger, commit, request)

    monkeypatch.setattr(pulls, "head", slow)
    with gateway(wires, "south") as south:
        pulled, _ = south.pull("state", FRAGMENT, 1)
    assert once
    assert (pulled.version, pulled.digest) == (4, newest(wires).digest)


def test_a_chunk_that_there_is_not(wires):
    kind, chunks = pb.PullRequest.KIND_STATE, [b"x" * 32]
    with gateway(wires, "south") as south:

        def ask(version: int) -> tuple[pb.PullHead, list[bytes]]:
            request = pb.PullRequest(role=ROLE, kind=kind, fragment=FRAGMENT, version=version, chunks=chunks)

            def whole(session: Session) -> tuple[pb.PullHead, list[bytes]]:
                head, coming = south._ask(session, request, 0)
                return head, list(coming)

            return south._caller.call(whole)

        gone, nothing = ask(7)
        assert (gone.status, nothing) == (pb.PullHead.STATUS_GONE, [])
        with pytest.raises(PacketError, match="f0 version 1 has no chunk"):
            ask(1)
