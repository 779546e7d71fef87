"""Whom a round waits for, and until when. Pure functions of what was measured; times are monotonic seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

BEAT_SECONDS = 2.0
"""How often an agent says that it lives."""

LEAST_SILENCE = 4 * BEAT_SECONDS
"""Fewer seconds without a word are never taken for a failure: a cut this short costs nobody a round."""

SPREADS = 6.0
"""How many spreads (median absolute deviations, or mean ones) beyond the middle are still ordinary."""

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


def latest_arrival(cluster: str, history: Mapping[str, Sequence[float]]) -> float:
    """Seconds after a round opens at which a cluster's delta is no longer explained by measured arrivals: median +
    k·MAD of its own `history` (opening → arrival, recent rounds), of everyone's until it has one. Infinite while there
    is nothing to judge by: the only bound is then `max_stall`."""
    own = history.get(cluster, ())
    seconds = own if len(own) >= LEAST_ARRIVALS else tuple(s for other in history.values() for s in other)
    if len(seconds) < LEAST_ARRIVALS:
        return float("inf")
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
) -> float | None:
    """When a round stops waiting for `missing` clusters (with when each was last heard), None while nobody waits.

    `arrivals`: times of the deltas that are there. Each missing cluster is waited for until it is later than its own
    measured arrivals explain, or has fallen silent, whichever comes first; all of them no longer than `max_stall` after
    the first arrival. At the deadline the round commits if it has its quorum and pauses the run if not. Without a
    quorum the whole `max_stall` is granted."""
    if not arrivals:
        return None
    patience = min(arrivals) + max_stall
    if len(arrivals) < quorum:
        return patience
    waits = [_until(cluster, pulse, opened, history) for cluster, pulse in missing.items()]
    return min(patience, max(max(arrivals), *waits, 0.0))


def _until(cluster: str, pulse: Pulse | None, opened: float, history: Mapping[str, Sequence[float]]) -> float:
    late = opened + latest_arrival(cluster, history)
    return late if pulse is None else min(late, pulse.silent_at)
