"""The two halves of a relayed connection: the pipe, where chunks wait for the line, and the ends, which are sockets."""

from __future__ import annotations

import asyncio
import random
import socket
from collections import deque
from collections.abc import Callable
from typing import cast

from nebula.sim.line import Line, Shape

_RECEIVE_BUFFER = 64 * 1024


class Pipe:
    """One direction of a relay, shared by its connections. One timer, whatever waits."""

    def __init__(self, shape: Shape, rng: random.Random, loop: asyncio.AbstractEventLoop) -> None:
        self.shape = shape
        self._held = False
        self.forwarded = 0
        self.seen = bytearray()
        self._line = Line(shape, rng)
        self._loop = loop
        self._waiting: deque[tuple[float, End, bytes]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._flips: set[int] = set()
        self._limit = 0

    def push(self, source: End, chunk: bytes) -> None:
        """Put a chunk on the line; an empty one says that no more will come."""
        self._waiting.append((self._line.send(self._loop.time(), len(chunk)), source, chunk))
        self._arm()

    def hold(self, held: bool) -> None:
        """Deliver nothing while held; what fell due meanwhile is delivered afterwards."""
        self._held = held
        if held and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._arm()

    def flip(self, at_byte: int) -> None:
        self._flips.add(self.forwarded + at_byte)

    def record(self, limit: int) -> None:
        self._limit = limit
        self.seen = bytearray()

    def inspect(self, chunk: bytes) -> bytes:
        """Count, record and, where asked to, damage a chunk that is being forwarded."""
        start, self.forwarded = self.forwarded, self.forwarded + len(chunk)
        self.seen += chunk[: max(0, self._limit - len(self.seen))]
        hits = {at for at in self._flips if at < self.forwarded}
        if not hits:
            return chunk
        self._flips -= hits
        damaged = bytearray(chunk)
        for at in hits:
            damaged[at - start] ^= 1
        return bytes(damaged)

    def _arm(self) -> None:
        if self._waiting and self._timer is None and not self._held:
            self._timer = self._loop.call_at(self._waiting[0][0], self._deliver)

    def _deliver(self) -> None:
        self._timer = None
        now = self._loop.time()
        while self._waiting and self._waiting[0][0] <= now:
            _, source, chunk = self._waiting.popleft()
            source.arrived(chunk)
        self._arm()


class End(asyncio.BufferedProtocol):
    """One socket of a connection: what it reads goes into `pipe` and comes out at `peer`, the other socket.

    `opened` and `lost` are told when the socket comes and goes.
    """

    def __init__(self, pipe: Pipe, opened: Callable[[End], None], lost: Callable[[End], None]) -> None:
        self.peer: End | None = None
        self._pipe = pipe
        self._opened = opened
        self._lost = lost
        self._buffer = bytearray(pipe.shape.grain)
        self._under_way = 0
        self._read_all = False
        self._passed_all = False
        self._transport: asyncio.Transport | None = None

    @property
    def transport(self) -> asyncio.Transport:
        assert self._transport is not None
        return self._transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        window = self._pipe.shape.window
        self._transport.set_write_buffer_limits(high=window // 2, low=window // 4)
        # By default the kernel would take megabytes off the sender's hands in front of the link.
        self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        self.throttle()
        self._opened(self)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._under_way += nbytes
        self._pipe.push(self, bytes(memoryview(self._buffer)[:nbytes]))
        self.throttle()

    def eof_received(self) -> bool:
        self._read_all = True
        self._pipe.push(self, b"")
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost(self)
        self._pipe.push(self, b"")

    def resume_writing(self) -> None:
        if self.peer is not None:
            self.peer.throttle()

    def throttle(self) -> None:
        """Read only while the peer is there and takes what is under way; this bounds the relay's memory."""
        if self._read_all:  # resuming would report the end of the stream a second time
            return
        out = self._out()
        backlog = self._under_way + (out.get_write_buffer_size() if out is not None else 0)
        if out is None or backlog >= self._pipe.shape.window:
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()

    def arrived(self, chunk: bytes) -> None:
        """Pass on a chunk of this end's that has crossed the line."""
        self._under_way -= len(chunk)
        out = self._out()
        if out is None or out.is_closing():
            return
        if chunk:
            out.write(self._pipe.inspect(chunk))
            self.throttle()
        elif self.transport.is_closing():
            out.close()
        else:
            self._pass_eof(out)

    def _out(self) -> asyncio.Transport | None:
        return self.peer._transport if self.peer is not None else None

    def _pass_eof(self, out: asyncio.Transport) -> None:
        """Half-close: the other direction stays open until it has ended as well."""
        self._passed_all = True
        try:
            out.write_eof()
        except OSError:  # reset from its far end, which an end that has read all does not hear of
            out.abort()
            return
        if self.peer is not None and self.peer._passed_all:
            out.close()
            self.transport.close()
