"""One cluster's link to the coordinator, the weather on it, and what that does to a call."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

from google.protobuf.message import Message

from nebula.proto.v1.packet_pb2 import Frame
from nebula.proto.v1.run_pb2 import JoinRequest, JoinResponse
from nebula.sim.world.schedule import Scheduler
from nebula.wan.link import Direction

M = TypeVar("M", bound=Message)

HANDSHAKE_BYTES = 2048
"""What an offer, or the answer to one, counts for. Its ECDSA signatures and certificates differ by a few bytes from one
PKI to the next, and a seed must mean the same with each."""

CHANCES = ("refuse", "lose_request", "lose_answer", "cut", "repeat", "swap", "flip")

MOST_FRAMES_BEFORE_A_CUT = 3
REPEAT_WITHIN = 60.0
"""Seconds."""


@dataclass
class Fate:
    """What is to happen to one call. `frames`: so many cross before its connection breaks. `again`: in so many seconds
    it is delivered once more. `flip`: the direction, and which of its messages."""

    refused: bool
    lost: dict[Direction, bool]
    frames: float
    again: float | None
    swap: Direction | None
    flip: tuple[Direction, int] | None


@dataclass(eq=False)
class SimLink:
    """`rate` in bytes per second each way, `rtt` and `jitter` (the most that one way may take longer) in seconds. `up`
    and `down` say whether a direction works; one that does not swallows what is sent. The rest are probabilities, for
    each call:

    refuse        UNAVAILABLE at once
    lose_request  nothing of it gets to the coordinator
    lose_answer   nothing of the answer gets back
    cut           the connection breaks after 0 to 3 messages in either direction, if there are that many
    repeat        within a minute, what was sent is delivered once more
    swap          the first two messages of one direction come in the wrong order, if there are two
    flip          in one direction, a bit is flipped in the ciphertext of the first or second message, if there is one

    `up_bytes`, `down_bytes`: what got to the coordinator and to the cluster, over all lives of its agent."""

    cluster: str
    scheduler: Scheduler
    rng: random.Random
    rate: float = 1e7
    rtt: float = 0.05
    jitter: float = 0.0
    up: bool = True
    down: bool = True
    refuse: float = 0.0
    lose_request: float = 0.0
    lose_answer: float = 0.0
    cut: float = 0.0
    repeat: float = 0.0
    swap: float = 0.0
    flip: float = 0.0
    up_bytes: int = 0
    down_bytes: int = 0
    _free: dict[Direction, float] = field(default_factory=lambda: {"up": 0.0, "down": 0.0})

    def storm(self, chances: Mapping[str, float]) -> None:
        """Set probabilities by name."""
        for chance in CHANCES:
            setattr(self, chance, chances[chance])

    def partition(self, *, up: bool, down: bool) -> None:
        self.up, self.down = up, down

    def works(self, direction: Direction) -> bool:
        return self.up if direction == "up" else self.down

    def leaves(self, direction: Direction, size: int) -> float:
        """When the last of `size` bytes that are sent now has left, behind all that was sent before."""
        self._free[direction] = max(self.scheduler.now, self._free[direction]) + size / self.rate
        return self._free[direction]

    def travel(self) -> float:
        """Seconds from one end to the other."""
        return self.rtt / 2 + self.jitter * self.rng.random()

    def fate(self) -> Fate:
        """Of the next call. In any weather the same numbers are drawn for it."""
        rng = self.rng
        frames, again, victim = (
            rng.randint(0, MOST_FRAMES_BEFORE_A_CUT),
            rng.uniform(0, REPEAT_WITHIN),
            rng.randrange(2),
        )
        swap, flip = rng.choice(_DIRECTIONS), rng.choice(_DIRECTIONS)
        return Fate(
            refused=rng.random() < self.refuse,
            lost={"up": rng.random() < self.lose_request, "down": rng.random() < self.lose_answer},
            frames=frames if rng.random() < self.cut else math.inf,
            again=again if rng.random() < self.repeat else None,
            swap=swap if rng.random() < self.swap else None,
            flip=(flip, victim) if rng.random() < self.flip else None,
        )


_DIRECTIONS: tuple[Direction, Direction] = ("up", "down")


class Lane(Generic[M]):
    """One direction of one call. What is sent arrives in order (unless fate swaps it), each message with its last byte.
    `cut` is called when the connection breaks."""

    def __init__(
        self, link: SimLink, direction: Direction, fate: Fate, deliver: Callable[[M], None], cut: Callable[[], None]
    ) -> None:
        self._link, self._direction, self._fate = link, direction, fate
        self._deliver, self._cut = deliver, cut
        self._sent = 0
        self._held: M | None = None
        self._coming: deque[Callable[[], None]] = deque()

    def send(self, message: M) -> float | None:
        """When it has left; None if nothing moves any more."""
        if self._fate.flip == (self._direction, self._sent):
            message = flipped(message, self._link.rng)
        self._sent += 1
        if self._fate.swap == self._direction and self._sent == 1:
            self._held = message
            return self._link.scheduler.now
        left = self._carry(message)
        self._release()
        return left

    def end(self, act: Callable[[], None]) -> bool:
        """`act` when the other end hears that nothing more comes. False if it never does."""
        self._release()
        if self._stuck():
            return False
        self._arrives(self._link.scheduler.now, act)
        return True

    def _release(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            self._carry(held)

    def _carry(self, message: M) -> float | None:
        if not self._stuck() and self._fate.frames == 0:
            self._cut()
        if self._stuck():
            return None
        self._fate.frames -= 1
        left = self._link.leaves(self._direction, size_of(message))
        self._arrives(left, partial(self._deliver, message))
        return left

    def _stuck(self) -> bool:
        """TCP keeps the order: behind what was lost, nothing of the call gets through."""
        if not self._link.works(self._direction):
            self._fate.lost[self._direction] = True
        return self._fate.lost[self._direction]

    def _arrives(self, left: float, act: Callable[[], None]) -> None:
        self._coming.append(act)  # whatever the jitter, it arrives in order
        self._link.scheduler.at(left + self._link.travel(), lambda: self._coming.popleft()())


def size_of(message: Message) -> int:
    """Bytes on the wire. Only TLS and HTTP/2 are left out."""
    match message:
        case JoinRequest():
            return HANDSHAKE_BYTES
        case JoinResponse():
            return HANDSHAKE_BYTES + sum(frame.ByteSize() for frame in message.welcome)
        case _:
            return message.ByteSize()


def flipped(message: M, rng: random.Random) -> M:
    """A copy with one bit of its ciphertext flipped, if there is any."""
    copy = type(message)()
    copy.CopyFrom(message)
    match copy:
        case Frame():
            _flip(copy, rng)
        case JoinResponse():
            _flip(copy.welcome[0], rng)
    return copy


def _flip(frame: Frame, rng: random.Random) -> None:
    ciphertext = bytearray(frame.ciphertext)
    ciphertext[rng.randrange(len(ciphertext))] ^= 1 << rng.randrange(8)
    frame.ciphertext = bytes(ciphertext)
