"""A wide-area path for whole packets, between two network namespaces of one Linux machine.

The relay of `wan` ends TCP on both of its sides; here TCP runs from end to end, and its congestion control meets rate,
delay, jitter, loss, reordering and a queue of finite length. It needs root: two TUN devices, one in each namespace,
with this program between them.

    ns A ─ wan (10.78.0.1) ─ tun ─► [queue · rate · loss · delay] ─► tun ─ wan (10.78.0.2) ─ ns B        and back
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection

from nebula.config import Link
from nebula.errors import PreflightError
from nebula.sim.line import Shape

ENDS = "10.78.0.1", "10.78.0.2"
"""Addresses of the two ends, in their namespaces."""
DEVICE = "wan"
QUEUE_S = 0.1
"""A path queues what it carries in so many seconds, or a bandwidth-delay product, and drops what comes beyond."""
LEAST_QUEUE = 1 << 18
BURST = 64
"""Packets read at once from one end, so that neither waits for the other."""

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x1, 0x1000


@dataclass
class Way:
    """One direction. `reorder`: the share of packets that are overtaken, by what comes within `late` seconds."""

    shape: Shape
    rng: random.Random
    reorder: float = 0.0
    late: float = 0.005
    dropped: int = 0
    passed: int = 0
    _free: float = 0.0
    _last: float = 0.0
    _under_way: list[tuple[float, int, bytes]] = field(default_factory=list)

    @property
    def limit(self) -> float:
        """Of the queue, in seconds until its last packet leaves."""
        return max(QUEUE_S, self.shape.rtt, LEAST_QUEUE / self.shape.rate)

    def take(self, now: float, packet: bytes) -> None:
        """Send it, or drop it: by chance, or because the queue is full."""
        if self.rng.random() < self.shape.loss or self._free - now > self.limit:
            self.dropped += 1
            return
        self._free = max(now, self._free) + len(packet) / self.shape.rate
        arrival = self._free + self.shape.rtt / 2 + self.rng.random() * self.shape.jitter
        if self.rng.random() < self.reorder:
            arrival += self.late
        else:
            self._last = arrival = max(arrival, self._last)
        self.passed += 1
        heapq.heappush(self._under_way, (arrival, self.passed, packet))

    def next(self) -> float | None:
        """When the next packet arrives."""
        return self._under_way[0][0] if self._under_way else None

    def due(self, now: float) -> Iterator[bytes]:
        while self._under_way and self._under_way[0][0] <= now:
            yield heapq.heappop(self._under_way)[2]


@contextmanager
def path(near: str, far: str, link: Link, *, mtu: int = 1500, reorder: float = 0.0, seed: int = 0) -> Iterator[None]:
    """A path between two network namespaces that exist, for as long as the context lasts. Raises PreflightError where
    TUN devices cannot be had."""
    descriptors = [_device(f"wan{os.getpid()}{i}", end, ENDS[i], mtu) for i, end in enumerate((near, far))]
    here, there = get_context("fork").Pipe()
    ways = [Way(Shape.of(link), random.Random(f"{seed}/{way}"), reorder) for way in range(2)]
    carrier = get_context("fork").Process(target=_carry, args=(descriptors, ways, there))
    carrier.start()
    try:
        yield
    finally:
        here.send(None)
        carrier.join()
        for descriptor in descriptors:
            os.close(descriptor)


def _carry(descriptors: list[int], ways: list[Way], told: Connection) -> None:
    """Until it is told to end."""
    poll = select.poll()
    for descriptor in (*descriptors, told.fileno()):
        poll.register(descriptor, select.POLLIN)
    ends = dict(zip(descriptors, ways, strict=True))
    outs = dict(zip(descriptors, reversed(descriptors), strict=True))
    while True:
        arrivals = [at for way in ways if (at := way.next()) is not None]
        wait = max(min(arrivals) - time.monotonic(), 0.0) * 1e3 if arrivals else None
        for ready, _ in poll.poll(wait):
            if ready == told.fileno():
                return
            _read(ready, ends[ready].take)
        for descriptor, way in ends.items():
            for packet in way.due(time.monotonic()):
                try:
                    os.write(outs[descriptor], packet)
                except BlockingIOError:  # the other end does not read as fast as it receives
                    way.dropped += 1


def _read(descriptor: int, take: Callable[[float, bytes], None]) -> None:
    now = time.monotonic()
    for _ in range(BURST):
        try:
            take(now, os.read(descriptor, 65536))
        except BlockingIOError:
            return


def _device(name: str, namespace: str, address: str, mtu: int) -> int:
    """A TUN device, which goes away with its descriptor."""
    try:
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    except OSError as error:
        raise PreflightError(
            f"a TUN device cannot be had: {error.strerror}", hint="run as root, on Linux, with /dev/net/tun"
        ) from error
    _ip("link", "set", name, "netns", namespace)
    for command in (
        ("link", "set", name, "name", DEVICE, "mtu", str(mtu), "txqueuelen", "1000"),
        ("address", "add", f"{address}/24", "dev", DEVICE),
        ("link", "set", DEVICE, "up"),
    ):
        _ip("-n", namespace, *command)
    return descriptor


def _ip(*arguments: str) -> None:
    done = subprocess.run(("ip", *arguments), capture_output=True, text=True)
    if done.returncode != 0:
        raise PreflightError(f"ip {' '.join(arguments)}: {done.stderr.strip()}", hint="run as root, with iproute2")
