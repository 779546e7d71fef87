"""Many runs of the simulated world, over many processes; and one of them, told in full."""

from __future__ import annotations

import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from multiprocessing import get_context
from typing import Protocol

import apsw

from nebula.config import Membership, Wan
from nebula.sim.world.disk import PowerCut
from nebula.sim.world.scenario import CODECS, Scenario, draw, small
from nebula.sim.world.witness import Violation
from nebula.sim.world.world import Outcome, World, judge
from nebula.types import COORDINATOR

TAIL = 40
"""Lines of its trace that a run leaves behind when it fails."""

AT_ONCE = 4
"""Runs that a process takes at a time."""


class Series(Protocol):
    """Runs by number. The same number is the same run, to the byte."""

    def world(self, number: int) -> World: ...
    def judge(self, world: World) -> Outcome:
        """Raises Violation."""
        ...


@dataclass(frozen=True, slots=True)
class Seeds:
    """Runs of 2 … `clusters` clusters in which a seed decides what goes wrong."""

    clusters: int

    def world(self, number: int) -> World:
        return World(draw(number, self.clusters))

    def judge(self, world: World) -> Outcome:
        return judge(world)


@dataclass(frozen=True, slots=True)
class Crashes:
    """A short run of two clusters, in which the power is cut at one step of one disk: run n crashes at point n. Beyond
    the last point they begin again, with other luck for what had not reached the disk."""

    def world(self, number: int) -> World:
        luck, at = divmod(number, len(points()))
        target, step = points()[at]
        world = World(short(luck))
        (world.center if target == COORDINATOR else world.sites[target]).disk.crash_at = step
        return world

    def judge(self, world: World) -> Outcome:
        """Both clusters are needed and neither is ever behind, so the crash must leave no trace at all."""
        outcome = judge(world)
        if not outcome.exact:
            raise Violation("exact", "a crash has cost a cluster its part in a round")
        return outcome


def short(seed: int) -> Scenario:
    run = small(
        rounds=2,
        inner_steps=1,
        fragments=2,
        wan=Wan(up=CODECS[0], down=CODECS[0]),
        membership=Membership(quorum=2, max_stall=30.0),
        checkpoint_every=1,
    )
    return Scenario(seed=seed, run=run, pace={"ash": 0.4, "birch": 0.6}, faults=())


@cache
def points() -> Sequence[tuple[str, int]]:
    """Where a short run may crash: whose disk, and at which of its steps, from 1."""
    world = World(short(0))
    world.run()
    disks = {COORDINATOR: world.center.disk} | {name: site.disk for name, site in world.sites.items()}
    return [(name, step) for name, disk in disks.items() for step in range(1, disk.steps + 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What became of one run. `seconds` are virtual. `faults`: those that struck, by kind. `violated`: the key of an
    invariant in witness.INVARIANTS, if one was; `what`: how. `trace`: lines, all of them or the last ones."""

    number: int
    events: int
    seconds: float
    faults: Counter[str]
    exact: bool
    digest: str = ""
    violated: str = ""
    what: str = ""
    trace: Sequence[str] = ()


def tell(series: Series, number: int, *, whole: bool = False) -> Told:
    """Run one. `whole`: with all of its trace, and not just the end of a failed one's."""
    world = series.world(number)
    outcome, violated, what = None, "", ""
    try:
        with _quiet():
            outcome = series.judge(world)
    except Violation as violation:
        violated, what = violation.invariant, violation.what
    except Exception as error:
        error.add_note(f"in run {number} of {series}")
        raise
    shown = world.trace if whole else world.trace[-TAIL:] if violated else []
    return Told(
        number=number,
        events=world.events,
        seconds=world.scheduler.now,
        faults=Counter(kind for _, who, kind, _ in world.trace if who == "world"),
        exact=outcome is not None and outcome.exact,
        digest=outcome.digest if outcome is not None else "",
        violated=violated,
        what=what,
        trace=[line(*entry) for entry in shown],
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """SQLite goes on for a moment when its disk has lost power, and closes what a dead process left open. apsw, which
    cannot raise what comes of that, would tell of it on stderr."""
    hook = sys.unraisablehook

    def tell(error: sys.UnraisableHookArgs) -> None:
        if not isinstance(error.exc_value, (PowerCut, apsw.IOError)):
            hook(error)

    sys.unraisablehook = tell
    try:
        yield
    finally:
        sys.unraisablehook = hook


def line(time: float, who: str, what: str, details: Mapping[str, object]) -> str:
    return " ".join([f"{time:12.6f}", f"{who:<11}", what, *(f"{key}={value}" for key, value in details.items())])


@dataclass(slots=True)
class Tally:
    """Of the runs so far. `failed`: the first that violated an invariant."""

    runs: int = 0
    events: int = 0
    seconds: float = 0.0
    exact: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    failed: Told | None = None

    def add(self, told: Told) -> None:
        self.runs += 1
        self.events += told.events
        self.seconds += told.seconds
        self.exact += told.exact
        self.faults += told.faults
        if told.violated:
            self.failed = told


def campaign(series: Series, numbers: Sequence[int], jobs: int, progress: Callable[[Tally], None]) -> Tally:
    """Run them all, up to the first one in their order that violates an invariant."""
    tally = Tally()
    with _spread(jobs) as over:
        for told in over(partial(tell, series), numbers):
            tally.add(told)
            progress(tally)
            if tally.failed is not None:
                break
    return tally


@contextmanager
def _spread(jobs: int) -> Iterator[Callable[[Callable[[int], Told], Sequence[int]], Iterator[Told]]]:
    """A `map` over `jobs` processes, which gives results in the order of its arguments."""
    if jobs == 1:
        yield map
        return
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_ignore_interrupts)
    try:
        yield lambda act, numbers: pool.map(act, numbers, chunksize=AT_ONCE)
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interrupts() -> None:
    """Ctrl-C is for the process that waits for these."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
