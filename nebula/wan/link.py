"""What this process knows of its link to a peer: bytes that crossed, round trip, goodput. Measured, never guessed."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import stat
import struct
import threading
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Literal, TypeAlias

from nebula.errors import UnreachableError

Direction: TypeAlias = Literal["up", "down"]
"""Up: away from this process."""

SEGMENT = 1460
"""Bytes of payload in one full TCP segment over Ethernet."""

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

# Offsets into `struct tcp_info`, Linux 4.19 and later (include/uapi/linux/tcp.h).
_TOTAL_RETRANS = struct.Struct("=100xI")
_BYTES_RECEIVED = struct.Struct("=128xQ")
_BYTES_SENT = struct.Struct("=200xQ")


@dataclass(frozen=True, slots=True)
class Wire:
    """Bytes above TCP (TLS and HTTP/2 included, what was sent again counted again), and segments sent again.

    Over the life of every connection that a sample has seen. Where the system does not tell, `available` is False and
    all else 0.
    """

    up_bytes: int
    down_bytes: int
    retransmits: int
    available: bool


class WireMeter:
    """Counts what crosses this process's TCP sockets to one peer, whoever opened them, by asking the kernel. A socket
    that it sees for the first time sends by BBR from then on, where the system has that.

    A closed socket counts with its last sample, so sample after every transfer. Raises UnreachableError when `host`
    does not resolve.
    """

    def __init__(self, host: str, port: int) -> None:
        self._peers = {(address, port) for address in _resolve(host)}
        self._available = _probe()
        self._readings: dict[int, tuple[int, int, int]] = {}
        self._lock = threading.Lock()

    def sample(self) -> Wire:
        """Read all counters. Costs a system call per open file and a few per socket."""
        if not self._available:
            return Wire(0, 0, 0, available=False)
        with self._lock:
            for descriptor in os.listdir("/proc/self/fd"):
                self._read(int(descriptor))
            up, down, again = (sum(column) for column in zip((0, 0, 0), *self._readings.values(), strict=True))
            return Wire(up, down, again, available=True)

    def _read(self, descriptor: int) -> None:
        """Take a reading if the descriptor is a connection to the peer."""
        connection = _duplicate(descriptor)
        if connection is None:
            return
        with connection:
            if connection.type != socket.SOCK_STREAM or connection.family not in (socket.AF_INET, socket.AF_INET6):
                return
            try:
                host, port = connection.getpeername()[:2]
                if (_address(host), port) in self._peers:
                    inode = os.fstat(connection.fileno()).st_ino
                    if inode not in self._readings:
                        prefer_bbr(connection)
                    self._readings[inode] = _counters(connection)
            except OSError:  # not connected, or no longer: the last reading stands
                return


def prefer_bbr(connection: socket.socket) -> None:
    """Send at the rate that the path was measured to carry (Cardwell et al. 2016, "BBR: congestion-based congestion
    control"), not at one that is cut at every loss: far away, one segment lost in a thousand leaves the common
    algorithms a few percent of a fast link. A system that lacks it goes on as it does. A listening socket hands it
    down to its connections."""
    with contextlib.suppress(OSError, AttributeError):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"bbr")


def congestion(connection: socket.socket) -> str:
    """The name of its congestion control; empty where the system does not tell."""
    try:
        return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).split(b"\0")[0].decode()
    except (OSError, AttributeError):
        return ""


def listeners_prefer_bbr(port: int) -> None:
    """For the sockets on which this process listens at a port, whoever opened them."""
    for descriptor in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        if (listener := _duplicate(int(descriptor))) is not None:
            with listener, contextlib.suppress(OSError):
                if listener.type == socket.SOCK_STREAM and listener.getsockname()[1:2] == (port,):
                    prefer_bbr(listener)


def _duplicate(descriptor: int) -> socket.socket | None:
    """A second handle on somebody's socket, to be closed; None for other files and for what was closed meanwhile."""
    try:
        # Files are left alone: closing a duplicate of one would drop this process's POSIX locks on it.
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return None
        duplicate = os.dup(descriptor)
    except OSError:
        return None
    try:
        return socket.socket(fileno=duplicate)
    except OSError:
        os.close(duplicate)
        return None


def _counters(connection: socket.socket) -> tuple[int, int, int]:
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    return (
        _BYTES_SENT.unpack_from(info)[0],
        _BYTES_RECEIVED.unpack_from(info)[0],
        _TOTAL_RETRANS.unpack_from(info)[0],
    )


def _probe() -> bool:
    """Whether this system has /proc and a `struct tcp_info` that reaches as far as we read."""
    if not hasattr(socket, "TCP_INFO") or not os.path.isdir("/proc/self/fd"):
        return False
    with socket.socket() as unused:
        try:
            return len(unused.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)) >= _BYTES_SENT.size
        except OSError:
            return False


def _resolve(host: str) -> set[Address]:
    try:
        return {_address(str(entry[4][0])) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError as error:
        raise UnreachableError(
            f"the name {host!r} does not resolve: {error.strerror}",
            hint="check coordinator.host in the cluster file and this machine's DNS",
        ) from error


def _address(text: str) -> Address:
    """An IPv4 address looks the same however it is written: dual-stack sockets name it ::ffff:a.b.c.d."""
    address = ipaddress.ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped if mapped is not None else address


@dataclass(frozen=True, slots=True)
class LinkStats:
    """`rtt_s` seconds, goodput in payload bits per second; 0 where nothing was measured yet."""

    rtt_s: float
    goodput_up_bps: float
    goodput_down_bps: float
    transfers: int


class _Goodput:
    """A moving average over running medians: one odd transfer leaves no trace, a lasting change shows after three."""

    WINDOW = 5
    WEIGHT = 0.3

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=self.WINDOW)
        self.bps = 0.0

    def observe(self, bps: float) -> None:
        first = not self._recent
        self._recent.append(bps)
        middle = median(self._recent)
        self.bps = middle if first else self.bps + self.WEIGHT * (middle - self.bps)


class LinkMonitor:
    """Estimates a link from what is measured on it anyway. Thread-safe; keeps no clock of its own.

    The round trip is the smallest of the last 64: every other one also waited in a queue, and a window lets it grow
    again when the route changes.
    """

    RTT_WINDOW = 64

    def __init__(self) -> None:
        self._rtts: deque[float] = deque(maxlen=self.RTT_WINDOW)
        self._goodput: dict[Direction, _Goodput] = {"up": _Goodput(), "down": _Goodput()}
        self._transfers = 0
        self._lock = threading.Lock()

    def observe_rtt(self, seconds: float) -> None:
        """One round trip of a small call, seconds."""
        with self._lock:
            self._rtts.append(seconds)

    def observe_transfer(self, direction: Direction, size: int, seconds: float) -> None:
        """`size` payload bytes took `seconds`. For payloads: a small call tells of the round trip only, and one too
        quick for the clock tells nothing."""
        if size < 0 or seconds < 0:
            raise ValueError(f"a transfer has bytes and takes time, not {size} bytes in {seconds} s")
        if seconds == 0:
            return
        with self._lock:
            self._goodput[direction].observe(8 * size / seconds)
            self._transfers += 1

    def stats(self) -> LinkStats:
        with self._lock:
            return LinkStats(
                rtt_s=min(self._rtts, default=0.0),
                goodput_up_bps=self._goodput["up"].bps,
                goodput_down_bps=self._goodput["down"].bps,
                transfers=self._transfers,
            )
