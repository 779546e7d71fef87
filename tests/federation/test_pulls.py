from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from nebula.checkpoint.ledger import Ledger
from nebula.checkpoint.store import Folder
from nebula.errors import JournalError, PacketError
from nebula.federation import pulls
from nebula.federation.events import Committed
from nebula.federation.state import Fragment, Rules, State, initial
from nebula.proto.v1.run_pb2 import PullHead, PullRequest

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

    def find(self, kind: PullRequest.Kind.ValueType, version: int = 0, who: str = "north") -> tuple[int, int | None]:
        """Status and version."""
        request = PullRequest(kind=kind, fragment="f0", version=version)
        status, commit = pulls.find(self.state, self.loans.find(who, "f0"), request)
        return status, commit.version if commit else None


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
    found = [desk.find(PullRequest.KIND_CHUNK, version) for version in range(4, 10)]
    assert found == [(GONE, None), (READY, 5), (GONE, None), (READY, 7), (READY, 8), (GONE, None)]
    assert desk.find(PullRequest.KIND_CHUNK, 5, who="south") == (GONE, None)
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
    assert desk.find(PullRequest.KIND_CHUNK, 5) == (GONE, None)
    with pytest.raises(JournalError, match="missing"):
        desk.ledger.get(lent.blobs["params"])


def test_what_is_read_of_a_commit(desk):
    commit = desk.commits[-1]

    def read(kind: PullRequest.Kind.ValueType, chunk: bytes = b"") -> tuple[PullHead, bytes | None]:
        return pulls.read(desk.ledger, commit, PullRequest(kind=kind, fragment="f0", chunk=chunk))

    manifest, nothing = read(PullRequest.KIND_STATE)
    assert (manifest.version, manifest.digest, manifest.payload_bytes, nothing) == (5, "d5", 8, None)
    assert manifest.chunks == [manifest.sha256]
    head, chunk = read(PullRequest.KIND_CHUNK, manifest.chunks[0])
    assert (chunk, head.sha256, head.payload_bytes, head.version) == (b"params 5", manifest.sha256, 8, 5)
    assert not head.chunks
    head, update = read(PullRequest.KIND_UPDATE)
    assert (update, head.sha256.hex(), head.payload_bytes) == (b"update 5", commit.blobs["update"], 8)
    for unknown in (b"", b"x" * 32):
        with pytest.raises(PacketError, match="f0 version 5 has no chunk"):
            read(PullRequest.KIND_CHUNK, unknown)
