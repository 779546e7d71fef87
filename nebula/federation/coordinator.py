"""The coordinator as a pure state machine: (state, event, now) → (state, effects).

No clock, disk, network or randomness in here. `hub.py` journals each event before it is applied, performs the effects
and feeds their results back as events; after a crash the journal's events, replayed through the same `step`, give the
same state. Every fragment is a machine of its own:

    collecting ──(all expected, or quorum at the deadline)──► merging ──(Committed)──► collecting, version + 1

A round r takes every fragment from version r to r + 1; the current round is the lowest version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from nebula.federation.events import (
    Alarm,
    Arrived,
    Committed,
    Effect,
    Event,
    Heard,
    Joined,
    Merge,
    Planned,
    QuorumLost,
    Reported,
    RoundClosed,
    Stopping,
    Tick,
    Waiting,
)
from nebula.federation.membership import BEAT_SECONDS, HISTORY, Pulse, advanced, deadline, heard
from nebula.federation.state import Fragment, Rules, Span, State
from nebula.types import Held, RoundPlan

WORTH_A_WORD = 10.0
"""Seconds that a round has waited before it says for whom."""

STOOD_STILL = 2 * BEAT_SECONDS
"""Seconds between two ticks, which come several times a second, that mean that this process stood still."""


def restarted(state: State, now: float) -> State:
    """What a replayed journal comes to in a new process. A merge that was under way is begun anew by the first Tick:
    its deltas are all here. Of a finished run some clusters may have left already and never ask again. Whoever has
    joined before counts as heard, for it could not be."""
    unmerged = {name: replace(fragment, merging=False) for name, fragment in state.fragments.items()}
    leaving = now if state.finished else None
    pulses = {cluster: Pulse(now) for cluster in state.epochs}
    return replace(state, fragments=unmerged, opened=now, witnessed=False, leaving_since=leaving, pulses=pulses)


def step(state: State, event: Event, now: float) -> tuple[State, tuple[Effect, ...]]:
    """Apply one event. `now` is monotonic seconds of whoever runs the machine."""
    if isinstance(event, Joined | Arrived | Planned | Heard):
        known = None if isinstance(event, Joined) else state.pulses.get(event.cluster)  # an absence is no rhythm
        pulse = heard(known, now)
        state = replace(state, pulses={**state.pulses, event.cluster: pulse})
    match event:
        case Joined():
            state = replace(state, epochs={**state.epochs, event.cluster: event.epoch})
            return replace(state, gone=state.gone - {event.cluster}, left=state.left - {event.cluster}), ()
        case Arrived():
            return _arrived(state, event, now)
        case Committed():
            return _committed(state, event, now)
        case Planned():
            return _planned(state, event, now)
        case Reported():
            return _reported(state, event)
        case Heard():
            return _heard(state, event, now)
        case Tick():
            state = replace(_excused(state, now), ticked=now)
            state, effects = _due(state, now)
            state, closing = _close(state, over=state.finished and _left(state, now))
            state, waiting = _say(state, now)
            return state, (*effects, *closing, *waiting)
        case Stopping():
            if state.stop_at is not None:
                return state, ()
            under_way = bool(state.present) or any(f.arrived for f in state.fragments.values())
            # Between rounds there is nothing to wait for but that they ask; some may have left in an earlier process.
            since = state.leaving_since if under_way or state.leaving_since is not None else now
            stop_at = state.round + under_way
            return replace(state, stop_at=stop_at, stop_reason=event.reason, leaving_since=since), ()


def _excused(state: State, now: float) -> State:
    """A coordinator that stood still (its machine was suspended, its disk hung) did not hear anyone meanwhile. That is
    nobody's fault: for whoever is waited for, this time has not passed."""
    lost = 0.0 if state.ticked is None else now - state.ticked
    if lost < STOOD_STILL:
        return state

    def later(time: float) -> float:
        return min(time + lost, now)

    fragments = {
        name: replace(f, times={cluster: later(time) for cluster, time in f.times.items()})
        for name, f in state.fragments.items()
    }
    pulses = {cluster: replace(pulse, last=later(pulse.last)) for cluster, pulse in state.pulses.items()}
    progress = {
        cluster: replace(p, begun=later(p.begun), pulse=replace(p.pulse, last=later(p.pulse.last)))
        for cluster, p in state.progress.items()
    }
    state = replace(state, fragments=fragments, pulses=pulses, progress=progress, opened=later(state.opened))
    return replace(state, leaving_since=None if state.leaving_since is None else later(state.leaving_since))


def _arrived(state: State, event: Arrived, now: float) -> tuple[State, tuple[Effect, ...]]:
    fragment = state.fragments[event.fragment]
    fragment = replace(
        fragment,
        arrived={**fragment.arrived, event.cluster: event},
        times={**fragment.times, event.cluster: now},
    )
    if event.seconds is not None:
        recent = (*state.history.get(event.cluster, ()), event.seconds)[-HISTORY:]
        state = replace(state, history={**state.history, event.cluster: recent})
    state = replace(state, fragments={**state.fragments, event.fragment: fragment})
    return _due(state, now)


def _heard(state: State, event: Heard, now: float) -> tuple[State, tuple[Effect, ...]]:
    progress = advanced(state.progress.get(event.cluster), event.beat, now)
    if progress is not None:
        state = replace(state, progress={**state.progress, event.cluster: progress})
    if event.beat is None or not event.beat.leaving:
        return state, ()
    left, present = state.left | {event.cluster}, state.present - {event.cluster}
    return _due(replace(state, left=left, present=present, gone=state.gone | {event.cluster}), now)


