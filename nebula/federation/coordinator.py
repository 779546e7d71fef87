"""The coordinator as a pure state machine: (state, event, now) → (state, effects).

No clock, disk, network or randomness in here. `hub.py` journals each event before it is applied, performs the effects
and feeds their results back as events; after a crash the journal's events, replayed through the same `step`, give the
same state. Every fragment is a machine of its own:

    collecting ──(all expected, or quorum at the deadline)──► merging ──(Committed)──► collecting, version + 1

A round r takes every fragment from version r to r + 1; the current round is the lowest version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from nebula.federation.events import (
    Alarm,
    Arrived,
    Committed,
    Effect,
    Event,
    Joined,
    Merge,
    Planned,
    QuorumLost,
    Reported,
    RoundClosed,
    Stopping,
    Tick,
)
from nebula.federation.membership import deadline
from nebula.types import Held, RoundPlan, RoundReport

# --- state --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What does not change during a run. `members` are sorted: the order of sums."""

    members: tuple[str, ...]
    fragments: tuple[str, ...]
    rounds: int
    inner_steps: int
    evaluate_every: int
    quorum: int
    max_stall: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    commit: Committed | None = None
    previous: Committed | None = None
    """The commit before, kept for clusters that are one round behind."""
    arrived: Mapping[str, Arrived] = field(default_factory=dict)
    times: Mapping[str, float] = field(default_factory=dict)
    """Monotonic times of `arrived`."""
    merging: bool = False

    @property
    def version(self) -> int:
        return self.commit.version if self.commit else -1

    @property
    def digest(self) -> str:
        return self.commit.digest if self.commit else ""

    @property
    def contributors(self) -> tuple[str, ...]:
        return self.commit.contributors if self.commit else ()


