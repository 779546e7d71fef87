"""The journal in PostgreSQL: what it does beyond every journal's promises. Against a real server."""

from __future__ import annotations

import traceback
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from urllib.parse import quote

import psycopg
import pytest
from postgres import PASSWORD, running

from nebula.errors import JournalError, UnreachableError, UsageError
from nebula.federation.events import Joined
from nebula.federation.journal_postgres import APPEND, PostgresJournal, lock_key

pytestmark = pytest.mark.machine("postgres")

EVENT = Joined(cluster="north", epoch=3)
WRONG = "wrong/horse"


@pytest.fixture
def admin(postgres):
    with psycopg.connect(postgres.url(), autocommit=True) as db:
        yield db


@pytest.fixture
def database(postgres, admin, request) -> str:
    """URL of a database of the test's own."""
    admin.execute(psycopg.sql.SQL("CREATE DATABASE {}").format(psycopg.sql.Identifier(request.node.name)))
    return postgres.url(request.node.name)


def shown(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)) + str(getattr(error, "hint", ""))


def test_it_syncs_before_it_acknowledges(database):
    with psycopg.connect(database, autocommit=True) as db:
        db.execute("ALTER DATABASE test_it_syncs_before_it_acknowledges SET synchronous_commit = off")
    journal = PostgresJournal(database, agreement="sha256:a")
    assert journal._db.execute("SHOW synchronous_commit").fetchone() == ("on",)
    assert journal._db.execute("SHOW tcp_user_timeout").fetchone() == ("20000",)
    journal.close()


def test_runs_that_begin_at_once_share_an_empty_database(database):
    together = Barrier(4)

    def run(number: int) -> PostgresJournal:
        together.wait()
        journal = PostgresJournal(database, agreement=f"sha256:{number}")
        journal.append(Joined(cluster="north", epoch=number))
        return journal

    with ThreadPoolExecutor(4) as pool:
        journals = list(pool.map(run, range(4)))
    for number, journal in enumerate(journals):
        assert journal.term == 1
        assert list(journal.replay()) == [Joined(cluster="north", epoch=number)]
        journal.close()


def test_a_lost_connection_ends_the_coordinator_and_lets_the_next_one_in(database, admin):
    first = PostgresJournal(database, agreement="sha256:lost")
    first.append(EVENT)
    admin.execute("SELECT pg_terminate_backend(%s, 10000)", [first._db.info.backend_pid])
    second = PostgresJournal(database, agreement="sha256:lost")
    assert second.term == 2
    for _ in range(2):  # it does not reconnect behind our back
        with pytest.raises(JournalError, match=r"connection to the journal \S+ was lost"):
            first.append(EVENT)
    with pytest.raises(JournalError, match="was lost"):
        list(first.replay())
    assert list(second.replay()) == [EVENT]
    second.close()


def test_the_next_term_waits_for_an_append_under_way(database):
    """Else the next coordinator could miss an event that is acknowledged a moment later."""
    first = PostgresJournal(database, agreement="sha256:w")
    first.append(EVENT)
    row = {"agreement": "sha256:w", "term": 1, "kind": "Joined", "body": '{"cluster": "south", "epoch": 1}'}
    with psycopg.connect(database) as slow, ThreadPoolExecutor(1) as pool:
        assert slow.execute(APPEND, row).rowcount == 1
        first._db.execute("SELECT pg_advisory_unlock_all()")
        later = pool.submit(PostgresJournal, database, agreement="sha256:w")
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        while first._db.execute(waiting).fetchone() == (0,):
            assert not later.done()
        slow.commit()
        second = later.result()
    assert list(second.replay()) == [EVENT, Joined(cluster="south", epoch=1)]
    with pytest.raises(JournalError, match="a later coordinator took over"):
        first.append(EVENT)
    for journal in (first, second):
        journal.close()


def test_a_server_that_is_gone_or_closed_to_us_is_told_without_the_password():
    with running() as server:
        journal = PostgresJournal(server.url(), agreement="sha256:a")
        with pytest.raises(UnreachableError, match="password authentication failed") as refused:
            PostgresJournal(server.url(password=WRONG), agreement="sha256:b")
        server.stop()
        with pytest.raises(JournalError, match="was lost") as lost:
            journal.append(EVENT)
        with pytest.raises(UnreachableError, match="refused") as gone:
            PostgresJournal(server.url(), agreement="sha256:a")
        server.start()
        with pytest.raises(JournalError, match="was lost"):
            journal.append(EVENT)  # the server is back; our place is not
        again = PostgresJournal(server.url(), agreement="sha256:a")
        assert (again.term, list(again.replay())) == (2, [])
        again.close()
    for error in (refused, lost, gone):
        assert f"127.0.0.1:{server.port}/postgres" in str(error.value)
        for secret in (PASSWORD, quote(PASSWORD, safe=""), WRONG, quote(WRONG, safe=""), "me:"):
            assert secret not in shown(error.value)


@pytest.mark.parametrize("password", ["se/cret", "1/cret", "se@cret", "%XXcret"])
def test_a_malformed_url_is_not_quoted(password):
    url = f"postgresql://me:{password}@host/db"
    with pytest.raises(UsageError, match="malformed") as error:
        PostgresJournal(url, agreement="sha256:a")
    assert "cret" not in shown(error.value)


def test_a_role_that_may_only_read_and_write_is_enough(database, postgres):
    PostgresJournal(database, agreement="sha256:a").close()
    with psycopg.connect(database, autocommit=True) as db:
        db.execute("CREATE ROLE plain LOGIN PASSWORD 'plain'")
        db.execute("GRANT SELECT, INSERT, UPDATE ON nebula_journals TO plain")
        db.execute("GRANT SELECT, INSERT ON nebula_events TO plain")
        db.execute("SELECT pg_advisory_lock(%s)", [lock_key("sha256:a")])
        db.execute("SELECT pg_advisory_unlock_all()")
    journal = PostgresJournal(database.replace("me:" + quote(PASSWORD, safe=""), "plain:plain"), agreement="sha256:a")
    journal.append(EVENT)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        journal._db.execute("DELETE FROM nebula_events")
    assert list(journal.replay()) == [EVENT]
    journal.close()


def test_another_schema_is_refused_and_its_term_left_alone(database):
    PostgresJournal(database, agreement="sha256:a").close()
    with psycopg.connect(database, autocommit=True) as db:
        db.execute("SELECT pg_advisory_lock(%s)", [lock_key("sha256:a")])
        db.execute("SELECT pg_advisory_unlock_all()")
        db.execute("UPDATE nebula_journals SET schema = 9")
        with pytest.raises(JournalError, match="has schema 9"):
            PostgresJournal(database, agreement="sha256:a")
        assert db.execute("SELECT term FROM nebula_journals").fetchone() == (1,)
