from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from runs import make_run, round_closed, started

from nebula.cli.display import Display, View, closing, render_line, render_table
from nebula.metrics.events import read
from nebula.types import COORDINATOR


def event(kind, /, t=1000.0, **fields):
    return {"t": t, "event": kind, **fields}


@pytest.fixture
def view(tmp_path):
    """Three of six rounds done; north trains, south has lost a rank."""
    view = View(6)
    for e in read(make_run(tmp_path, 3, state=None) / "events.jsonl"):
        view.fold(COORDINATOR, e)
    view.fold("north", event("phase", phase="training", round=3))
    step = event("step", round=3, step=7, steps=20, tokens=99, loss=4.25, tokens_per_s=1234.5)
    view.fold("north", step)
    view.fold("south", event("rank_failure", rank=0, message="gone"))
    return view


def text_of(renderable, width):
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(renderable)
    return console.export_text()


# --- lines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "told", "line"),
    [
        (COORDINATOR, event("run_started", **started()), "toy: 1.00 M parameters, 6 rounds of 20 steps, north, south"),
        (COORDINATOR, event("joined", cluster="north", epoch=1), "north joined"),
        (COORDINATOR, event("joined", cluster="north", epoch=2), "north joined again (session 2)"),
        (COORDINATOR, event("left", cluster="north"), "north left; the run goes on without it"),
        (COORDINATOR, event("rejected", cluster="south", reason="replay"), "south: message rejected: replay"),
        (COORDINATOR, event("stopping", reason="asked to"), "stopping after this round: asked to"),
        (COORDINATOR, event("run_ended", state="stopped"), "run stopped"),
        (COORDINATOR, event("alarm", kind="digests", cluster="a"), "ALARM coordinator: digests: cluster a"),
        ("north", event("rank_failure", rank=1, message="a\n\x1b[31m b"), "north: rank 1 failed, rebuilding: a [31m b"),
        (COORDINATOR, event("delta", cluster="north", round=0, fragment="0", bytes=1, seconds=1), None),
        ("north", event("step", round=0, step=1, steps=2, tokens=1, loss=None, tokens_per_s=1), None),
        ("north", event("phase", phase="joining"), None),
    ],
)  # fmt: skip
def test_lines(source, told, line):
    view = View(6)
    view.fold(source, told)
    assert render_line(view, source, told) == line


def test_a_round_line_has_the_figures_of_that_round(tmp_path):
    view = View(6)
    lines = []
    for e in read(make_run(tmp_path, 6, state=None) / "events.jsonl"):
        view.fold(COORDINATOR, e)
        lines.append(render_line(view, COORDINATOR, e))
    assert "round 2/6  loss 4.750  600 tokens  up 1.10 MB  down 550 kB  stalled 35 %  4.0 s left" in lines
    assert "round 6/6  loss 3.750  1.80 k tokens  up 1.10 MB  down 550 kB  stalled 35 %" in lines
    assert "held-out loss 5.000 after 2 rounds (unigram 5.100)" in lines


# --- table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_shows_every_figure_also_on_a_narrow_terminal(view, width):
    header, titles, north, south = text_of(render_table(view, now=1005.0), width).splitlines()
    assert header.split("  ") == ["round 4/6", "held-out loss 5.000 (unigram 5.100)", "5.0 s, 3.0 s left"]
    assert titles.split() == ["cluster", "phase", "step", "tok/s", "loss", "up", "down", "vs", "fp32", "stall"]
    for told in ("north", "training", "7/20", "━", "1.23 k", "4.250", "1.80 MB", "900 kB", "8.0×", "20 %"):
        assert told in north, told
    assert "rebuilding" in south


def test_the_table_stands_before_anything_is_known():
    assert "round 1/6" in text_of(render_table(View(6), now=0.0), 80)


def test_a_cluster_that_left_is_gone_and_training_starts_at_step_0(view):
    view.fold(COORDINATOR, event("left", cluster="south"))
    view.fold("north", event("phase", phase="training", round=4))
    table = text_of(render_table(view, now=1003.0), 80)
    assert "gone" in table
    assert "0/20" in table


# --- closing ------------------------------------------------------------------------------------------------------


def test_closing_sums_up_and_names_what_comes_next(view):
    text = closing(view, {"state": "completed"}, run_dir=Path("runs/toy"), sample="def f():\n    pass\n")
    assert text.splitlines() == [
        "Run completed   3 of 6 rounds, 900 tokens in 3.0 s",
        "Held-out loss   5.500 → 5.000 (unigram entropy 5.100)",
        "Over the WAN    4.95 MB, 97.0× less than per-step bf16 data parallelism, 480 MB",
        "Sample          def f():",
        "                    pass",
        "Report          runs/toy/report.html",
        "Next            nebula sample runs/toy",
    ]
    stopped = closing(view, {"state": "stopped"}, run_dir=Path("runs/toy"))
    assert "Next            nebula resume runs/toy" in stopped
    assert "Sample" not in stopped


def test_closing_of_a_run_that_never_began():
    assert "0 of 6 rounds" in closing(View(6), {"state": "failed"}, run_dir=Path("runs/toy"))


# --- terminal -----------------------------------------------------------------------------------------------------


def test_without_a_terminal_there_are_plain_lines_only():
    file = io.StringIO()
    display = Display(Console(file=file, width=40), 6, clock=lambda: 1000.0)
    display.feed(COORDINATOR, event("run_started", **started()))
    display.feed(COORDINATOR, event("joined", cluster="north", epoch=1))
    display.feed(COORDINATOR, event("round", **round_closed(0, 5.0)))
    display.feed("north", event("rank_failure", rank=1, message="[bold]x[/bold] \x1b[31m"))
    display.tick()
    display.close()
    lines = file.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("round 1/6  loss 5.000")
    assert "[bold]x[/bold]" in lines[3]
    assert "\x1b" not in file.getvalue()
    assert "\r" not in file.getvalue()


def test_a_terminal_is_redrawn_four_times_a_second_at_most():
    now = [1000.0]
    console = Console(file=io.StringIO(), force_terminal=True, width=100, _environ={"TERM": "xterm"})
    display = Display(console, 6, clock=lambda: now[0])
    drawn = []
    update = display._live.update
    display._live.update = lambda *args, **named: (drawn.append(now[0]), update(*args, **named))
    display.feed(COORDINATOR, event("run_started", **started()))
    for _ in range(64):
        display.tick()
        now[0] += 1 / 32
    assert len(drawn) == 8
    display.feed(COORDINATOR, event("round", **round_closed(0, 5.0)))
    display.feed(COORDINATOR, event("joined", cluster="north", epoch=2))
    display.close()
    text = console.file.getvalue()
    assert "north joined again" in text
    assert "tokens  up" not in text
