"""A trace replayed through the coordinator's own state machine on virtual time, with its deadline or another."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from unittest.mock import patch

from churn import Life, Trace

from nebula.federation import coordinator
from nebula.federation.coordinator import plan, receipt, step
from nebula.federation.events import Arrived, Committed, Event, Heard, Joined, Merge, Planned, Tick
from nebula.federation.membership import BEAT_SECONDS
from nebula.federation.state import Rules, initial
from nebula.types import Beat, Held

TICK_SECONDS = 1.0
"""The real one ticks more often, so what it waits is overstated here, by half a second on average."""

MERGE_SECONDS = 1.0
APPLY_SECONDS = 1.0
"""From a commit, or a delta that came too late, until a cluster asks for its next round."""

TRAINING = 0.9
"""The share of a round's work that is inner steps. In the rest its delta crosses the link."""

INSTANT = 1e-6
"""By so much a deadline follows the delta that it waits for, lest a tick of the same moment comes first."""

FRAGMENT = "f0"

Deadline = Callable[..., float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """`committed`: seconds since the run began. `lost`: seconds waited after the last delta, of those that came within
    `max_stall` of the first. `dropped`: deltas that would still have done so."""

    merge: Merge
    committed: float
    lost: float
    dropped: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A round of one cluster: `work` seconds if nothing slows it down."""

    round: int
    steps: int
    begun: float
    work: float

    def step(self, life: Life, now: float) -> int:
        return min(int(self.steps * life.worked(self.begun, now) / (TRAINING * self.work)), self.steps)


@dataclass
class Replay:
    """`beats`: whether the rule heeds them. `coming`: when each cluster's delta for the round that is under way arrives
    if it stays open."""

    trace: Trace
    rules: Rules
    beats: bool = True
    now: float = 0.0
    coming: dict[str, float] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    _jobs: dict[str, Job] = field(default_factory=dict)
    _sending: set[str] = field(default_factory=set)
    _queue: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _count: int = 0

    def run(self, until: Deadline | None = None) -> list[Round]:
        """All rounds, under the rule `until` instead of the coordinator's own."""
        self.state = initial(self.rules)
        self._apply(Committed(fragment=FRAGMENT, version=0, digest="0"))
        for cluster in self.rules.members:
            self._apply(Joined(cluster=cluster, epoch=1))
            self._next(cluster)
        self._pulse(0)
        with patch.object(coordinator, "deadline", until or coordinator.deadline):
            while not self.state.finished:
                self.now, _, act = heapq.heappop(self._queue)
                act()
        return self.rounds

    def _at(self, time: float, act: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._queue, (time, self._count, act))

    def _apply(self, event: Event) -> None:
        self.state, effects = step(self.state, event, self.now)
        for effect in effects:
            if isinstance(effect, Merge):
                self._merge(effect)

    # --- what clusters do -----------------------------------------------------------------------------------------

    def _pulse(self, number: int) -> None:
        """A tick, and the beats of some of the clusters: each has its turn every BEAT_SECONDS."""
        parts = int(BEAT_SECONDS / TICK_SECONDS)
        for cluster in list(self.rules.members)[number % parts :: parts]:
            if self.beats and self.trace.lives[cluster].heard(self.now):
                self._beat(cluster, self.trace.lives[cluster])
        self._apply(Tick())
        self._at(self.now + TICK_SECONDS, partial(self._pulse, number + 1))

    def _beat(self, cluster: str, life: Life) -> None:
        job = self._jobs.get(cluster)
        if job is None:
            self._apply(Heard(cluster=cluster, beat=Beat()))
            return
        done = job.step(life, self.now)
        self._apply(Heard(cluster=cluster, beat=Beat(round=job.round, step=done, steps=job.steps)))
        if done == job.steps and cluster in self._sending and life.speed(self.now) > 0:
            self._apply(Heard(cluster=cluster))  # a frame of its delta

    def _next(self, cluster: str) -> None:
        """It has what it needs, and asks for a round as soon as it can."""
        life = self.trace.lives[cluster]
        asks = life.reaches(self.now + APPLY_SECONDS)
        self.coming[cluster] = math.inf if self.state.finished else life.delivers(asks, self.state.round)
        self._at(asks, partial(self._ask, cluster))

    def _ask(self, cluster: str) -> None:
        life, fragment = self.trace.lives[cluster], self.state.fragments[FRAGMENT]
        held = {FRAGMENT: Held(fragment.version, fragment.digest)}
        self._apply(Planned(cluster=cluster, held=held))
        todo = plan(self.state, cluster, held)
        if todo.action != "train":
            return
        work = life.work[todo.round] * todo.inner_steps / self.rules.inner_steps
        job = self._jobs[cluster] = Job(round=todo.round, steps=todo.inner_steps, begun=self.now, work=work)
        self._sending.add(cluster)
        self.coming[cluster] = life.delivers(self.now, todo.round)
        done = life.reaches(life.finishes(self.now, work))
        if (back := life.dies(self.now, done)) is not None:
            self._at(life.reaches(back), partial(self._return, cluster))
        else:
            self._at(done, partial(self._deliver, cluster, job))

    def _return(self, cluster: str) -> None:
        self._jobs.pop(cluster)
        self._apply(Joined(cluster=cluster, epoch=self.state.epochs[cluster] + 1))
        self._ask(cluster)

    def _deliver(self, cluster: str, job: Job) -> None:
        self._sending.discard(cluster)
        if receipt(self.state, cluster, FRAGMENT, job.round) != "accept":
            self._next(cluster)
            return
        self._apply(
            Arrived(
                cluster=cluster,
                fragment=FRAGMENT,
                round=job.round,
                weight=job.steps * self.rules.members[cluster],
                blob="",
                parts=(),
                seconds=self.now - self.state.opened,
            )
        )

    # --- what the coordinator does --------------------------------------------------------------------------------

    def _merge(self, merge: Merge) -> None:
        times = self.state.fragments[FRAGMENT].times
        latest = min(times.values()) + self.rules.max_stall
        missing = self.state.expected() - times.keys()
        self.rounds.append(
            Round(
                merge=merge,
                committed=self.now + MERGE_SECONDS,
                lost=self.now - max(time for time in times.values() if time <= latest),
                dropped=sum(self.coming[cluster] <= latest for cluster in missing),
            )
        )
        contributors = tuple(arrival.cluster for arrival in merge.arrivals)
        committed = Committed(fragment=FRAGMENT, version=merge.version, digest="", contributors=contributors)
        self._at(self.now + MERGE_SECONDS, partial(self._commit, committed))

    def _commit(self, committed: Committed) -> None:
        self._apply(committed)
        for cluster in committed.contributors:
            self._next(cluster)


def oracle(replay: Replay) -> Deadline:
    """Knows which deltas come within `max_stall` of the first, and waits for these alone."""

    def until(missing: Iterable[str], *, arrivals: Sequence[float], max_stall: float, **_: object) -> float | None:
        if not arrivals:
            return None
        coming = [replay.coming[c] + INSTANT for c in missing if replay.coming[c] <= min(arrivals) + max_stall]
        return max([*arrivals, *coming])

    return until


def fixed(seconds: float) -> Deadline:
    """After the first delta."""

    def until(missing: object, *, arrivals: Sequence[float], **_: object) -> float | None:
        return max([*arrivals, min(arrivals) + seconds]) if arrivals else None

    return until
