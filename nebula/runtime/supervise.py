"""Child processes that are kept alive while we live and end when we end.

Every child has a session of its own, so that a Ctrl-C in our terminal reaches us and not it, and so that all it
starts can be found. The kernel signals a child when the *thread* that started it ends: start children from a thread
that lasts, such as the main one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

BUDGET, WINDOW = 5, 600.0
"""At most this many restarts of a child within so many seconds."""

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before the first restart of a window; doubled with each one up to the longest."""

FINISHED = (0, 130)
FINAL = {
    2: "its configuration is wrong",
    3: "this machine cannot run it",
    5: "it was refused",
    6: "the run pauses for want of clusters",
}
"""Exit codes (see nebula.errors) that another try does not change."""

PR_SET_PDEATHSIG = 1

# Set in a process of its own before exec: running Python between fork and exec deadlocks under threads.
WRAPPER = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, int(sys.argv[2]))
if os.getppid() != int(sys.argv[1]): sys.exit(1)
os.execvpe(sys.argv[3], sys.argv[3:], os.environ)
"""


# --- the policy ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Restart:
    after_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    reason: str


@dataclass(frozen=True, slots=True)
class Finished:
    pass


def decide(history: Sequence[float], exit_code: int, now: float) -> Restart | GiveUp | Finished:
    """What to do with a child that ended. `history`: the times of its restarts so far, in the unit of `now`, seconds.
    A negative exit code is the signal that killed it."""
    if exit_code in FINISHED:
        return Finished()
    if exit_code in FINAL:
        return GiveUp(f"{FINAL[exit_code]} (exit code {exit_code})")
    recent = sum(now - moment < WINDOW for moment in history)
    if recent >= BUDGET:
        return GiveUp(f"it failed {recent + 1} times within {WINDOW:.0f} s (exit code {exit_code})")
    return Restart(min(FIRST_PAUSE * 2**recent, LONGEST_PAUSE))


# --- children -----------------------------------------------------------------------------------------------------


class Child:
    """One process in its own session; stdout and stderr are appended to `log`. `orphaned`: the signal it gets when we
    die; a gentler one only for what has children of its own to take along."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        orphaned: signal.Signals = signal.SIGKILL,
    ) -> None:
        self.name = name
        self._argv = list(argv)
        self._log = log
        self._orphaned = orphaned
        self._env = dict(os.environ if env is None else env)
        self._process: subprocess.Popen[bytes] | None = None
        self._swept = False

    def start(self) -> None:
        assert self.poll() is not None or self._process is None, f"{self.name} runs already"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-I", "-S", "-c", WRAPPER, str(os.getpid()), str(int(self._orphaned)), *self._argv]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, env=self._env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._swept = False

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} was not started"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        return None if self._process is None else self._process.poll()

    def tail(self, lines: int = 10) -> str:
        """The last lines of its log, for a diagnosis."""
        if not self._log.exists():
            return ""
        return "\n".join(self._log.read_text("utf-8", errors="replace").splitlines()[-lines:])

    def signal(self, number: signal.Signals) -> bool:
        """Send it a signal. False if it does not run."""
        if self._process is None or self._process.poll() is not None:
            return False
        self._process.send_signal(number)
        return True

    def stop(self, grace: float = 10.0) -> None:
        """Ask it to end; after `grace` seconds, or once it has, kill whatever is left of its session."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):  # the kill below is the answer
                self._process.wait(grace)
        self.kill()

    def kill(self) -> None:
        """End it and everything it started, at once. Does nothing to what has ended."""
        if self._process is None or self._swept:
            return
        while left := members(self._process.pid):  # again, for what a member started meanwhile
            for pid in left:
                with contextlib.suppress(ProcessLookupError):  # it was faster
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        self._process.wait()
        self._swept = True  # its number may now become another's


def members(session: int) -> list[int]:
    """Processes of a session, and their descendants that left it. Not those that have ended and wait to be reaped."""
    states: dict[int, tuple[str, int, int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path("/proc", entry, "stat").read_text(errors="replace")
            except OSError:
                continue  # it ended while we looked
            state, parent, _, own, *_ = stat.rpartition(")")[2].split()
            states[int(entry)] = (state, int(parent), int(own))
    found = {pid for pid, (_, _, own) in states.items() if own == session}
    while grown := {pid for pid, (_, parent, _) in states.items() if parent in found} - found:
        found |= grown
    return sorted(pid for pid in found if states[pid][0] not in "ZX")


def die_with(parent: int) -> None:
    """In a child: be killed when the thread of `parent` that started us ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


# --- the supervisor -----------------------------------------------------------------------------------------------


class Supervised(Protocol):
    """What a supervisor keeps alive: a Child, or a Ray head."""

    @property
    def name(self) -> str: ...
    def start(self) -> None: ...
    def poll(self) -> int | None: ...
    def tail(self) -> str: ...
    def stop(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """`failed`: it will be restarted after `after_s`; `tail`: the last lines of its log."""

    child: str
    kind: Literal["finished", "failed", "restarted", "gave_up"]
    exit_code: int
    reason: str = ""
    after_s: float = 0.0
    tail: str = ""


@dataclass(slots=True)
class _Kept:
    child: Supervised
    history: list[float] = field(default_factory=list)
    due: float | None = None
    exit_code: int = 0


class Supervisor:
    """A named set of children, restarted as `decide` says. Leaving the `with` block ends them all."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kept: dict[str, _Kept] = {}

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def alive(self) -> list[str]:
        """Names of the children that run or will be restarted."""
        return sorted(self._kept)

    def start(self, child: Supervised) -> None:
        assert child.name not in self._kept, f"there is a {child.name} already"
        self._kept[child.name] = _Kept(child)
        child.start()

    def poll(self) -> list[Event]:
        """What happened since the last time. Restarts what is due; never waits."""
        events = (self._poll(kept) for kept in list(self._kept.values()))
        return [event for event in events if event is not None]

    def stop(self) -> None:
        """End all children, the last one started first."""
        while self._kept:
            _, kept = self._kept.popitem()
            kept.child.stop()

    def _poll(self, kept: _Kept) -> Event | None:
        now, name = self._clock(), kept.child.name
        if kept.due is not None:
            if now < kept.due:
                return None
            kept.due = None
            kept.history.append(now)
            kept.child.start()
            return Event(child=name, kind="restarted", exit_code=kept.exit_code)
        code = kept.child.poll()
        if code is None:
            return None
        kept.exit_code = code
        tail = kept.child.tail()  # now: stopping what is left may add words of its own
        kept.child.stop()
        match decide(kept.history, code, now):
            case Finished():
                del self._kept[name]
                return Event(child=name, kind="finished", exit_code=code)
            case GiveUp(reason):
                del self._kept[name]
                return Event(child=name, kind="gave_up", exit_code=code, reason=reason, tail=tail)
            case Restart(after_s):
                kept.due = now + after_s
                return Event(child=name, kind="failed", exit_code=code, after_s=after_s, tail=tail)
