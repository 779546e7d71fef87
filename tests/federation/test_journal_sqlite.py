"""The journal as a SQLite file: what it does beyond every journal's promises."""

from __future__ import annotations

import sqlite3

import apsw
import pytest

from nebula.errors import JournalError
from nebula.federation.events import Joined
from nebula.federation.journal_sqlite import SqliteJournal

EVENT = Joined(cluster="north", epoch=3)


def start(path) -> SqliteJournal:
    return SqliteJournal(path, agreement="sha256:a")


def test_it_syncs_before_it_acknowledges(tmp_path):
    journal = start(tmp_path / "j.sqlite")
    settings = {name: journal._db.pragma(name) for name in ("synchronous", "journal_mode", "locking_mode")}
    assert settings == {"synchronous": 2, "journal_mode": "wal", "locking_mode": "exclusive"}  # 2 = FULL
    journal.close()


def test_a_foreign_or_damaged_file_is_refused(tmp_path):
    path = tmp_path / "j.sqlite"
    start(path).close()
    with pytest.raises(JournalError, match="belongs to agreement sha256:a, not sha256:b"):
        SqliteJournal(path, agreement="sha256:b")
    with sqlite3.connect(path) as db:
        db.execute("UPDATE meta SET value = '9' WHERE key = 'schema'")
    db.close()
    with pytest.raises(JournalError, match="has schema 9"):
        start(path)
    path.write_bytes(b"not a database, but long enough to be read as a header" * 20)
    with pytest.raises(JournalError, match="damaged"):
        start(path)
    with pytest.raises(JournalError, match="cannot be opened"):
        start(tmp_path / "missing" / "j.sqlite")


def test_damage_that_only_shows_when_it_is_read_is_named(tmp_path):
    path = tmp_path / "j.sqlite"
    journal = start(path)
    for number in range(8):
        journal.append(Joined(cluster="n" * 3000, epoch=number))
    journal.close()
    start(path).close()  # moves all of it into the file
    pages = bytearray(path.read_bytes())
    pages[-2 * 4096 :] = b"\xff" * (2 * 4096)
    path.write_bytes(pages)
    journal = start(path)
    with pytest.raises(JournalError, match="damaged"):
        list(journal.replay())
    journal.close()


def test_a_journal_from_before_there_were_terms_begins_with_the_first(tmp_path):
    path = tmp_path / "j.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT")
        db.execute("CREATE TABLE events (seq INTEGER PRIMARY KEY, kind TEXT NOT NULL, body TEXT NOT NULL) STRICT")
        db.execute("INSERT INTO meta VALUES ('schema', '1'), ('agreement', 'sha256:a')")
        db.execute("""INSERT INTO events VALUES (1, 'Joined', '{"cluster": "north", "epoch": 3}')""")
    db.close()
    journal = start(path)
    assert journal.term == 1
    assert list(journal.replay()) == [EVENT]
    journal.close()


def test_a_full_disk_is_told_as_such_and_leaves_no_half_event(tmp_path):
    path = tmp_path / "j.sqlite"
    journal = start(path)
    journal.append(EVENT)
    journal._db.pragma("max_page_count", journal._db.pragma("page_count"))
    with pytest.raises(apsw.FullError, match="disk is full"):
        journal.append(Joined(cluster="n" * 100_000, epoch=4))
    assert list(journal.replay()) == [EVENT]
    journal.close()
    again = start(path)
    assert list(again.replay()) == [EVENT]
    again.close()


def test_the_kernels_locks_dropped_by_a_careless_reader_do_not_let_two_write(tmp_path):
    path = tmp_path / "j.sqlite"
    first = start(path)
    first.append(EVENT)
    path.open("rb").close()  # POSIX: this process has no lock on the file any more
    second = SqliteJournal(path, agreement="sha256:a", vfs="unix-none")  # stands for one in another process
    with pytest.raises(JournalError, match="term 1, which was ours, is past"):
        first.append(EVENT)
    first.close()
    second.append(EVENT)
    second.close()
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute("SELECT count(*) FROM events").fetchone() == (2,)
    db.close()
