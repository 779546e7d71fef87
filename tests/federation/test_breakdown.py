"""What breaks at the coordinator's rim ends it at once, and what it left behind is enough to go on."""

from __future__ import annotations

import errno
import time

import pytest

from nebula.checkpoint.ledger import Ledger
from nebula.checkpoint.store import Folder
from nebula.config import Membership
from nebula.errors import PreflightError
from nebula.federation.events import Arrived, Committed
from nebula.federation.hub import Hub
from nebula.federation.journal import open_journal
from nebula.federation.journal_sqlite import SqliteJournal
from nebula.proto.v1 import run_pb2 as pb
from nebula.types import ROLE
from tests.federated import Federated, clusters, tiny, write_corpus


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus")), tmp_path_factory.mktemp("cache")


def federation(places, folder, **changes) -> Federated:
    corpus, cache = places
    return Federated(tiny(corpus, **changes), clusters(north=1, south=1), folder, cache)


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def deliver_all(hub: Hub, fragment: str) -> None:
    """As if both clusters had; merging is left to a stand-in that commits a blob."""
    blob = hub._ledger.put(b"update")

    def merge(effect):
        blobs = {"update": blob, "params": blob}
        names = tuple(arrival.cluster for arrival in effect.arrivals)
        return Committed(fragment=fragment, version=effect.version, digest="d", contributors=names, blobs=blobs)

    hub._merger.merge = merge
    for name in ("north", "south"):
        hub._apply(Arrived(cluster=name, fragment=fragment, round=0, weight=1.0, blob=blob, parts=(6,), seconds=None))


@pytest.mark.parametrize("broken", ["_ledger.keep", "_emit"])
def test_a_full_disk_after_a_merge_is_not_a_silent_end_of_merging(broken, places, tmp_path, monkeypatch):
    hub = federation(places, tmp_path).hub
    owner, _, method = broken.rpartition(".")
    monkeypatch.setattr(getattr(hub, owner) if owner else hub, method, full)
    deliver_all(hub, "f0")
    hub._task.wait()
    with pytest.raises(PreflightError, match="disk is full"):
        hub.tick()


def test_a_pull_is_answered_before_the_agent_takes_it_for_silence(places, tmp_path):
    hub = federation(places, tmp_path, membership=Membership(max_stall=0.2)).hub
    request = pb.PullRequest(kind=pb.PullRequest.KIND_UPDATE, role=ROLE, fragment="f0", version=1)
    start = time.monotonic()
    status, _ = hub._wait_for("north", request)
    assert status == pb.PullHead.STATUS_PENDING
    assert time.monotonic() - start < 5  # it was ten seconds, whatever max_stall says


def test_a_run_whose_founding_was_cut_short_founds_the_rest(places, tmp_path, monkeypatch):
    first = federation(places, tmp_path).hub
    append, journals = SqliteJournal.append, []

    def failing(journal, event):
        journals.append(journal)
        (full if len(journals) == 2 else append)(journal, event)

    def found() -> Hub:
        journal = open_journal(tmp_path / "other.sqlite", agreement=first.agreement.digest())
        return Hub(first.agreement, b"", first._identity, journal, Ledger(Folder(tmp_path / "other")), first._emit)

    monkeypatch.setattr(SqliteJournal, "append", failing)
    with pytest.raises(OSError, match="No space"):
        found()
    monkeypatch.undo()
    journals[0].close()
    hub = found()
    founded = [event.fragment for event in hub._journal.replay() if isinstance(event, Committed)]
    assert sorted(founded) == sorted(hub.state.fragments)
    assert hub.global_digest() == first.global_digest()
