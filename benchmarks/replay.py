"""A trace replayed through the coordinator's own state machine, with its deadline or another in its place."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from unittest.mock import patch

from churn import Trace

from nebula.federation import coordinator
from nebula.federation.coordinator import plan, receipt, step
from nebula.federation.events import Arrived, Committed, Event, Heard, Joined, Merge, Planned, Tick
from nebula.federation.membership import BEAT_SECONDS
from nebula.federation.state import Rules, initial
from nebula.types import Held

TICK_SECONDS = 0.5
MERGE_SECONDS = 1.0
APPLY_SECONDS = 1.0
"""From a commit, or a delta that came too late, until a cluster asks for its next round."""

FRAGMENT = "f0"
TOKENS = 1000
"""Of an inner step."""

Deadline = Callable[..., float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Seconds since the run began. `idle`: how long it waited after the last delta that it merged. `dropped`: deltas
    that would have come within `max_stall` of the first."""

    merge: Merge
    opened: float
    committed: float
    idle: float
    dropped: int


@dataclass
class Replay:
    """`coming`: when each cluster's delta for the round that is under way would arrive."""

    trace: Trace
    rules: Rules
    now: float = 0.0
    rounds: list[Round] = field(default_factory=list)
    coming: dict[str, float] = field(default_factory=dict)
    _queue: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _count: int = 0

    def run(self) -> list[Round]:
        self.state = initial(self.rules)
        self._apply(Committed(fragment=FRAGMENT, version=0, digest="0"))
        for cluster in self.rules.members:
            self._apply(Joined(cluster=cluster, epoch=1))
            self._next(cluster)
        self._pulse(0)
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
        """A tick, and the beats of a part of the clusters."""
        parts = int(BEAT_SECONDS / TICK_SECONDS)
        for cluster in list(self.rules.members)[number % parts :: parts]:
            if self.trace.lives[cluster].heard(self.now):
                self._apply(Heard(cluster=cluster))
        if self.state.fragments[FRAGMENT].arrived:  # else nobody waits
            self._apply(Tick())
        self._at(self.now + TICK_SECONDS, partial(self._pulse, number + 1))

    def _next(self, cluster: str) -> None:
        """It has what it needs, and asks for a round as soon as it can."""
        life = self.trace.lives[cluster]
        asks = life.reaches(self.now + APPLY_SECONDS)
        self.coming[cluster] = life.delivers(asks, self.state.round) if not self.state.finished else asks
        self._at(asks, partial(self._ask, cluster))

    def _ask(self, cluster: str) -> None:
        life, fragment = self.trace.lives[cluster], self.state.fragments[FRAGMENT]
        held = {FRAGMENT: Held(fragment.version, fragment.digest)}
        self._apply(Planned(cluster=cluster, held=held))
        todo = plan(self.state, cluster, held)
        if todo.action != "train":
            return
        work = life.work[todo.round] * todo.inner_steps / self.rules.inner_steps
        done = life.reaches(life.finishes(self.now, work))
        self.coming[cluster] = life.delivers(self.now, todo.round)
        if (back := life.dies(self.now, done)) is not None:
            self._at(life.reaches(back), partial(self._ask, cluster))
        else:
            self._at(done, partial(self._deliver, cluster, todo.round, todo.inner_steps * self.rules.members[cluster]))

    def _deliver(self, cluster: str, round: int, tokens: int) -> None:
        if receipt(self.state, cluster, FRAGMENT, round) != "accept":
            self._next(cluster)
            return
        seconds = self.now - self.state.opened
        self._apply(
            Arrived(
                cluster=cluster, fragment=FRAGMENT, round=round, weight=tokens, blob="", parts=(), seconds=seconds
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
                opened=self.state.opened,
                committed=self.now + MERGE_SECONDS,
                idle=self.now - max(times.values()),
                dropped=sum(self.coming[cluster] <= latest for cluster in missing),
            )
        )
        contributors = tuple(arrival.cluster for arrival in merge.arrivals)
        committed = Committed(
            fragment=FRAGMENT, version=merge.version, digest=str(merge.version), contributors=contributors
        )
        self._at(self.now + MERGE_SECONDS, partial(self._commit, committed))

    def _commit(self, committed: Committed) -> None:
        self._apply(committed)
        for cluster in committed.contributors:
            self._next(cluster)


@contextmanager
def waiting(until: Deadline) -> Iterator[None]:
    with patch.object(coordinator, "deadline", until):
        yield
