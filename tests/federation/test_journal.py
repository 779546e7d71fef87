"""Every journal keeps these promises: one suite over all of them."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path

import psycopg
import pytest

from nebula.errors import JournalError
from nebula.federation.events import Arrived, Committed, Joined, Reported
from nebula.federation.journal import Journal, open_journal
from nebula.federation.journal_postgres import PostgresJournal, lock_key
from nebula.federation.journal_sqlite import SqliteJournal
from nebula.types import Evaluation, RoundReport

EVENTS = [
    Committed(fragment="f0", version=0, digest="d", blobs={"params": "x"}),
    Joined(cluster="north", epoch=3),
    Arrived(cluster="north", fragment="f0", round=0, weight=5.0, blob="b", parts=(3, 4), seconds=None),
    Committed(fragment="f0", version=1, digest="e", contributors=("north",), blobs={"update": "u"}, norm=1.5),
    Reported(
        cluster="north",
        report=RoundReport(
            round=0, steps=1, tokens=2, loss=3.0, compute_s=4.0, stall_s=5.0, eval=Evaluation(loss_sum=1.0, tokens=2)
        ),
    ),
]
ONE, OTHER = EVENTS[1], EVENTS[2]


class InFile:
    """A place for a journal: in a file."""

    agreement = "sha256:a"

    def __init__(self, folder: Path) -> None:
        self.where = str(folder / "journal.sqlite")

    def open_where_locks_lie(self) -> Journal:
        return SqliteJournal(self.where, agreement=self.agreement, vfs="unix-none")

    def await_lock(self) -> None:
        """The kernel gave it up when it ended the process."""


class InDatabase:
    """A place for a journal: in a database that other tests use as well."""

    numbers = count()

    def __init__(self, url: str) -> None:
        self.where = url
        self.agreement = f"sha256:{next(self.numbers)}"

    def open_where_locks_lie(self) -> Journal:
        journal = PostgresJournal(self.where, agreement=self.agreement)
        journal._db.execute("SELECT pg_advisory_unlock_all()")
        return journal

    def await_lock(self) -> None:
        """The server takes a moment to see that a process is gone."""
        with psycopg.connect(self.where, autocommit=True) as db:
            db.execute("SELECT pg_advisory_lock(%s)", [lock_key(self.agreement)])
            db.execute("SELECT pg_advisory_unlock_all()")


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.machine("postgres"))])
def place(request, tmp_path) -> InFile | InDatabase:
    if request.param == "sqlite":
        return InFile(tmp_path)
    return InDatabase(request.getfixturevalue("postgres").url())


def opened(place) -> closing[Journal]:
    return closing(open_journal(place.where, agreement=place.agreement))


def kept(place) -> list[object]:
    with opened(place) as journal:
        return list(journal.replay())


def test_it_gives_back_what_it_was_given(place):
    with opened(place) as journal:
        assert list(journal.replay()) == []
        for event in EVENTS:
            journal.append(event)
        assert list(journal.replay()) == EVENTS
    assert kept(place) == EVENTS


def test_every_opening_takes_the_next_term(place):
    terms = []
    for _ in range(3):
        with opened(place) as journal:
            terms.append(journal.term)
    assert terms == [1, 2, 3]


def test_a_second_coordinator_is_refused_while_the_first_lives(place):
    with opened(place) as first:
        with pytest.raises(JournalError, match="in use by another coordinator"):
            open_journal(place.where, agreement=place.agreement)
        first.append(ONE)  # being asked took nothing from it
    with opened(place) as second:
        assert second.term == 2
        assert list(second.replay()) == [ONE]


def test_where_locks_lie_the_first_coordinator_is_refused_and_leaves_no_trace(place):
    first = place.open_where_locks_lie()
    first.append(ONE)
    second = place.open_where_locks_lie()
    assert list(second.replay()) == [ONE]
    for _ in range(5):
        second.append(OTHER)
    for _ in range(2):
        with pytest.raises(JournalError, match="a later coordinator took over"):
            first.append(ONE)
    first.close()
    third = place.open_where_locks_lie()  # as if the second had crashed
    assert list(third.replay()) == [ONE] + [OTHER] * 5
    with pytest.raises(JournalError, match="a later coordinator took over"):
        second.append(OTHER)
    for journal in (second, third):
        journal.close()


COORDINATOR = """
import sys
from nebula.errors import JournalError
from nebula.federation.events import Joined
from nebula.federation.journal import open_journal

print("ready", flush=True)
while sys.stdin.readline():
    try:
        journal = open_journal(sys.argv[1], agreement=sys.argv[2])
        journal.append(Joined(cluster=sys.argv[3], epoch=journal.term))
        print("term", journal.term, flush=True)
    except JournalError as error:
        print(error, flush=True)
"""


class Process:
    """A coordinator's journal in a process of its own. It opens the journal when it is told to, and holds it."""

    def __init__(self, place, name: str) -> None:
        command = [sys.executable, "-c", COORDINATOR, place.where, place.agreement, name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def hear(self) -> str:
        return self.process.stdout.readline().strip()

    def tell(self) -> None:
        self.process.stdin.write("open\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextmanager
def processes(place, *names: str) -> Iterator[list[Process]]:
    started = [Process(place, name) for name in names]
    try:
        assert [process.hear() for process in started] == ["ready"] * len(started)
        yield started
    finally:
        for process in started:
            process.kill()


def test_a_killed_coordinator_is_followed_by_another_with_all_it_acknowledged(place):
    with processes(place, "first") as (first,):
        first.tell()
        assert first.hear() == "term 1"
        with pytest.raises(JournalError, match="in use by another coordinator"):
            open_journal(place.where, agreement=place.agreement)
        first.kill()
        place.await_lock()
        with opened(place) as second:
            assert second.term == 2
            assert list(second.replay()) == [Joined(cluster="first", epoch=1)]


def race(racing: list[Process], term: int) -> Process:
    """The winner. There may be none when all come in the same instant; never are there two."""
    while True:
        for process in racing:
            process.tell()
        answers = [process.hear() for process in racing]
        refused = sum("in use by another coordinator" in answer for answer in answers)
        if refused < len(racing):
            assert refused == len(racing) - 1
            return racing[answers.index(f"term {term}")]


def test_of_coordinators_that_race_one_wins_and_the_next_only_after_its_death(place):
    names = ("first", "second", "third")
    with processes(place, *names) as racing:
        for term in (1, 2, 3):
            winner = race(racing, term)
            for process in racing:
                if process is not winner:
                    process.tell()
                    assert "in use by another coordinator" in process.hear()
            winner.kill()
            racing.remove(winner)
            place.await_lock()
    winners = {event.cluster: event.epoch for event in kept(place)}
    assert sorted(winners) == sorted(names)
    assert sorted(winners.values()) == [1, 2, 3]
