"""Events as JSON, and where a journal is opened."""

from __future__ import annotations

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula.errors import JournalError, PreflightError, UsageError
from nebula.federation.events import Arrived, Joined, Reported
from nebula.federation.journal import JOURNALED, decode, encode, open_journal
from nebula.types import RoundReport


@pytest.mark.parametrize("kind", JOURNALED, ids=lambda kind: kind.__name__)
@given(data=st.data())
@settings(deadline=None, max_examples=30)
def test_every_journaled_event_comes_back_as_it_was(kind, data):
    event = data.draw(st.from_type(kind).filter(lambda event: "NaN" not in encode(event)[1]))  # equal to nothing
    name, body = encode(event)
    body.encode("ascii")  # whatever a name holds, any database can store it
    assert "\x00" not in body
    again = decode(name, body)
    assert again == event
    assert encode(again) == (name, body)


def test_what_an_older_nebula_wrote_gets_the_defaults_of_new_fields():
    report = RoundReport(round=1, steps=2, tokens=3, loss=0.5, compute_s=1.0, stall_s=0.0)
    name, body = encode(Reported(cluster="north", report=report))
    fields = json.loads(body)
    del fields["report"]["rtt_s"], fields["report"]["eval"]
    assert decode(name, json.dumps(fields)) == Reported(cluster="north", report=report)


def test_what_a_newer_nebula_wrote_is_not_guessed_at():
    with pytest.raises(JournalError, match=r"unknown kind 'Sharded'.*newer Nebula"):
        decode("Sharded", "{}")
    with pytest.raises(JournalError, match=r"Joined with unknown fields \(colour, shape\).*newer Nebula"):
        decode("Joined", '{"cluster": "north", "epoch": 1, "shape": 0, "colour": 0}')


ARRIVED = Arrived(cluster="north", fragment="f0", round=0, weight=5.0, blob="b", parts=(3, 4), seconds=None)


@pytest.mark.parametrize(
    ("field", "value"),
    [("round", "0"), ("round", True), ("round", None), ("weight", "5"), ("parts", 3), ("parts", ["3"]), ("blob", {})],
)
def test_a_field_of_another_type_is_damage(field, value):
    name, body = encode(ARRIVED)
    with pytest.raises(JournalError, match="damaged"):
        decode(name, json.dumps(json.loads(body) | {field: value}))


@pytest.mark.parametrize("body", ["", "{", "[]", "null", '{"cluster": "north"}', '{"epoch": 3}'])
def test_a_torn_body_is_damage(body):
    with pytest.raises(JournalError, match="damaged"):
        decode("Joined", body)


def test_a_journal_is_a_file_or_in_postgresql(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="a mysql:// URL") as error:
        open_journal("mysql://me:secret@host/db", agreement="sha256:a")
    assert "secret" not in str(error.value)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.delitem(sys.modules, "nebula.federation.journal_postgres", raising=False)
    with pytest.raises(PreflightError, match="needs psycopg") as missing:
        open_journal("postgres://me:secret@host/db", agreement="sha256:a")
    assert "nebula[postgres]" in missing.value.hint
    journal = open_journal(tmp_path / "new" / "journal.sqlite", agreement="sha256:a")
    journal.append(Joined(cluster="north", epoch=1))
    journal.close()