def _committed(state: State, event: Committed, now: float) -> tuple[State, tuple[Effect, ...]]:
    before = state.round
    old = state.fragments[event.fragment]
    arrivals = tuple(old.arrived[c] for c in event.contributors)
    fragment = Fragment(chain=_kept((*old.chain, event)), merged=_merge(state.rules, event.version, arrivals))
    state = replace(state, fragments={**state.fragments, event.fragment: fragment})
    if state.round == before or state.round == 0:
        return state, ()
    contributed = frozenset(c for f in state.fragments.values() for c in f.contributors)
    over = state.spans[1]
    span = Span(over.position + over.steps, state.rules.steps(contributed))
    state = replace(state, present=frozenset(), contributed=contributed, spans=(over, span), said=frozenset())
    return _close(replace(state, opened=now, witnessed=True))


def _kept(chain: tuple[Committed, ...]) -> tuple[Committed, ...]:
    """The newest two commits, and those before them from which a cluster catches up with half the bytes of the whole
    state or less."""
    first, size = max(len(chain) - 2, 0), sum(commit.update_bytes for commit in chain[-2:])
    while first > 0 and (size := size + chain[first - 1].update_bytes) <= chain[-1].state_bytes // 2:
        first -= 1
    return chain[first:]


def _merge(rules: Rules, version: int, arrivals: tuple[Arrived, ...]) -> Merge | None:
    """`arrivals` in the order of sums."""
    if not arrivals:
        return None
    return Merge(arrivals[0].fragment, version, arrivals, rules.scale(sum(arrival.weight for arrival in arrivals)))


def _reported(state: State, event: Reported) -> tuple[State, tuple[Effect, ...]]:
    state = replace(state, reported={**state.reported, event.cluster: event.report.round})
    if event.report.round < state.closed:
        return state, ()  # too late for the round's figures
    of_round = {**state.reports.get(event.report.round, {}), event.cluster: event.report}
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
            merge = _merge(state.rules, fragment.version + 1, arrivals)
            effects += [merge] if merge else []
        elif not enough and until is not None and now >= until:
            return _pause(state, fragment, now)
    return replace(state, fragments=fragments), tuple(effects)


def _pause(state: State, fragment: Fragment, now: float) -> tuple[State, tuple[Effect, ...]]:
    """The quorum is lost: whoever waits is told to stop. Everything stays as it is, for the day the others are back;
    for them, the whole `max_stall` has been waited already."""
    gone = state.gone | (state.expected() - fragment.arrived.keys())
    lost = QuorumLost(state.round, tuple(sorted(fragment.arrived)))
    state = replace(state, stop_at=state.round, stop_reason="the quorum is lost", leaving_since=now, gone=gone)
    return state, (lost,)


def _deadline(state: State, fragment: Fragment) -> float | None:
    missing = state.expected() - fragment.arrived.keys()
    return deadline(
        {cluster: state.pulses.get(cluster) for cluster in missing},
        opened=state.opened if state.witnessed else max(fragment.times.values()),
        arrivals=tuple(fragment.times.values()),
        quorum=state.rules.quorum,
        history=state.history,
        max_stall=state.rules.max_stall,
        progress={c: p for c in missing if (p := state.progress.get(c)) and p.beat.round == fragment.version},
    )


def _say(state: State, now: float) -> tuple[State, tuple[Effect, ...]]:
    """Once per set of missing clusters."""
    if _stopped(state):
        return state, ()
    waited = [now - max(f.times.values()) for f in state.fragments.values() if f.arrived and not f.merging]
    missing = waiting(state, now) if waited and max(waited) >= WORTH_A_WORD else {}
    if missing.keys() <= state.said:
        return state, ()
    return replace(state, said=frozenset(missing)), (Waiting(state.round, missing),)


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


def waiting(state: State, now: float) -> dict[str, str]:
    """Whom the current round waits for, and what is known of each."""
    collecting = [f for f in state.fragments.values() if f.version == state.round and not f.merging]
    begun = [f for f in collecting if f.arrived] or collecting
    missing = sorted({c for f in begun for c in state.expected() - f.arrived.keys()})
    return {cluster: _known(state, cluster, now) for cluster in missing}


def _known(state: State, cluster: str, now: float) -> str:
    pulse, progress = state.pulses.get(cluster), state.progress.get(cluster)
    if pulse is None:
        return "never heard"
    if now >= pulse.silent_at:
        return f"silent for {now - pulse.last:.0f} s"
    if progress is not None and progress.beat.round == state.round and progress.training:
        return f"at inner step {progress.beat.step} of {progress.beat.steps}"
    return "alive, its delta is not here yet"


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
        inner_steps=state.span(round).steps if versions else 0,
        position=state.span(round).position,
        fragments={name: version for name, version in versions.items() if version == round},
        eval_index=list(rules.members).index(cluster),
        eval_count=len(rules.members) if evaluate else 0,
    )


def _planned(state: State, event: Planned, now: float) -> tuple[State, tuple[Effect, ...]]:
    answer = plan(state, event.cluster, event.held)
    state = replace(state, left=state.left - {event.cluster})
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
