"""Whom a round waits for, and until when. Pure functions of what was measured; times are monotonic seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from nebula.types import Beat

BEAT_SECONDS = 2.0
"""How often an agent says that it lives."""

LEAST_SILENCE = 4 * BEAT_SECONDS
"""Fewer seconds without a word are never taken for a failure: a cut this short costs nobody a round."""

PATIENT = 0.25
"""A silence is waited out for this share of what the round had lasted before it: to give up wastes the cluster's whole
round. One that dies at a random moment costs the others PATIENT² / 2 of a round on average, so 3 %."""

SPREADS = 4.0
"""How many spreads (median absolute deviations, or mean ones, as in RFC 6298) beyond the middle are still ordinary."""

LEAST_SPREAD = 0.25
"""Few or near-equal samples understate the spread; it is taken as at least this share of the median."""

LEAST_ARRIVALS = 3
"""Fewer of a cluster's own arrivals are no measure; those of all clusters are taken."""

HISTORY = 32
"""Arrivals remembered per cluster."""


@dataclass(frozen=True, slots=True)
class Pulse:
    """When a cluster was last heard, and the gaps between its words as a running mean and mean deviation (the
    estimator of RFC 6298), seconds."""

    last: float
    mean: float = BEAT_SECONDS
    spread: float = BEAT_SECONDS / 4

    @property
    def patience(self) -> float:
        """The longest ordinary silence."""
        return max(LEAST_SILENCE, self.mean + SPREADS * self.spread)

    @property
    def silent_at(self) -> float:
        return self.last + self.patience


def heard(pulse: Pulse | None, now: float) -> Pulse:
    """A cluster said something. An outage makes for more patience, too, for a dozen words or so."""
    if pulse is None:
        return Pulse(now)
    gap = now - pulse.last
    off = abs(gap - pulse.mean)
    return Pulse(now, pulse.mean + (gap - pulse.mean) / 8, pulse.spread + (off - pulse.spread) / 4)


@dataclass(frozen=True, slots=True)
class Progress:
    """How a cluster gets on with a round. `beat`: the newest that told of a step forward; `pulse`: of such beats, and
    then of its delta's frames. `begun`: when the first beat of this round came, `first`: its step."""

    beat: Beat
    pulse: Pulse
    begun: float
    first: int

    @property
    def training(self) -> bool:
        return self.beat.step < self.beat.steps

    @property
    def trained_at(self) -> float:
        """When its inner steps are done at the pace of this round; `last` while there is none to go by."""
        steps = self.beat.step - self.first
        pace = (self.pulse.last - self.begun) / steps if steps else 0.0
        return self.pulse.last + pace * (self.beat.steps - self.beat.step)


def advanced(progress: Progress | None, beat: Beat | None, now: float) -> Progress | None:
    """A cluster said how far it is, or (without a beat) a part of its delta came. Of a round that it begins anew, the
    steps count anew."""
    if beat is None:
        if progress is None or progress.training:
            return progress
        return replace(progress, pulse=heard(progress.pulse, now))
    if progress is None or beat.round != progress.beat.round or beat.step < progress.beat.step:
        pulse = Pulse(now) if progress is None else replace(progress.pulse, last=now)
        return Progress(beat, pulse, now, beat.step)
    if beat.step == progress.beat.step:
        return progress
    return replace(progress, beat=beat, pulse=heard(progress.pulse, now))


def latest_arrival(cluster: str, history: Mapping[str, Sequence[float]]) -> float:
    """Seconds after a round opens at which a cluster's delta is no longer explained by measured arrivals: median +
    k·MAD of its own `history` (opening → arrival, recent rounds), of everyone's until it has one. Infinite while there
    is nothing to judge by: the only bound is then `max_stall`."""
    own = history.get(cluster, ())
    seconds = own if len(own) >= LEAST_ARRIVALS else tuple(s for other in history.values() for s in other)
    if len(seconds) < LEAST_ARRIVALS:
        return math.inf
    middle = median(seconds)
    spread = max(median(abs(s - middle) for s in seconds), LEAST_SPREAD * middle)
    return middle + SPREADS * spread


def deadline(
    missing: Mapping[str, Pulse | None],
    *,
    opened: float,
    arrivals: Sequence[float],
    quorum: int,
    history: Mapping[str, Sequence[float]],
    max_stall: float,
    progress: Mapping[str, Progress],
) -> float | None:
    """When a round stops waiting for `missing` clusters (with when each was last heard), None while nobody waits.

    `arrivals`: times of the deltas that are there. `progress`: of the clusters that told of this very round. Who trains
    is waited for while it gets on, if at its pace it can be here within `max_stall` of the first arrival; anyone else
    until it is later than its own measured arrivals explain and its delta does not move; nobody who has fallen silent.
    At the deadline the round commits if it has its quorum and pauses the run if not. Without a quorum the whole
    `max_stall` is granted."""
    if not arrivals:
        return None
    patience = min(arrivals) + max_stall
    if len(arrivals) < quorum:
        return patience
    waits = (
        min(
            _late(opened + latest_arrival(cluster, history), progress.get(cluster), opened, patience),
            math.inf if pulse is None else _silent(pulse, opened),
        )
        for cluster, pulse in missing.items()
    )
    return min(patience, max(*arrivals, *waits, 0.0))


def _silent(pulse: Pulse, opened: float) -> float:
    return max(pulse.silent_at, pulse.last + PATIENT * (pulse.last - opened))


def _late(ordinary: float, progress: Progress | None, opened: float, patience: float) -> float:
    """From when on a cluster that lives is not worth waiting for. `ordinary`: the end of its ordinary arrivals."""
    if progress is None:
        return ordinary
    if not progress.training:
        return max(ordinary, _silent(progress.pulse, opened))
    return _silent(progress.pulse, opened) if progress.trained_at <= patience else 0.0
