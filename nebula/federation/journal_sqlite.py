"""The journal as a SQLite file: WAL, synchronous=FULL, one process, one connection.

The exclusive lock makes a second coordinator on the same file fail at once. Two that come in the same instant may
refuse each other: whatever started them starts them again.

A lock can lie: network file systems may grant it twice, and POSIX drops it when anything else in the process closes the
file. An exclusive connection never looks at the file again, so no SQL would notice a second coordinator. Hence the term
is kept where a read past SQLite's caches finds it: in the database header's user_version, written through to the file
when the journal is opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import apsw

from nebula.errors import JournalError
from nebula.federation.events import Event
from nebula.federation.journal import decode, encode, foreign, in_use, taken_over

SCHEMA = 1
USER_VERSION = (60, 4)
"""Offset and size in the file, big-endian (sqlite.org/fileformat.html, §1.3)."""


class SqliteJournal:
    """`agreement`: digest of what this run agreed to; a journal of another run is refused. `vfs`: the apsw VFS that the
    file is on; its folder must exist."""

    def __init__(self, path: Path | str, *, agreement: str, vfs: str | None = None) -> None:
        self._path = path
        try:
            self._db = apsw.Connection(str(path), vfs=vfs)
        except apsw.Error as error:
            raise _explained(error, path) from error
        try:
            self._term = self._open(agreement)
        except Exception as error:
            self._db.close()
            raise _explained(error, path) from error

    def _open(self, agreement: str) -> int:
        db = self._db
        db.execute("PRAGMA locking_mode=EXCLUSIVE")
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        # Closing must not write: a coordinator that was replaced, and does not know it yet, would damage the file.
        db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        db.execute("BEGIN EXCLUSIVE")
        db.execute("CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT")
        db.execute(
            "CREATE TABLE IF NOT EXISTS events (seq INTEGER PRIMARY KEY, kind TEXT NOT NULL, body TEXT NOT NULL) STRICT"
        )
        db.execute("INSERT OR IGNORE INTO meta VALUES ('schema', ?), ('agreement', ?)", (str(SCHEMA), agreement))
        meta = dict(db.execute("SELECT key, value FROM meta"))
        if meta["schema"] != str(SCHEMA):
            raise foreign(str(self._path), meta["schema"])
        if meta["agreement"] != agreement:
            raise JournalError(
                f"the journal {self._path} belongs to agreement {meta['agreement']}, not {agreement}",
                hint="use the run folder it was made in, or a new one",
            )
        term = int(db.pragma("user_version")) + 1  # 0 in a new file, and in those from before there were terms
        db.pragma("user_version", term)
        db.execute("COMMIT")
        db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        return term

    @property
    def term(self) -> int:
        return self._term

    def append(self, event: Event) -> None:
        """Raises apsw.Error as well (disk full, I/O)."""
        self._check_term()  # before: nothing is written over what a later coordinator wrote
        self._db.execute("INSERT INTO events (kind, body) VALUES (?, ?)", encode(event))
        self._check_term()  # after: nothing is acknowledged that a later coordinator may not have read

    def _check_term(self) -> None:
        _, stored = self._db.read("main", 0, *USER_VERSION)
        if int.from_bytes(stored, "big") != self._term:
            raise taken_over(str(self._path), self._term)

    def replay(self) -> Iterator[Event]:
        try:
            rows = self._db.execute("SELECT kind, body FROM events ORDER BY seq").fetchall()
        except apsw.Error as error:
            raise _explained(error, self._path) from error
        for kind, body in rows:
            yield decode(str(kind), str(body))

    def close(self) -> None:
        self._db.close()


def _explained(error: Exception, path: Path | str) -> Exception:
    match error:
        case apsw.BusyError() | apsw.LockedError():
            return in_use(str(path))
        case apsw.CorruptError() | apsw.NotADBError():
            return JournalError(f"the journal {path} is damaged: {error}", hint="restore the run folder from a copy")
        case apsw.Error():
            return JournalError(
                f"the journal {path} cannot be opened: {error}", hint="check the disk and its permissions"
            )
    return error