HISTORY = 64
"""Arrivals remembered for deadlines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    rules: Rules
    fragments: Mapping[str, Fragment]
    epochs: Mapping[str, int] = field(default_factory=dict)
    present: frozenset[str] = frozenset()
    """Clusters that asked for a plan of the current round."""
    contributed: frozenset[str] = frozenset()
    """Clusters that are part of the previous round."""
    opened: float = 0.0
    witnessed: bool = False
    """Whether this process saw the current round open."""
    history: tuple[float, ...] = ()
    reports: Mapping[int, Mapping[str, RoundReport]] = field(default_factory=dict)
    closed: int = 0
    """Rounds below this one have been closed."""
    stop_at: int | None = None
    stop_reason: str = ""
    gone: frozenset[str] = frozenset()
    """Clusters that were told to stop, or that the run is done."""
    leaving_since: float | None = None
    """When the first of them was told, or could have been in an earlier process."""

    @property
    def round(self) -> int:
        return min(fragment.version for fragment in self.fragments.values())

    @property
    def finished(self) -> bool:
        return self.round >= self.rules.rounds

    def expected(self) -> frozenset[str]:
        """Whom the current round waits for: whoever takes part in it or took part in the last one; at first, all."""
        return self.present | (self.contributed if self.round else frozenset(self.rules.members))


def initial(rules: Rules) -> State:
    return State(rules=rules, fragments={name: Fragment() for name in rules.fragments})


def restarted(state: State, now: float) -> State:
    """What a replayed journal comes to in a new process. A merge that was under way is begun anew by the first Tick:
    its deltas are all here. Of a finished run some clusters may have left already and never ask again."""
    unmerged = {name: replace(fragment, merging=False) for name, fragment in state.fragments.items()}
    leaving = now if state.finished else None
    return replace(state, fragments=unmerged, opened=now, witnessed=False, leaving_since=leaving)


def step(state: State, event: Event, now: float) -> tuple[State, tuple[Effect, ...]]:
    """Apply one event. `now` is monotonic seconds of whoever runs the machine."""
    match event:
        case Joined():
            state = replace(state, epochs={**state.epochs, event.cluster: event.epoch})
            return replace(state, gone=state.gone - {event.cluster}), ()
        case Arrived():
            return _arrived(state, event, now)
        case Committed():
            return _committed(state, event, now)
        case Planned():
            return _planned(state, event, now)
        case Reported():
            return _reported(state, event)
        case Tick():
            state, effects = _due(state, now)
            state, closing = _close(state, over=state.finished and _left(state, now))
            return state, (*effects, *closing)
        case Stopping():
            if state.stop_at is not None:
                return state, ()
            under_way = bool(state.present) or any(f.arrived for f in state.fragments.values())
            # Between rounds there is nothing to wait for but that they ask; some may have left in an earlier process.
            since = state.leaving_since if under_way or state.leaving_since is not None else now
            stop_at = state.round + under_way
            return replace(state, stop_at=stop_at, stop_reason=event.reason, leaving_since=since), ()


def _arrived(state: State, event: Arrived, now: float) -> tuple[State, tuple[Effect, ...]]:
    fragment = state.fragments[event.fragment]
    fragment = replace(
        fragment,
        arrived={**fragment.arrived, event.cluster: event},
        times={**fragment.times, event.cluster: now},
    )
    history = state.history if event.seconds is None else (*state.history, event.seconds)[-HISTORY:]
    state = replace(state, history=history, fragments={**state.fragments, event.fragment: fragment})
    return _due(state, now)


def _committed(state: State, event: Committed, now: float) -> tuple[State, tuple[Effect, ...]]:
    before = state.round
    fragment = Fragment(commit=event, previous=state.fragments[event.fragment].commit)
    state = replace(state, fragments={**state.fragments, event.fragment: fragment})
    if state.round == before:
        return state, ()
    contributed = frozenset(c for f in state.fragments.values() for c in f.contributors)
    state = replace(state, present=frozenset(), contributed=contributed, opened=now, witnessed=True)
    return _close(state)


def _reported(state: State, event: Reported) -> tuple[State, tuple[Effect, ...]]:
    of_round = {**state.reports.get(event.report.round, {}), event.cluster: event.report}
    if event.report.round < state.closed:
        return state, ()  # said again, or too late to matter
    return _close(replace(state, reports={**state.reports, event.report.round: of_round}))


def _close(state: State, *, over: bool = False) -> tuple[State, tuple[Effect, ...]]:
    """Close rounds whose contributors have all reported, and older ones in any case; all of them when the run is over.
    The round after the last one only evaluates the final model."""
    effects: list[Effect] = []
    reports = dict(state.reports)
    closed = state.closed
    while closed < state.round + state.finished and (
        over or closed < state.round - 1 or state.contributed <= reports.get(closed, {}).keys()
    ):
        effects.append(RoundClosed(closed, reports.pop(closed, {})))
        closed += 1
    return replace(state, reports=reports, closed=closed), tuple(effects)


def _due(state: State, now: float) -> tuple[State, tuple[Effect, ...]]:
    if _stopped(state):
        return state, ()  # clusters may have left; what arrives now is kept for the resumed run
    effects: list[Effect] = []
    fragments = dict(state.fragments)
    for name, fragment in state.fragments.items():
        if fragment.merging or not fragment.arrived or fragment.version > state.round:
            continue
        until = _deadline(state, fragment)
        complete = state.expected() <= fragment.arrived.keys()
        enough = len(fragment.arrived) >= state.rules.quorum
        if enough and (complete or (until is not None and now >= until)):
            fragments[name] = replace(fragment, merging=True)
            arrivals = tuple(fragment.arrived[c] for c in state.rules.members if c in fragment.arrived)
            effects.append(Merge(name, fragment.version + 1, arrivals))
        elif not enough and until is not None and now >= until:
            effects.append(QuorumLost(state.round, tuple(sorted(fragment.arrived))))
    return replace(state, fragments=fragments), tuple(effects)


def _deadline(state: State, fragment: Fragment) -> float | None:
    return deadline(
        opened=state.opened if state.witnessed else max(fragment.times.values()),
        arrivals=tuple(fragment.times.values()),
        quorum=state.rules.quorum,
        history=state.history,
        clusters=len(state.rules.members),
        max_stall=state.rules.max_stall,
    )


# --- questions ----------------------------------------------------------------------------------------------------


def receipt(state: State, cluster: str, fragment: str, round: int) -> Literal["accept", "duplicate", "late"]:
    """What to answer a push. A delta may be replaced until its merge begins. Raises ValueError for a future round."""
    at = state.fragments[fragment]
    if round > at.version:
        raise ValueError(f"fragment {fragment} is collecting round {at.version}, not {round}")
    if round == at.version and not at.merging:
        return "accept"
    part_of = at.arrived if round == at.version else at.contributors if round == at.version - 1 else ()
    return "duplicate" if cluster in part_of else "late"


def ended(state: State, now: float) -> Literal["completed", "stopped"] | None:
    """How the run ended, once every cluster that takes part was told so or has had `max_stall` to ask, and the last
    round is closed (by a Tick, if somebody never reports)."""
    if state.finished and state.closed > state.round:
        return "completed" if _left(state, now) else None
    return "stopped" if _stopped(state) and _left(state, now) else None


def _stopped(state: State) -> bool:
    return state.stop_at is not None and state.round >= state.stop_at and not state.finished


def _left(state: State, now: float) -> bool:
    missing = (state.expected() & state.epochs.keys()) - state.gone
    return not missing or (state.leaving_since is not None and now >= state.leaving_since + state.rules.max_stall)


def plan(state: State, cluster: str, held: Mapping[str, Held]) -> RoundPlan:
    """What a cluster that holds these versions does next."""
    rules, current = state.rules, state.round
    versions = {name: held[name].version for name in rules.fragments}
    if _stopped(state):
        return RoundPlan(action="stop", round=current, reason=state.stop_reason)
    wrong = {
        name: f.version
        for name, f in state.fragments.items()
        if versions[name] > f.version or (versions[name] == f.version and held[name].digest != f.digest)
    }
    if wrong:
        return RoundPlan(action="catch_up", round=current, fragments=wrong, reason="diverged")
    if _may_redo(state, cluster, versions):
        return _train(state, cluster, current - 1, versions)
    behind = {name: f.version for name, f in state.fragments.items() if versions[name] < current}
    if behind:
        return RoundPlan(action="catch_up", round=current, fragments=behind, reason="behind")
    if state.finished:
        evaluated = state.closed > current or cluster in state.reports.get(current, {})
        return RoundPlan(action="done", round=current) if evaluated else _train(state, cluster, current, {})
    return _train(state, cluster, current, versions)


def _may_redo(state: State, cluster: str, versions: Mapping[str, int]) -> bool:
    """A cluster that lost its process between delivering and saving repeats that round from its checkpoint and takes
    the same updates: its inner optimizer, data and residuals then equal those of a run without the loss."""
    return all(
        f.version == state.round and versions[name] == f.version - 1 and cluster in f.contributors
        for name, f in state.fragments.items()
    )


def _train(state: State, cluster: str, round: int, versions: Mapping[str, int]) -> RoundPlan:
    rules = state.rules
    evaluate = round % rules.evaluate_every == 0 or round >= rules.rounds
    return RoundPlan(
        action="train",
        round=round,
        inner_steps=rules.inner_steps if versions else 0,
        fragments={name: version for name, version in versions.items() if version == round},
        eval_index=rules.members.index(cluster),
        eval_count=len(rules.members) if evaluate else 0,
    )


def _planned(state: State, event: Planned, now: float) -> tuple[State, tuple[Effect, ...]]:
    answer = plan(state, event.cluster, event.held)
    if answer.action in ("done", "stop"):
        since = now if state.leaving_since is None else state.leaving_since
        return replace(state, gone=state.gone | {event.cluster}, leaving_since=since), ()
    if answer.action == "train":
        first = not state.present and not state.witnessed
        opened = now if first else state.opened
        state = replace(state, opened=opened, witnessed=state.witnessed or first)
        return replace(state, present=state.present | {event.cluster}), ()
    if answer.reason == "diverged":
        ahead = any(event.held[n].version > state.fragments[n].version for n in answer.fragments)
        kind: Literal["digest_mismatch", "ahead_of_coordinator"]
        kind = "ahead_of_coordinator" if ahead else "digest_mismatch"
        return state, (Alarm(kind, event.cluster, ", ".join(sorted(answer.fragments))),)
    return state, ()
