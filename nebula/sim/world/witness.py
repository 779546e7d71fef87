"""What must hold after every event, whatever goes wrong. The witness sees everything and tells nobody."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nebula.checkpoint.ledger import Ledger
from nebula.clock import REAL
from nebula.config import Agreement
from nebula.federation.events import Committed, Merge
from nebula.federation.hub import Hub
from nebula.federation.merge import Merger
from nebula.federation.state import Fragment, State
from nebula.sim.world.engine import Produced

if TYPE_CHECKING:
    from nebula.sim.world.world import World

INVARIANTS = {
    "once": "a version commits at most once, on the version before it, and never disappears",
    "authentic": "every merged delta was produced by its cluster for that round against that base, and counts once",
    "promised": "whoever was told that its delta is accepted is part of the commit",
    "fresh": "a coordinator takes no message twice, and none of a session that a newer one has replaced",
    "right": "every commit has the bits that merging its deltas in their fixed order gives",
    "same": "all who hold version v hold the same digest",
    "repeats": "a restored cluster repeats its round to the byte",
    "exact": "a run in which every cluster took part in every round ends as if nothing had happened",
    "counted": "bytes in counters are bytes on the wire",
    "bounded": "memory and disk stay within their bounds",
    "ends": "the run ends, or says what it waits for",
    "clean": "nothing fails but by an error made for it",
}


class Violation(AssertionError):
    """`invariant`: its key in INVARIANTS; `what`: how it was violated."""

    def __init__(self, invariant: str, what: str) -> None:
        super().__init__(f"{INVARIANTS[invariant]}: {what}")
        self.invariant = invariant
        self.what = what


class Blobs:
    """A Store in memory."""

    def __init__(self) -> None:
        self._data: dict[str, bytes] = {}

    def put(self, name: str, data: bytes) -> None:
        self._data[name] = data

    def get(self, name: str) -> bytes:
        return self._data[name]

    def read(self, name: str, offset: int, length: int) -> bytes:
        return self._data[name][offset : offset + length]

    def names(self) -> list[str]:
        return sorted(self._data)

    def size(self, name: str) -> int:
        return len(self._data[name])

    def delete(self, name: str) -> None:
        self._data.pop(name, None)

    def sweep(self) -> None:
        pass


class Witness:
    """`commits` by fragment and version, as they were first seen. A merger of its own repeats every merge."""

    def __init__(self, agreement: Agreement, produced: Produced) -> None:
        self.commits: dict[str, list[Committed]] = {}
        self.everyone = True
        """Whether every cluster has been part of every commit."""
        self._members = tuple(sorted(agreement.members))
        self._produced = produced
        self._ledger = Ledger(Blobs())
        self._merger = Merger(agreement, self._ledger, REAL)
        self._promised: dict[tuple[str, int], set[str]] = {}
        self._taken: set[tuple[object, str, int, int]] = set()
        self._newest: dict[tuple[object, str], int] = {}
        self._seen: State | None = None
        for commit in self._merger.found():
            self.commits[commit.fragment] = [commit]

    def produced(self, payload: bytes) -> None:
        self._ledger.put(payload)

    def promised(self, cluster: str, fragment: str, round: int) -> None:
        """A cluster was told that its delta is accepted."""
        self._promised.setdefault((fragment, round), set()).add(cluster)
        if round + 1 < len(self.commits[fragment]):
            self._kept(self.commits[fragment][round + 1])

    def _kept(self, commit: Committed) -> None:
        lost = self._promised.get((commit.fragment, commit.version - 1), set()).difference(commit.contributors)
        _require("promised", not lost, f"{commit.fragment} version {commit.version} lacks {sorted(lost)}")

    def took(self, coordinator: object, cluster: str, epoch: int, counter: int) -> None:
        """A life of the coordinator believed the first frame of a call."""
        message = (coordinator, cluster, epoch, counter)
        _require("fresh", message not in self._taken, f"message {counter} of {cluster}'s epoch {epoch} came twice")
        self._taken.add(message)
        newest = self._newest.setdefault((coordinator, cluster), epoch)
        _require("fresh", epoch >= newest, f"{cluster}'s epoch {epoch} came after {newest}")
        self._newest[coordinator, cluster] = epoch

    def look(self, state: State) -> None:
        """At what a coordinator has come to."""
        if state is self._seen:
            return
        for name, fragment in state.fragments.items():
            if self._seen is None or fragment is not self._seen.fragments[name]:
                self._look_at(name, fragment)
        self._seen = state
        _require("bounded", len(state.reports) <= 3, f"reports of rounds {sorted(state.reports)} are kept")

    def _look_at(self, name: str, fragment: Fragment) -> None:
        known = self.commits[name]
        versions = [commit.version for commit in fragment.chain]
        _require("once", versions == list(range(versions[0], versions[-1] + 1)) if versions else True, f"{versions}")
        if fragment.version < 0:
            return
        _require("once", fragment.version >= len(known) - 1, f"{name} went back to {fragment.version}")
        for commit in fragment.chain:
            if commit.version < len(known):
                same = (commit.digest, commit.contributors) == _identity(known[commit.version])
                _require("once", same, f"{name} version {commit.version} became another one")
            else:
                self._commits(name, fragment.merged, commit)
        if fragment.merging:
            for cluster in fragment.arrived:
                self.promised(cluster, name, fragment.version)

    def _commits(self, name: str, merge: Merge | None, commit: Committed) -> None:
        base = self.commits[name][-1]
        where = f"{name} version {commit.version}"
        _require("once", commit.version == base.version + 1 and merge is not None, f"{where} follows {base.version}")
        assert merge is not None
        clusters = [arrival.cluster for arrival in merge.arrivals]
        ordered = clusters == sorted(set(clusters)) == list(commit.contributors)
        _require("authentic", ordered, f"{where} is made of {clusters}, said to be of {commit.contributors}")
        for arrival in merge.arrivals:
            genuine = self._produced.knows(arrival.cluster, base.version, name, base.digest, arrival.blob)
            _require("authentic", genuine and arrival.round == base.version, f"{where}: {arrival}")
        self._kept(commit)
        again = self._merger.merge(merge)
        right = (again.digest, again.blobs) == (commit.digest, dict(commit.blobs))
        _require("right", right, f"{where} of {clusters}")
        self.commits[name].append(commit)
        self.everyone = self.everyone and tuple(clusters) == self._members

    def holds(self, cluster: str, fragment: str, version: int, digest: str) -> None:
        known = self.commits[fragment]
        right = version < len(known) and known[version].digest == digest
        _require("same", right, f"{cluster} holds {digest[:15]} as version {version} of {fragment}")

    def bounded(self, hub: Hub, blobs: int) -> None:
        """`blobs` on the coordinator's disk."""
        state = hub.state
        chains = sum(len(fragment.chain) for fragment in state.fragments.values())
        most = chains + len(state.fragments) * (2 * 4 + 4 + 3 * len(self._members))
        _require("bounded", blobs <= most, f"{blobs} blobs where {most} have a use")


def _identity(commit: Committed) -> tuple[str, tuple[str, ...]]:
    return commit.digest, commit.contributors


def _require(invariant: str, holds: bool, what: str) -> None:
    if not holds:
        raise Violation(invariant, what)


def check_counters(world: World, totals: dict[str, int]) -> None:
    """`totals`: payload bytes that the coordinator counts per cluster, against those its gateways sent. What a life
    sent after its last report is in no counter."""
    for name, counted in totals.items():
        lives = world.transports.get(name, [])
        possible = {0}
        for life in lives:
            possible = {before + said for before in possible for said in life.said}
        _require("counted", counted in possible, f"{name}: {counted} payload bytes, sent {sorted(possible)}")
