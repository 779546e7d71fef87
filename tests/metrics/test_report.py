from __future__ import annotations

import base64
import json
import math
import re

import pytest
from runs import PARAMS, make_run, round_closed, started

from nebula.errors import UsageError
from nebula.metrics.events import read
from nebula.metrics.history import History, Share
from nebula.metrics.report import render


def history_of(*events):
    history = History()
    for t, kind, fields in events:
        history.fold({"t": t, "event": kind, **fields})
    return history


# --- history ------------------------------------------------------------------------------------------------------


def test_counters_become_bytes_per_round_also_across_a_restart_of_the_agent():
    restarted = round_closed(0, 4.0) | {"round": 2, "tokens": 900}
    history = history_of(
        (0, "run_started", started()),
        (1, "round", round_closed(0, 5.0)),
        (2, "round", round_closed(1, 4.5)),
        (3, "round", restarted),
    )
    assert [r.clusters["north"].up_bytes for r in history.rounds.values()] == [600_000] * 3
    assert history.totals["south"] == Share(300, 1.5, 1.5, 1_500_000, 750_000)
    assert history.wan_bytes == 3 * 1_650_000
    assert history.data_parallel_bytes == 2 * PARAMS * 2 * 20 * 2 * 3
    assert history.tokens == 900
    assert history.stall_share == pytest.approx(2.1 / 6.0)


def test_time_stands_still_between_a_stop_and_its_resumption():
    history = history_of(
        (0, "run_started", started()),
        (10, "run_ended", {"state": "stopped"}),
        (5000, "run_started", started()),
        (5003, "joined", {"cluster": "north"}),
    )
    assert history.seconds == 13
    assert history.state == "unfinished"


def test_an_evaluation_lies_where_the_round_before_it_ended():
    evaluated = {"round": 1, "loss": 4.8, "tokens_trained": 300, "eval_tokens": 9}
    history = history_of(
        (0, "run_started", started()),
        (5, "round", round_closed(0, 5.0)),
        (9, "eval", evaluated),
        (9, "round", round_closed(1, 4.5)),
    )
    point = history.evals[1]
    assert (point.seconds, point.tokens, point.wan_bytes, point.loss) == (5, 300, 1_650_000, 4.8)


def test_compression_counts_deltas_against_fp32(tmp_path):
    history = History()
    for event in read(make_run(tmp_path, 2) / "events.jsonl"):
        history.fold(event)
    assert history.compression("north") == 8
    assert history.compression("nobody") is None


# --- report -------------------------------------------------------------------------------------------------------


def page_of(folder):
    path = render(folder)
    assert path == folder / "report.html"
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []
    return path.read_text()


def test_the_page_needs_nothing_but_itself(tmp_path):
    page = page_of(make_run(tmp_path, 6))
    assert "http" not in page
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    images = [base64.b64decode(data) for data in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)]
    assert len(images) == 3
    assert all(b"<svg" in image for image in images)


def test_the_page_says_what_happened(tmp_path):
    page = page_of(make_run(tmp_path, 6))
    for told in ("4.500", "from 5.500", "unigram entropy 5.100", "6 of 6", "1.80 k", "9.90 MB", "97.0×", "completed"):
        assert told in page, told
    assert page.count("<tr>") == 7
    assert "sha256:" + "0" * 63 + "5" in page
    assert "&#34;inner_steps&#34;: 20" in page


def test_the_same_run_gives_the_same_page(tmp_path):
    folder = make_run(tmp_path, 2)
    assert page_of(folder) == page_of(folder)


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_a_run_that_has_not_ended_has_a_page(tmp_path, rounds):
    page = page_of(make_run(tmp_path, rounds, state=None))
    assert "unfinished" in page
    assert page.count("<tr>") == (rounds + 1 if rounds else 0)
    assert ("No round has been committed" in page) == (rounds == 0)


def test_a_run_that_never_started_or_diverged_has_a_page(tmp_path):
    folder = make_run(tmp_path, 2, state="failed", loss=lambda r: math.nan)
    assert "<td>–</td>" in page_of(folder)
    (folder / "events.jsonl").unlink()
    assert "No round has been committed" in page_of(folder)


def test_text_from_outside_is_escaped(tmp_path):
    folder = make_run(tmp_path, 1)
    (folder / "summary.json").write_text(json.dumps({"state": "<script>alert(1)</script>"}))
    assert "<script>" not in page_of(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", "{"),
        ("run.json", "[]"),
        ("run.json", "{}"),
        ("run.json", '{"agreement": {}}'),
        ("summary.json", "3"),
        ("summary.json", "{"),
        ("events.jsonl", "\n"),
        ("events.jsonl", '{"t": 1, "event": "round"}\n'),
        ("events.jsonl", '{"t": 1, "event": "round", "round": 0, "clusters": {"north": {}}}\n'),
    ],
)
def test_a_damaged_folder_is_told(tmp_path, name, content):
    folder = make_run(tmp_path, 1)
    (folder / name).write_text(content)
    with pytest.raises(UsageError) as caught:
        render(folder)
    assert caught.value.hint


def test_a_folder_of_something_else_is_told(tmp_path):
    with pytest.raises(UsageError, match=r"it has no run\.json"):
        render(tmp_path)
