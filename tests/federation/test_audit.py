"""What is left behind is checked without being touched, and every kind of damage to it is found."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from functools import reduce
from pathlib import Path
from unittest.mock import patch

import apsw
import pytest
from left import lead
from postgres import PASSWORD
from runs import make_agreement

from nebula.checkpoint.bucket import Bucket
from nebula.checkpoint.ledger import Ledger
from nebula.errors import PreflightError, UnreachableError, UsageError
from nebula.federation import coordinator as machine
from nebula.federation.audit import audit
from nebula.federation.events import Committed, Joined
from nebula.federation.journal import open_journal
from nebula.federation.merge import fragment_shapes
from nebula.federation.reading import read_events
from nebula.federation.restore import load_global
from nebula.federation.shell import _live_blobs, rules_of
from nebula.federation.state import initial

AGREEMENT = make_agreement()
DIGEST = AGREEMENT.digest()
FRAGMENTS = tuple(fragment_shapes(AGREEMENT))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "journal"
    folder.mkdir()
    with closing(open_journal(folder / "journal.sqlite", agreement=DIGEST)) as journal:
        lead(journal, folder / "blobs", AGREEMENT)
    return folder


@pytest.fixture
def left(model, tmp_path) -> Path:
    """A folder with journal and blobs."""
    return Path(shutil.copytree(model, tmp_path / "journal"))


def everything(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def faults(folder: Path, **where: str) -> dict[str, str]:
    return {finding.what: finding.fault for finding in audit(folder, AGREEMENT, **where) if finding.fault}


def looked_at(folder: Path) -> set[str]:
    """Names of the blobs that an audit reads."""
    names: set[str] = set()
    get = Ledger.get
    with patch.object(Ledger, "get", lambda ledger, name: names.add(name) or get(ledger, name)):
        assert faults(folder) == {}
    return names


def test_all_is_well_and_stays_as_it_is(left):
    before = everything(left)
    assert before[str(left / "journal.sqlite-wal")][0], "the newest events are in SQLite's log only"
    found = list(audit(left, AGREEMENT))
    assert [finding.fault for finding in found] == [""] * len(found)
    whats = [finding.what for finding in found]
    assert whats[0] == "journal"
    assert "version 3 of 6" in found[0].found
    for name in FRAGMENTS:
        assert {f"fragment {name}, version 2", f"fragment {name}, version 3"} <= {*whats}
        assert {f"fragment {name}, delta of {c} in round 2" for c in ("north", "south")} <= {*whats}
        assert f"fragment {name}, delta of north in round 3" in whats
    params, info = load_global(left, AGREEMENT)
    assert info["version"] == 3
    assert {name: tuple(value.shape) for name, value in params.items()} == {
        name: shape for shapes in fragment_shapes(AGREEMENT).values() for name, shape in shapes.items()
    }
    assert everything(left) == before


def test_just_what_a_coordinator_keeps_is_looked_at(left):
    state = initial(rules_of(AGREEMENT, FRAGMENTS))
    events = read_events(left / "journal.sqlite", agreement=DIGEST)
    state = reduce(lambda state, event: machine.step(state, event, 0.0)[0], events, state)
    looked = looked_at(left)
    assert looked == _live_blobs(state)
    Ledger(Bucket(f"file://{left}/blobs")).keep(looked)
    assert faults(left) == {}


def test_every_damaged_blob_is_found(left):
    live = [left / "blobs" / name for name in sorted(looked_at(left))]
    assert len(live) > 20
    for path in live:
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        damaged = faults(left)
        assert len(damaged) == 1
        assert f"{path.name} in {left / 'blobs'} is corrupt" in str(damaged)
        path.unlink()
        gone = faults(left)
        assert gone.keys() == damaged.keys()
        assert f"blob {path.name[:12]}… is missing" in str(gone)
        path.write_bytes(data)
    assert faults(left) == {}


def test_parameters_must_be_those_that_were_committed(left):
    events = read_events(left / "journal.sqlite", agreement=DIGEST)
    *_, second, third = [e for e in events if isinstance(e, Committed) and e.fragment == FRAGMENTS[0]]
    with apsw.Connection(str(left / "journal.sqlite")) as db:
        db.execute("UPDATE events SET body = replace(body, ?, ?)", (third.digest, second.digest))
    assert f"its commit says {second.digest}" in faults(left)[f"fragment {FRAGMENTS[0]}, version 3"]


def garble(path: Path) -> str:
    path.with_name(f"{path.name}-wal").unlink()
    path.write_bytes(b"\xff" * 4096 + path.read_bytes()[4096:])
    return "is damaged"


def truncate(path: Path) -> str:
    path.with_name(f"{path.name}-wal").unlink()
    path.write_bytes(path.read_bytes()[:5000])
    return "is damaged"


def empty(path: Path) -> str:
    path.with_name(f"{path.name}-wal").unlink()
    path.write_bytes(b"")
    return "is damaged"


def statement(sql: str, told: str) -> Callable[[Path], str]:
    def act(path: Path) -> str:
        with apsw.Connection(str(path)) as db:
            db.execute(sql)
        return told

    return act


@pytest.mark.parametrize(
    "damage",
    [
        garble,
        truncate,
        empty,
        statement("UPDATE meta SET value = 99 WHERE key = 'schema'", "has schema 99"),
        statement("UPDATE meta SET value = 'sha256:f' WHERE key = 'agreement'", "belongs to agreement sha256:f"),
        statement("INSERT INTO events (kind, body) VALUES ('Moved', '{}')", "unknown kind 'Moved'"),
        statement("UPDATE events SET body = '{' WHERE seq = 3", "cannot be read"),
        statement("DELETE FROM events WHERE kind = 'Arrived'", "do not follow from each other"),
    ],
)
def test_a_journal_that_cannot_be_trusted(left, damage):
    told = damage(left / "journal.sqlite")
    before = everything(left)
    found = list(audit(left, AGREEMENT))
    assert [finding.what for finding in found] == ["journal"]
    assert told in found[0].fault
    assert everything(left) == before


def test_a_journal_of_a_run_that_never_began(tmp_path):
    with closing(open_journal(tmp_path / "journal.sqlite", agreement=DIGEST)):
        pass
    assert [(f.what, f.fault) for f in audit(tmp_path, AGREEMENT)] == [("journal", "")]
    with pytest.raises(UsageError, match="no committed state yet"):
        load_global(tmp_path, AGREEMENT)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_what_is_not_there(left, tmp_path):
    for ask in (lambda: list(audit(tmp_path / "no", AGREEMENT)), lambda: load_global(tmp_path / "no", AGREEMENT)):
        with pytest.raises(UsageError, match="there is no journal") as told:
            ask()
        assert "--journal" in told.value.hint
    shutil.rmtree(left / "blobs")
    for ask in (lambda: list(audit(left, AGREEMENT)), lambda: load_global(left, AGREEMENT)):
        with pytest.raises(UsageError, match="there are no blobs") as told:
            ask()
        assert "--blobs" in told.value.hint
    assert not (left / "blobs").exists()


def test_while_a_coordinator_runs_nothing_is_said_of_what_it_changes(left):
    path = left / "journal.sqlite"
    with closing(open_journal(path, agreement=DIGEST)) as journal:
        before = path.stat(), sorted(left.iterdir())  # to read it here would drop this process's lock
        for ask in (lambda: list(audit(left, AGREEMENT)), lambda: load_global(left, AGREEMENT)):
            with pytest.raises(PreflightError, match="the coordinator of this run still runs"):
                ask()
        ask_elsewhere = f"from nebula.federation.reading import *; read_events({str(path)!r}, agreement={DIGEST!r})"
        told = subprocess.run([sys.executable, "-c", ask_elsewhere], capture_output=True, text=True)
        assert "PreflightError: the coordinator of this run still runs" in told.stderr
        assert (path.stat(), sorted(left.iterdir())) == before
        journal.append(Joined(cluster="north", epoch=7))
    assert faults(left) == {}


@pytest.mark.machine("postgres")
def test_a_journal_in_postgres_is_read_without_taking_it_over(postgres, left):
    where = {"journal": postgres.url(), "blobs": f"file://{left}/blobs"}
    with pytest.raises(UsageError, match="there is no journal in postgresql"):
        list(audit(left, AGREEMENT, **where))
    journal = open_journal(where["journal"], agreement=DIGEST)
    for event in read_events(left / "journal.sqlite", agreement=DIGEST):
        journal.append(event)
    with pytest.raises(PreflightError, match="still runs") as running:
        list(audit(left, AGREEMENT, **where))
    assert PASSWORD not in running.value.message
    journal.close()
    (left / "journal.sqlite").unlink()
    assert faults(left, **where) == {}
    params, info = load_global(left, AGREEMENT, **where)
    assert (len(params), info["version"]) == (sum(len(shapes) for shapes in fragment_shapes(AGREEMENT).values()), 3)
    with closing(open_journal(where["journal"], agreement=DIGEST)) as journal:
        assert journal.term == 2


def test_blobs_in_a_store_that_does_not_answer(left):
    with patch.object(Bucket, "get", side_effect=ConnectionError("memory://blobs cannot be used: no route")):
        for ask in (audit, load_global):
            with pytest.raises(UnreachableError, match="no route") as told:
                list(ask(left, AGREEMENT, blobs="memory://blobs"))
            assert told.value.hint
