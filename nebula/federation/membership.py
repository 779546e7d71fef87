"""Whom a round waits for, and until when. Pure functions of what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

SPREADS = 6.0
"""How many median absolute deviations beyond the median an arrival may lie and still be ordinary."""

LEAST_SPREAD = 0.25
"""Few or near-equal samples understate the spread; it is taken as at least this share of the median."""


def latest_arrival(seconds: Sequence[float], *, clusters: int) -> float:
    """Seconds after a round opens at which a missing delta is no longer explained by measured arrivals:
    median + k·MAD of `seconds` (opening → arrival, recent rounds). With less than two rounds of `clusters` arrivals
    there is nothing to judge by, and the only bound is `max_stall`, which the caller adds to the first arrival."""
    if len(seconds) < 2 * clusters:
        return float("inf")
    middle = median(seconds)
    spread = max(median(abs(s - middle) for s in seconds), LEAST_SPREAD * middle)
    return middle + SPREADS * spread


def deadline(
    *, opened: float, arrivals: Sequence[float], quorum: int, history: Sequence[float], clusters: int, max_stall: float
) -> float | None:
    """Monotonic time at which a round stops waiting for missing clusters, None while nobody waits.

    `arrivals`: monotonic times of the deltas that are there. At the deadline the round commits if it has its quorum and
    pauses the run if not. Without a quorum the whole `max_stall` is granted."""
    if not arrivals:
        return None
    patience = min(arrivals) + max_stall
    if len(arrivals) < quorum:
        return patience
    return min(patience, max(max(arrivals), opened + latest_arrival(history, clusters=clusters)))
