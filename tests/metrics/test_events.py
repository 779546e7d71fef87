from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula.errors import UsageError
from nebula.metrics.events import EventLog, Tail, finite, read


def test_events_come_back_in_order_with_their_time(tmp_path):
    log = EventLog(tmp_path / "deep" / "events.jsonl", clock=lambda: 12.5)
    log.emit("joined", cluster="north", epoch=1)
    log.emit("alarm", kind="digest_mismatch")
    assert list(read(tmp_path / "deep" / "events.jsonl")) == [
        {"t": 12.5, "event": "joined", "cluster": "north", "epoch": 1},
        {"t": 12.5, "event": "alarm", "kind": "digest_mismatch"},
    ]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    log = EventLog(tmp_path / "e")
    log.emit("round", loss=math.nan, clusters={"north": {"loss": math.inf, "steps": (1, 2)}})
    text = (tmp_path / "e").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["clusters"] == {"north": {"loss": None, "steps": [1, 2]}}
    assert finite({"a": [1.5, -math.inf]}) == {"a": [1.5, None]}


def test_a_torn_last_line_is_left_out_and_cut_off_by_the_next_writer(tmp_path):
    path = tmp_path / "e"
    EventLog(path).emit("one")
    with path.open("a") as file:
        file.write('{"t": 1, "event": "tw')
    assert [e["event"] for e in read(path)] == ["one"]
    EventLog(path).emit("three")
    assert [e["event"] for e in read(path)] == ["one", "three"]


@pytest.mark.parametrize("line", ["{", "3", "[]", "{}", '{"event": 3, "t": 1}', '{"event": "x", "t": null}', "\x00"])
def test_any_other_broken_line_is_told(tmp_path, line):
    path = tmp_path / "e"
    path.write_text(f'{{"t": 1, "event": "one"}}\n{line}\n{{"t": 1, "event": "two"}}\n')
    with pytest.raises(UsageError, match=r"e:2\)"):
        list(read(path))


def test_threads_share_a_log(tmp_path):
    log = EventLog(tmp_path / "e")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: log.emit("tick", i=i, pad="x" * 5000), range(100)))
    assert sorted(e["i"] for e in read(tmp_path / "e")) == list(range(100))


@settings(deadline=None, max_examples=50)
@given(cuts=st.lists(st.integers(0, 200), max_size=6), names=st.lists(st.text(max_size=5), max_size=5))
def test_a_tail_sees_every_event_once_wherever_the_writes_are_cut(tmp_path_factory, cuts, names):
    path = tmp_path_factory.mktemp("tail") / "e"
    tail = Tail(path)
    assert tail.poll() == []
    data = b"".join(json.dumps({"t": 1, "event": name}).encode() + b"\n" for name in names)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    seen = []
    for start, end in pairwise(edges):
        with path.open("ab") as file:
            file.write(data[start:end])
        seen += [event["event"] for event in tail.poll()]
    assert seen == names
    assert tail.poll() == []
