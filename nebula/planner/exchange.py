"""What a round's exchange will cost: bytes, seconds and stall, from facts about clusters and a few measured speeds.

A cluster trains, encodes, sends, waits for the others and the merge, and takes the update; the slowest one sets the
pace. All times in seconds, sizes in bytes, rates in bytes per second of payload each way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nebula.wan.link import SEGMENT

OVERHEAD = 1.003
"""Frames, tags, HTTP/2 and TLS: bytes that cross for each byte of payload."""
KEPT = 5e-8
"""Seconds per parameter in which a coordinator sums, hashes and stores: three fp32 arrays, fsync included. Of the
machine this was written on; a slower disk takes longer."""
APPLIED = 1e-8
"""Seconds per parameter in which a rank takes an update over."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a codec: `bits` that cross per parameter, and seconds per parameter of one core. `encode` and `decode`."""

    bits: float
    encode: float
    decode: float


@dataclass(frozen=True, slots=True)
class Site:
    """A cluster and its link. `step`: seconds of one inner step; `share`: of the parameters that the slowest rank
    encodes by itself, and `lanes`: connections among which the link's losses are spread."""

    rate: float
    rtt: float
    loss: float
    step: float
    share: float = 1.0
    lanes: int = 4

    def carry(self, payload: float) -> float:
        """From the first byte that leaves to the last one that arrives."""
        segments = payload * OVERHEAD / SEGMENT
        return payload * OVERHEAD / self.rate + self.rtt / 2 + segments * self.loss * self.rtt / self.lanes


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of one cluster's round. `wait`: for the others, the merge, and messages on their way."""

    up_bytes: float
    down_bytes: float
    compute: float
    encode: float
    up: float
    wait: float
    down: float
    decode: float

    @property
    def round(self) -> float:
        return self.compute + self.stall

    @property
    def stall(self) -> float:
        """In which its devices wait."""
        return self.encode + self.up + self.wait + self.down + self.decode

    @property
    def stall_share(self) -> float:
        return self.stall / self.round


def forecast(sites: Mapping[str, Site], parameters: int, inner_steps: int, up: Cost, down: Cost) -> dict[str, Forecast]:
    """By cluster, for an exchange that blocks: nobody trains while a round's deltas travel."""
    sent, got = parameters * up.bits / 8, parameters * down.bits / 8
    ready = {
        name: inner_steps * site.step + site.share * parameters * up.encode + site.carry(sent)
        for name, site in sites.items()
    }
    # The last delta is checked when it comes; then all are decoded and summed, and the update is encoded and decoded.
    merge = parameters * ((1 + len(sites)) * up.decode + down.encode + down.decode + KEPT)
    merged = max(ready.values()) + merge
    found = {}
    for name, site in sites.items():
        asked = ready[name] + site.rtt  # its receipt comes back, and its question for the update goes out
        start = max(merged, asked)
        found[name] = Forecast(
            up_bytes=sent * OVERHEAD,
            down_bytes=got * OVERHEAD,
            compute=inner_steps * site.step,
            encode=site.share * parameters * up.encode,
            up=site.carry(sent),
            wait=start - ready[name] + site.rtt,  # and the next plan is a question and an answer
            down=site.carry(got),
            decode=parameters * (down.decode + APPLIED),
        )
    return found


def step_for(forecast: Forecast, inner_steps: int, share: float) -> float:
    """Seconds that an inner step would have to take for this exchange to stall a cluster for `share` of its time."""
    return forecast.stall * (1 - share) / share / inner_steps
