"""The journal in a PostgreSQL database, so that a coordinator can be replaced without sharing a disk with it.

A session advisory lock makes the leader. It ends with the leader's connection, and then the next coordinator gets it;
until then a second one is refused at once. The lock only keeps order: safety comes from the term, which every append
checks and holds in the statement that writes, so that a leader whose lock is gone without its knowledge writes nothing.
Many runs can share a database: rows belong to an agreement.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, LiteralString, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict

from nebula.errors import JournalError, UnreachableError, UsageError
from nebula.federation.events import Event
from nebula.federation.journal import decode, encode, foreign, in_use, taken_over

T = TypeVar("T")

SCHEMA = 1

# Both ends find a dead peer after 5 + 3·5 seconds of silence, so the lock of a coordinator that vanished ends no later.
# Servers that only follow another one are passed over. What the URL says comes first.
CONNECTION: dict[str, Any] = {
    "host": "localhost",
    "port": 5432,
    "dbname": "nebula",
    "application_name": "nebula coordinator",
    "connect_timeout": 10,
    "keepalives_idle": 5,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
    "target_session_attrs": "read-write",
}
SESSION: tuple[LiteralString, ...] = (
    "SET synchronous_commit = on",
    "SET default_transaction_isolation = 'read committed'",
    "SET tcp_keepalives_idle = 5",
    "SET tcp_keepalives_interval = 5",
    "SET tcp_keepalives_count = 3",
    "SET tcp_user_timeout = 20000",
)
TABLES: tuple[LiteralString, ...] = (
    """CREATE TABLE IF NOT EXISTS nebula_journals (
           agreement text PRIMARY KEY, schema integer NOT NULL, term bigint NOT NULL)""",
    """CREATE TABLE IF NOT EXISTS nebula_events (
           agreement text NOT NULL REFERENCES nebula_journals, seq bigint GENERATED ALWAYS AS IDENTITY,
           term bigint NOT NULL, kind text NOT NULL, body text NOT NULL, PRIMARY KEY (agreement, seq))""",
)
TAKE_TERM: LiteralString = """
    INSERT INTO nebula_journals AS ours (agreement, schema, term) VALUES (%(agreement)s, %(schema)s, 1)
    ON CONFLICT (agreement) DO UPDATE SET term = ours.term + 1 RETURNING schema, term"""
# FOR SHARE: taking the next term waits for appends under way, and those that come later find it taken.
APPEND: LiteralString = """
    WITH ours AS (
        SELECT agreement, term FROM nebula_journals
        WHERE agreement = %(agreement)s AND term = %(term)s FOR SHARE)
    INSERT INTO nebula_events (agreement, term, kind, body)
    SELECT agreement, term, %(kind)s, %(body)s FROM ours"""


class PostgresJournal:
    """`url`: as libpq takes it; what is secret in it appears in no message. `agreement`: digest of what this run agreed
    to. Never reconnects: a coordinator that lost its connection may have lost its place."""

    def __init__(self, url: str, *, agreement: str) -> None:
        self._agreement = agreement
        parts = _parsed(url)
        self._where = "postgresql://{host}:{port}/{dbname}".format_map(parts)  # neither user nor password
        try:
            self._db = psycopg.connect(autocommit=True, **parts)
        except psycopg.Error as error:
            raise UnreachableError(
                f"the journal {self._where} cannot be reached: {str(error).strip()}",
                hint="check the URL, its password, and that the server runs",
            ) from None  # libpq's own error may be shown with the arguments of this call
        try:
            self._term = self._guard(self._open)
        except BaseException:
            self._db.close()
            raise

    def _open(self) -> int:
        for setting in SESSION:
            self._db.execute(setting)
        row = self._db.execute("SELECT pg_try_advisory_lock(%s)", [lock_key(self._agreement)]).fetchone()
        if row != (True,):
            raise in_use(self._where)
        with self._db.transaction():
            self._make_tables()
            row = self._db.execute(TAKE_TERM, {"agreement": self._agreement, "schema": SCHEMA}).fetchone()
            assert row is not None
            schema, term = row
            if schema != SCHEMA:
                raise foreign(self._where, schema)
        return int(term)

    def _make_tables(self) -> None:
        """Not asked for where they exist, so that the coordinator's role need not be allowed to."""
        if self._db.execute("SELECT to_regclass('nebula_events')").fetchone() == (None,):
            self._db.execute("SELECT pg_advisory_xact_lock(%s)", [lock_key("tables")])  # two at once would collide
            for table in TABLES:
                self._db.execute(table)

    @property
    def term(self) -> int:
        return self._term

    def append(self, event: Event) -> None:
        kind, body = encode(event)
        row = {"agreement": self._agreement, "term": self._term, "kind": kind, "body": body}
        if self._guard(lambda: self._db.execute(APPEND, row).rowcount) != 1:
            raise taken_over(self._where, self._term)

    def replay(self) -> Iterator[Event]:
        for kind, body in self._guard(self._rows):
            yield decode(kind, body)

    def _rows(self) -> list[tuple[Any, ...]]:
        return self._db.execute(
            "SELECT kind, body FROM nebula_events WHERE agreement = %s ORDER BY seq", [self._agreement]
        ).fetchall()

    def close(self) -> None:
        self._db.close()

    def _guard(self, act: Callable[[], T]) -> T:
        try:
            return act()
        except psycopg.Error as error:
            reason = str(error).strip()
            if not self._db.closed:
                raise JournalError(f"the journal {self._where} cannot be used: {reason}") from error
            raise JournalError(
                f"the connection to the journal {self._where} was lost: {reason}",
                hint="nothing was acknowledged that is not in it; the next coordinator goes on from there",
            ) from error


def lock_key(agreement: str) -> int:
    """The number that stands for a run among PostgreSQL's advisory locks."""
    return int.from_bytes(hashlib.sha256(f"nebula journal {agreement}".encode()).digest()[:8], "big", signed=True)


def _parsed(url: str) -> dict[str, Any]:
    """What libpq is to be called with. Raises UsageError, quoting nothing: what is taken for a host, port or database
    may be part of a password whose special characters were not escaped."""
    try:
        parts = CONNECTION | conninfo_to_dict(url)
    except psycopg.Error:
        parts = {}
    places = f"{parts.get('host')}{parts.get('dbname')}"
    if "@" in places or not str(parts.get("port")).replace(",", "").isdigit():
        raise UsageError(
            "the journal's postgresql:// URL is malformed",
            hint="write postgresql://USER:PASSWORD@HOST:PORT/DATABASE, special characters in it as %XX",
        )
    return parts
