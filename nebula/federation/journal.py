"""The coordinator's journal: every event that changed its state, in order, on disk before it takes effect.

SQLite in WAL mode with synchronous=FULL, one process, one connection: `append` returns only after fsync. The exclusive
lock makes a second coordinator on the same folder fail at once. The interpreter's SQLite may carry the WAL-reset bug of
versions below 3.51.3, which needs two connections; there is only ever one.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from nebula.errors import JournalError
from nebula.federation.events import Arrived, Committed, Event, Joined, Reported
from nebula.types import Evaluation, RoundReport

SCHEMA = 1


class Journal:
    """`agreement`: digest of what this run agreed to; a journal of another run is refused."""

    def __init__(self, path: Path, *, agreement: str) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0)
        try:
            self._open(agreement)
        except Exception as error:
            self._db.close()
            raise _explained(error, path) from error

    def _open(self, agreement: str) -> None:
        self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("BEGIN EXCLUSIVE")
        self._db.execute("CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS events (seq INTEGER PRIMARY KEY, kind TEXT NOT NULL, body TEXT NOT NULL) STRICT"
        )
        self._db.execute("INSERT OR IGNORE INTO meta VALUES ('schema', ?), ('agreement', ?)", (str(SCHEMA), agreement))
        self._db.execute("COMMIT")
        meta = dict(self._db.execute("SELECT key, value FROM meta").fetchall())
        if meta["schema"] != str(SCHEMA):
            raise JournalError(f"the journal {self._path} has schema {meta['schema']}; this Nebula reads {SCHEMA}")
        if meta["agreement"] != agreement:
            raise JournalError(
                f"the journal {self._path} belongs to agreement {meta['agreement']}, not {agreement}",
                hint="use the run folder it was made in, or a new one",
            )

    def append(self, event: Event) -> None:
        """Durable when this returns. Raises sqlite3.Error (disk full, I/O): the caller must then stop."""
        self._db.execute(
            "INSERT INTO events (kind, body) VALUES (?, ?)", (type(event).__name__, json.dumps(asdict(event)))
        )

    def replay(self) -> Iterator[Event]:
        for kind, body in self._db.execute("SELECT kind, body FROM events ORDER BY seq").fetchall():
            yield _decode(kind, json.loads(body))

    def close(self) -> None:
        self._db.close()


def _explained(error: Exception, path: Path) -> Exception:
    if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
        return JournalError(
            f"the journal {path} is in use by another coordinator", hint="stop that one first; a run has only one"
        )
    if isinstance(error, sqlite3.OperationalError):
        return JournalError(f"the journal {path} cannot be opened: {error}", hint="check the disk and its permissions")
    if isinstance(error, sqlite3.DatabaseError):
        return JournalError(f"the journal {path} is damaged: {error}", hint="restore the run folder from a copy")
    return error


def _decode(kind: str, body: dict[str, object]) -> Event:
    match kind:
        case "Joined":
            return Joined(**body)  # type: ignore[arg-type]
        case "Arrived":
            return Arrived(**{**body, "parts": tuple(body["parts"])})  # type: ignore[arg-type]
        case "Committed":
            return Committed(**{**body, "contributors": tuple(body["contributors"])})  # type: ignore[arg-type]
        case "Reported":
            report: dict[str, object] = body["report"]  # type: ignore[assignment]
            if report["eval"] is not None:
                report["eval"] = Evaluation(**report["eval"])  # type: ignore[arg-type]
            return Reported(cluster=str(body["cluster"]), report=RoundReport(**report))  # type: ignore[arg-type]
    raise JournalError(f"the journal holds an event of unknown kind {kind!r}: it was written by a newer Nebula")


JOURNALED = (Joined, Arrived, Committed, Reported)
"""The rest of the events can happen again after a restart."""
