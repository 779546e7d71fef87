from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula.runtime.supervise import (
    BUDGET,
    LONGEST_PAUSE,
    WINDOW,
    Child,
    Finished,
    GiveUp,
    Restart,
    Supervisor,
    decide,
    members,
)

# --- the policy ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 130])
def test_a_finished_child_stays_finished(code):
    assert decide([], code, 0.0) == Finished()


@pytest.mark.parametrize("code", [2, 3, 5, 6])
def test_what_another_try_does_not_change_is_not_tried_again(code):
    decision = decide([], code, 0.0)
    assert isinstance(decision, GiveUp)
    assert f"exit code {code}" in decision.reason


@pytest.mark.parametrize("code", [1, 4, -signal.SIGKILL, -signal.SIGSEGV])
def test_failures_are_tried_again_ever_later(code):
    pauses = [decide([0.0] * n, code, 1.0).after_s for n in range(BUDGET)]
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0]


def test_the_budget_ends_and_comes_back_with_time():
    history = [float(n) for n in range(BUDGET)]
    assert "failed 6 times" in decide(history, 1, 10.0).reason
    assert decide(history, 1, WINDOW + BUDGET) == Restart(0.5)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(0, 1e4), max_size=20), st.integers(-64, 255), st.floats(1e4, 2e4))
def test_restarts_are_bounded_whatever_happened(history, code, now):
    decision = decide(history, code, now)
    if isinstance(decision, Restart):
        assert 0 < decision.after_s <= LONGEST_PAUSE
        assert sum(now - moment < WINDOW for moment in history) < BUDGET


# --- the supervisor, with children of straw -----------------------------------------------------------------------


class Straw:
    def __init__(self, name: str, *codes: int | None) -> None:
        self.name, self.codes, self.log = name, list(codes), []

    def start(self) -> None:
        self.log.append("start")

    def poll(self) -> int | None:
        return self.codes.pop(0)

    def tail(self) -> str:
        return "last words"

    def stop(self) -> None:
        self.log.append("stop")


def test_a_child_is_restarted_when_its_pause_is_over():
    now = 100.0
    supervisor, child = Supervisor(clock=lambda: now), Straw("north", None, 1, None, 0)
    supervisor.start(child)
    assert supervisor.poll() == []
    (failed,) = supervisor.poll()
    assert (failed.child, failed.kind, failed.exit_code, failed.after_s) == ("north", "failed", 1, 0.5)
    assert failed.tail == "last words"
    assert supervisor.poll() == []
    assert supervisor.alive == ["north"]
    now = 100.5
    assert [event.kind for event in supervisor.poll()] == ["restarted"]
    assert supervisor.poll() == []
    assert [event.kind for event in supervisor.poll()] == ["finished"]
    assert supervisor.alive == []
    assert child.log == ["start", "stop", "start", "stop"]


def test_giving_up_says_why_and_leaves_the_others_alone():
    supervisor = Supervisor(clock=lambda: 0.0)
    supervisor.start(Straw("north", 3))
    supervisor.start(Straw("south", None))
    (event,) = supervisor.poll()
    assert (event.child, event.kind, event.exit_code) == ("north", "gave_up", 3)
    assert "this machine cannot run it" in event.reason
    assert supervisor.alive == ["south"]


def test_all_children_end_with_the_supervisor_the_youngest_first():
    order = []
    with Supervisor() as supervisor:
        for name in ("coordinator", "north"):
            child = Straw(name)
            child.stop = lambda name=name: order.append(name)
            supervisor.start(child)
    assert order == ["north", "coordinator"]


# --- real processes -----------------------------------------------------------------------------------------------


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def ended(pid: int) -> None:
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def test_last_words_are_read_before_anything_left_is_ended():
    child = Straw("north", 1)
    child.tail = lambda: "stopped" if "stop" in child.log else "no room"
    supervisor = Supervisor(clock=lambda: 0.0)
    supervisor.start(child)
    assert [event.tail for event in supervisor.poll()] == ["no room"]


def test_a_real_child_is_restarted_and_its_log_kept(tmp_path):
    mark = tmp_path / "second"
    code = (
        f"import os, sys; mark = {str(mark)!r}; done = os.path.exists(mark);"
        "open(mark, 'w').close(); print('ran', done); sys.exit(not done)"
    )
    child = Child("agent", python(code), log=tmp_path / "logs" / "agent.log")
    now = 0.0
    with Supervisor(clock=lambda: now) as supervisor:
        supervisor.start(child)
        ended(child.pid)
        assert [(e.kind, e.exit_code, e.tail) for e in supervisor.poll()] == [("failed", 1, "ran False")]
        now = 1.0
        supervisor.poll()
        ended(child.pid)
        assert [e.kind for e in supervisor.poll()] == ["finished"]
    assert child.tail() == "ran False\nran True"
    assert child.tail(1) == "ran True"


def test_stopping_ends_the_deaf_and_what_they_started(tmp_path):
    ready = tmp_path / "ready"
    os.mkfifo(ready)
    code = (
        "import signal, subprocess, threading; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "subprocess.Popen(['sleep', '600']); subprocess.Popen(['sleep', '600'], start_new_session=True);"
        f"open({str(ready)!r}, 'w').close(); threading.Event().wait()"
    )
    child = Child("deaf", python(code), log=tmp_path / "log")
    child.start()
    ready.read_text()  # until it has got that far
    family = members(child.pid)
    assert len(family) == 3
    child.stop(grace=0.05)
    assert members(child.pid) == []
    assert child.poll() == -signal.SIGKILL
    assert not any(os.path.exists(f"/proc/{pid}") and _state(pid) != "Z" for pid in family)
    child.stop()


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]


@pytest.mark.parametrize(("before", "orphaned"), [("", "SIGTERM"), ("trap '' TERM; ", "SIGKILL")])
def test_children_die_with_a_supervisor_that_is_killed(tmp_path, before, orphaned):
    shell = ["sh", "-c", f"{before}while :; do sleep 600; done"]
    code = (
        "import signal, sys; from pathlib import Path; from nebula.runtime.supervise import Child;"
        f"c = Child('c', {shell!r}, log=Path({str(tmp_path / 'log')!r}), orphaned=signal.{orphaned}); c.start();"
        "print(c.pid, flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as supervisor:
        pidfd = os.pidfd_open(int(supervisor.stdout.readline()))
        supervisor.kill()
    assert select.select([pidfd], [], [], 20)[0], "the child outlived its supervisor"
    os.close(pidfd)
