"""A journal read as it lies there: without taking a term, and without changing a byte of it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import apsw

from nebula.errors import JournalError, PreflightError, UsageError
from nebula.federation.events import Event
from nebula.federation.journal import decode, foreign
from nebula.federation.journal_sqlite import SCHEMA


def read_events(where: str | Path, *, agreement: str) -> list[Event]:
    """Every event, oldest first. `where` and `agreement`: as `open_journal` takes them.

    Raises UsageError if there is no journal, PreflightError if a coordinator holds it, JournalError if it belongs to
    another run or cannot be trusted."""
    if "://" in str(where):
        return _in_database(str(where), agreement)
    path = Path(where)
    if not path.exists():
        raise missing(str(path))
    try:
        with tempfile.TemporaryDirectory() as folder:
            meta, rows = _tables(_copied(path, Path(folder)))
    except apsw.BusyError:
        raise held(str(path)) from None
    except apsw.Error as error:
        raise JournalError(f"the journal {path} is damaged: {error}", hint="restore it from a copy") from error
    if meta.get("schema") != str(SCHEMA):
        raise foreign(str(path), meta.get("schema", 0))
    if meta.get("agreement") != agreement:
        raise JournalError(f"the journal {path} belongs to agreement {meta.get('agreement')}, not {agreement}")
    return [decode(str(kind), str(body)) for kind, body in rows]


def missing(where: str) -> UsageError:
    return UsageError(
        f"there is no journal in {where}: no coordinator of this run kept one there",
        hint="if it is elsewhere, say so as `nebula coordinator` was told: --journal postgresql://…",
    )


def held(where: str) -> PreflightError:
    return PreflightError(
        f"the coordinator of this run still runs: it holds the journal {where}",
        hint="let it end, or stop it with Ctrl-C; then ask again",
    )


def _in_database(url: str, agreement: str) -> list[Event]:
    try:
        from nebula.federation import reading_postgres
    except ImportError as error:
        raise PreflightError(
            f"a journal in PostgreSQL needs psycopg, which does not load here: {error}",
            hint="pip install 'nebula[postgres]'",
        ) from error
    return reading_postgres.read_events(url, agreement=agreement)


def _copied(path: Path, folder: Path) -> Path:
    """SQLite writes even where it only reads: whoever opens a journal next moves into the file what the last
    coordinator left in the log beside it. The lock is SQLite's own, so that no coordinator comes in between."""
    copy = folder / "journal.sqlite"
    file = apsw.VFSFile("", str(path), [apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_MAIN_DB, 0])
    try:
        file.xLock(apsw.SQLITE_LOCK_SHARED)
        copy.write_bytes(file.xRead(file.xFileSize(), 0))
        log = path.with_name(f"{path.name}-wal")
        if log.exists():
            shutil.copyfile(log, copy.with_name(f"{copy.name}-wal"))
    finally:
        file.xUnlock(apsw.SQLITE_LOCK_NONE)
        file.xClose()
    return copy


def _tables(path: Path) -> tuple[dict[Any, Any], list[tuple[Any, ...]]]:
    """meta, and (kind, body) of every event."""
    db = apsw.Connection(str(path))
    try:
        meta = dict(db.execute("SELECT key, value FROM meta"))
        return meta, db.execute("SELECT kind, body FROM events ORDER BY seq").fetchall()
    finally:
        db.close()
