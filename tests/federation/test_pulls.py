from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from nebula.checkpoint.ledger import Ledger
from nebula.checkpoint.store import Folder
from nebula.errors import JournalError, PacketError
from nebula.federation import pulls
from nebula.federation.events import Committed
from nebula.federation.state import Fragment, Rules, State, initial
from nebula.proto.v1.run_pb2 import Manifest, PullHead, PullRequest
from nebula.wan.chunks import shared
from tests.chunked import CHUNK, cut_into, pieces, sha

READY, PENDING = PullHead.STATUS_READY, PullHead.STATUS_PENDING
GONE, ENDED = PullHead.STATUS_GONE, PullHead.STATUS_ENDED


@dataclass
class Desk:
    """Commits of the fragment f0, the newest four of which are in its chain."""

    ledger: Ledger
    loans: pulls.Loans = field(init=False)
    commits: list[Committed] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.loans = pulls.Loans(self.ledger, 60.0)

    def commit(self) -> Committed:
        """And let go what no longer lives."""
        version = len(self.commits)
        blobs = {kind: self.ledger.put(f"{kind} {version}".encode()) for kind in ("update", "params")}
        self.commits.append(Committed(fragment="f0", version=version, digest=f"d{version}", blobs=blobs))
        updates = {commit.blobs["update"] for commit in self.commits[-4:]}
        self.ledger.keep(updates | {commit.blobs["params"] for commit in self.commits[-2:]})
        return self.commits[-1]

    @property
    def state(self) -> State:
        rules = Rules(
            members={"north": 1}, fragments=("f0",), rounds=9, inner_steps=1, evaluate_every=1, quorum=1, max_stall=1.0
        )
        return replace(initial(rules), fragments={"f0": Fragment(chain=tuple(self.commits[-4:]))})

    def find(
        self, kind: PullRequest.Kind.ValueType, version: int = 0, who: str = "north", chunks: Sequence[bytes] = ()
    ) -> tuple[int, int | None]:
        """Status and version."""
        request = PullRequest(kind=kind, fragment="f0", version=version, chunks=chunks)
        status, commit = pulls.find(self.state, self.loans.find(who, "f0"), request)
        return status, commit.version if commit else None

    def find_chunk(self, version: int, who: str = "north") -> tuple[int, int | None]:
        """Of a state. Which one it is, is not looked at yet."""
        return self.find(PullRequest.KIND_STATE, version, who, [bytes(32)])


@pytest.fixture
def desk(tmp_path) -> Desk:
    desk = Desk(Ledger(Folder(tmp_path)))
    for _ in range(6):
        desk.commit()
    return desk


def test_a_state_is_the_newest_and_an_update_the_one_that_is_asked_for(desk):
    assert desk.find(PullRequest.KIND_STATE, 3) == (READY, 5)
    found = [desk.find(PullRequest.KIND_UPDATE, version) for version in (0, 1, 2, 5, 6, 9, 10)]
    assert found == [
        (GONE, None),
        (GONE, None),
        (READY, 2),
        (READY, 5),
        (PENDING, None),
        (PENDING, None),
        (ENDED, None),
    ]


def test_chunks_are_of_the_newest_two_states_and_of_the_one_on_loan(desk):
    lent = desk.commits[-1]
    desk.loans.lend("north", lent, now=0.0)
    for _ in range(3):
        desk.commit()
    found = [desk.find_chunk(version) for version in range(4, 10)]
    assert found == [(GONE, None), (READY, 5), (GONE, None), (READY, 7), (READY, 8), (GONE, None)]
    assert desk.find_chunk(5, who="south") == (GONE, None)
    assert desk.ledger.get(lent.blobs["params"]) == b"params 5"


@pytest.mark.parametrize("end", ["given back", "for a newer one", "forgotten"])
def test_a_loan_ends(end, desk):
    lent = desk.commits[-1]
    desk.loans.lend("north", lent, now=0.0)
    desk.loans.lend("south", desk.commits[-1], now=0.0)
    desk.loans.lend("north", lent, now=50.0)
    desk.loans.give_back("south", now=100.0)
    for _ in range(3):
        desk.commit()
    assert desk.ledger.get(lent.blobs["params"])
    if end == "given back":
        desk.loans.give_back("north", now=101.0)
    elif end == "for a newer one":
        desk.loans.lend("north", desk.commits[-1], now=101.0)
    else:
        desk.loans.give_back("south", now=110.0)  # somebody always asks for a plan
    desk.commit()
    assert desk.find_chunk(5) == (GONE, None)
    with pytest.raises(JournalError, match="missing"):
        desk.ledger.get(lent.blobs["params"])


