"""What a pull is answered with: which commit, if there is one, and what of it."""

from __future__ import annotations

from typing import TypeAlias

from nebula.checkpoint.ledger import Ledger
from nebula.errors import PacketError
from nebula.federation.events import Committed
from nebula.federation.state import State
from nebula.proto.v1.run_pb2 import Manifest, PullHead, PullRequest

Found: TypeAlias = tuple[PullHead.Status.ValueType, Committed | None]

KINDS = {PullRequest.KIND_UPDATE: "update", PullRequest.KIND_STATE: "params"}
"""Which of a commit's blobs each is about."""


class Loans:
    """A state that a cluster fetches stays in the ledger although newer ones are there: where fetching it takes longer
    than a round or two, no state would ever be had whole. From it, the cluster can follow the updates since.

    One per cluster and fragment, until the cluster gives it back or has not asked for any of it in `seconds`. Whoever
    calls holds the coordinator's lock; `now` is its clock's."""

    def __init__(self, ledger: Ledger, seconds: float) -> None:
        self._ledger = ledger
        self._seconds = seconds
        self._lent: dict[tuple[str, str], tuple[Committed, float]] = {}

    def lend(self, cluster: str, commit: Committed, now: float) -> None:
        """Or go on lending."""
        self._lent[cluster, commit.fragment] = commit, now + self._seconds
        self._settle(now)

    def give_back(self, cluster: str, now: float) -> None:
        """All that it has."""
        self._lent = {key: loan for key, loan in self._lent.items() if key[0] != cluster}
        self._settle(now)

    def find(self, cluster: str, fragment: str) -> tuple[Committed, ...]:
        """One or none."""
        loan = self._lent.get((cluster, fragment))
        return loan[:1] if loan else ()

    def _settle(self, now: float) -> None:
        self._lent = {key: loan for key, loan in self._lent.items() if now < loan[1]}
        self._ledger.lent = {commit.blobs["params"] for commit, _ in self._lent.values()}


def find(state: State, lent: tuple[Committed, ...], request: PullRequest) -> Found:
    """`lent`: to whoever asks."""
    chain = state.fragments[request.fragment].chain
    if request.kind == PullRequest.KIND_UPDATE:
        return _find_update(state, chain, request.version)
    if not request.chunks:
        return PullHead.STATUS_READY, chain[-1]
    for commit in (*chain[-2:], *lent):
        if commit.version == request.version:
            return PullHead.STATUS_READY, commit
    return PullHead.STATUS_GONE, None


def _find_update(state: State, chain: tuple[Committed, ...], version: int) -> Found:
    for commit in chain:
        if commit.version == version and version > 0:
            return PullHead.STATUS_READY, commit
    if version <= chain[-1].version:
        return PullHead.STATUS_GONE, None
    ends = state.stop_at if state.stop_at is not None else state.rules.rounds
    return (PullHead.STATUS_ENDED if version > ends else PullHead.STATUS_PENDING), None


def head(ledger: Ledger, commit: Committed, request: PullRequest) -> PullHead:
    """Raises JournalError if the blob is missing or damaged."""
    found = PullHead(
        status=PullHead.STATUS_READY,
        fragment=commit.fragment,
        version=commit.version,
        digest=commit.digest,
        contributors=commit.contributors,
    )
    if not request.chunks:
        blob = commit.blobs[KINDS[request.kind]]
        chunks = ledger.chunks(blob)
        found.payload.CopyFrom(Manifest(bytes=ledger.size(blob), sha256=bytes.fromhex(blob), chunks=chunks))
    return found


def wanted(ledger: Ledger, commit: Committed, request: PullRequest) -> list[bytes]:
    """The chunks to send. Raises PacketError if one is asked for that is not there, or twice, and as `head`."""
    chunks = list(dict.fromkeys(ledger.chunks(commit.blobs[KINDS[request.kind]])))
    if not request.chunks:
        return chunks[:: request.every] if request.every else []
    if strange := set(request.chunks).difference(chunks):
        raise PacketError(f"{commit.fragment} version {commit.version} has no chunk {strange.pop().hex()[:12]!r}")
    if len(set(request.chunks)) != len(request.chunks):
        raise PacketError(f"a chunk of {commit.fragment} version {commit.version} is asked for twice")
    return list(request.chunks)


def chunk(ledger: Ledger, commit: Committed, request: PullRequest, sha256: bytes) -> bytes:
    """Raises as `head`."""
    return ledger.chunk(commit.blobs[KINDS[request.kind]], sha256)
