"""The arithmetic of one wide-area link, on whatever clock its caller keeps. No sockets, no time of its own."""

from __future__ import annotations

import random
from dataclasses import dataclass

from nebula.config import Link
from nebula.wan.link import SEGMENT

_GRAIN_S = 0.005
_LARGEST_GRAIN = 64 * 1024


@dataclass(frozen=True, slots=True)
class Shape:
    """A link in base units: `rate` in bytes per second each way, `rtt` in seconds, `loss` per segment, `jitter` the
    most seconds that one way may take longer."""

    rate: float
    rtt: float
    loss: float
    jitter: float = 0.0

    @classmethod
    def of(cls, link: Link) -> Shape:
        rate, rtt, jitter = link.rate_mbps * 1e6 / 8, link.rtt_ms / 1e3, link.jitter_ms / 1e3
        return cls(rate, rtt, link.loss, jitter)

    @property
    def grain(self) -> int:
        """Most bytes delivered as one: what the line carries in 5 ms, so that its rate is smooth at a low CPU cost."""
        return int(min(_LARGEST_GRAIN, max(SEGMENT, self.rate * _GRAIN_S)))

    @property
    def window(self) -> int:
        """Bytes one connection may have under way in one direction: the bandwidth-delay product and some grains."""
        return int(self.rate * (self.rtt + self.jitter)) + 4 * self.grain


class Line:
    """One direction of a link: a FIFO that all its connections share."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        self._shape = shape
        self._rng = rng
        self._free = 0.0
        self._last = 0.0

    def send(self, now: float, size: int) -> float:
        """When the last of `size` bytes handed over at `now` arrives, in seconds on the clock of `now`.

        They leave after all that was sent before them, at the link's rate, and travel for half a round trip. A lost
        segment arrives one round trip late for every time it is lost, and nothing behind it is delivered before it.
        """
        self._free = max(now, self._free) + size / self._shape.rate
        wait = self._rng.random() * self._shape.jitter if self._shape.jitter else 0.0
        arrival = self._free + self._shape.rtt / 2 + wait + self._shape.rtt * self._losses(size)
        self._last = max(self._last, arrival)
        return self._last

    def _losses(self, size: int) -> int:
        """How often the unluckiest of these segments is lost: its retransmissions may be lost too."""
        if not self._shape.loss:
            return 0
        worst = 0
        for _ in range(-(-size // SEGMENT)):
            losses = 0
            while self._rng.random() < self._shape.loss:
                losses += 1
            worst = max(worst, losses)
        return worst
