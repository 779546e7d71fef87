"""A journal in PostgreSQL, read without taking its lock or a term."""

from __future__ import annotations

from contextlib import closing
from typing import LiteralString

from nebula.federation.events import Event
from nebula.federation.journal import foreign
from nebula.federation.journal_postgres import SCHEMA, PostgresJournal, lock_key
from nebula.federation.reading import held, missing

HELD: LiteralString = """
    SELECT count(*) FROM pg_locks JOIN pg_database ON pg_database.oid = pg_locks.database
    WHERE locktype = 'advisory' AND objsubid = 1 AND datname = current_database()
    AND (classid::bigint << 32 | objid::bigint) = %s"""


def read_events(url: str, *, agreement: str) -> list[Event]:
    """As `reading.read_events`."""
    with closing(_Look(url, agreement=agreement)) as journal:
        return list(journal.replay())


class _Look(PostgresJournal):
    """Can read and nothing else."""

    def _open(self) -> int:
        self._db.execute("SET default_transaction_read_only = on")
        if self._db.execute("SELECT to_regclass('nebula_events')").fetchone() == (None,):
            raise missing(self._where)
        if self._db.execute(HELD, [lock_key(self._agreement)]).fetchone() != (0,):
            raise held(self._where)
        of_run = "SELECT schema, term FROM nebula_journals WHERE agreement = %s"
        row = self._db.execute(of_run, [self._agreement]).fetchone()
        if row is None:
            raise missing(self._where)
        schema, term = row
        if schema != SCHEMA:
            raise foreign(self._where, schema)
        return int(term)