def test_chunks_of_an_update_are_found_as_the_update_is(desk):
    found = [desk.find(PullRequest.KIND_UPDATE, version, chunks=[bytes(32)]) for version in (1, 2, 5, 6, 10)]
    assert found == [(GONE, None), (READY, 2), (READY, 5), (PENDING, None), (ENDED, None)]


# --- what is sent of a commit -------------------------------------------------------------------------------------

KINDS = [(PullRequest.KIND_STATE, "params 5"), (PullRequest.KIND_UPDATE, "update 5")]


def ask(kind: PullRequest.Kind.ValueType, chunks: Sequence[bytes] = (), every: int = 0) -> PullRequest:
    return PullRequest(kind=kind, fragment="f0", version=5, chunks=chunks, every=every)


@pytest.mark.parametrize(("kind", "blob"), KINDS)
def test_a_head_describes_the_payload_unless_chunks_are_asked_for(kind, blob, desk, monkeypatch):
    cut_into(CHUNK, monkeypatch)
    commit = replace(desk.commits[-1], contributors=("north", "south"))
    head = pulls.head(desk.ledger, commit, ask(kind))
    hashes = [sha(piece) for piece in pieces(blob.encode())]
    assert head.payload == Manifest(bytes=8, sha256=sha(blob.encode()), chunks=hashes)
    assert (head.status, head.fragment, head.version, head.digest) == (READY, "f0", 5, "d5")
    assert head.contributors == ["north", "south"]
    with_chunks = pulls.head(desk.ledger, commit, ask(kind, hashes))
    assert not with_chunks.HasField("payload")
    head.ClearField("payload")
    assert with_chunks == head


@pytest.mark.parametrize(("kind", "blob"), KINDS)
def test_chunks_come_as_they_are_asked_for(kind, blob, desk, monkeypatch):
    cut_into(CHUNK, monkeypatch)
    commit, (first, last) = desk.commits[-1], pieces(blob.encode())
    for wanted in ([sha(first)], [sha(last)], [sha(last), sha(first)]):
        request = ask(kind, wanted, every=1)
        assert pulls.wanted(desk.ledger, commit, request) == wanted
        assert [sha(pulls.chunk(desk.ledger, commit, request, chunk)) for chunk in wanted] == wanted


@pytest.mark.parametrize("count", [0, 1, 5, 12])
@pytest.mark.parametrize("every", [1, 2, 4, 16])
def test_with_the_manifest_comes_what_lane_0_would_ask_for(count, every, desk, monkeypatch):
    """Both ends cut the payload into the same shares, equal chunks counted once."""
    cut_into(CHUNK, monkeypatch)
    payload = b"".join(bytes([n % 7]) * CHUNK for n in range(count))
    commit = replace(desk.commits[-1], blobs={"update": desk.ledger.put(payload)})
    request = ask(PullRequest.KIND_UPDATE, every=every)
    sent = pulls.wanted(desk.ledger, commit, request)
    chunks = pulls.head(desk.ledger, commit, request).payload.chunks
    assert sent == (shared(chunks, every) or [[]])[0]
    assert len(sent) == -(-min(count, 7) // every)
    assert pulls.wanted(desk.ledger, commit, ask(PullRequest.KIND_UPDATE)) == []


@pytest.mark.parametrize("kind", [kind for kind, _ in KINDS])
@pytest.mark.parametrize("unknown", [b"", b"x" * 32])
def test_a_chunk_that_there_is_not_is_refused(kind, unknown, desk):
    known = list(pulls.head(desk.ledger, desk.commits[-1], ask(kind)).payload.chunks)
    with pytest.raises(PacketError, match="f0 version 5 has no chunk"):
        pulls.wanted(desk.ledger, desk.commits[-1], ask(kind, [*known, unknown]))
    with pytest.raises(PacketError, match="asked for twice"):
        pulls.wanted(desk.ledger, desk.commits[-1], ask(kind, known * 2))
