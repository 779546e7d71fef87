"""A wide-area link in user space: a TCP relay that gives a path between two local sockets a rate, a delay and losses.

It needs no privileges and no kernel support. What it is not: the relay ends TCP on both of its sides, so congestion
control is never exercised; a lost segment costs the head-of-line stall of its retransmission and nothing else. Opening
a connection costs no round trip (the kernel accepts at once); everything sent over it does.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, Literal, ParamSpec, TypeAlias, TypeVar

from nebula.config import Link
from nebula.errors import PreflightError
from nebula.sim.line import Line, Shape
from nebula.sim.pipe import End, Pipe

__all__ = ["Direction", "Line", "Relay", "Shape", "Target", "Traffic", "running"]

Direction: TypeAlias = Literal["up", "down"]
"""Up: from whoever connects to the relay towards its target."""

Target: TypeAlias = tuple[str, int]
"""Host and port."""

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a relay has forwarded (bytes above TCP) and how many connections it has accepted."""

    up_bytes: int
    down_bytes: int
    connections: int


def _on_loop(method: Callable[Concatenate[Relay, P], T]) -> Callable[Concatenate[Relay, P], T]:
    """Run a method of a started relay inside its event loop, whichever thread calls it, and wait for it."""

    @wraps(method)
    def call(self: Relay, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if threading.get_ident() == self._thread:
            return method(self, *args, **kwargs)
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(method(self, *args, **kwargs))
            except Exception as error:
                done.set_exception(error)

        self._loop.call_soon_threadsafe(run)
        return done.result()

    return call


class Relay:
    """Forwards every connection made to (`host`, `port`) to `target` across one emulated link; port 0 takes a free one.

    The target may come and go: a connection it refuses is closed, the next one is tried again. Buffers are bounded
    (`Shape.window` per connection and direction), then the relay stops reading. Once started, every method but `start`
    and `close` may be called from any thread, and has taken effect when it returns.
    """

    def __init__(
        self, link: Link, target: Target, *, host: str = "127.0.0.1", port: int = 0, seed: int | str = 0
    ) -> None:
        self._shape = Shape.of(link)
        self._target = target
        self._address = (host, port)
        self._seed = seed
        self._connections = 0
        self._light = asyncio.Event()
        self._ends: set[End] = set()
        self._joining: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen; `port` tells where. Raises PreflightError when the address cannot be had."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._up = Pipe(self._shape, random.Random(f"{self._seed}/up"), self._loop)
        self._down = Pipe(self._shape, random.Random(f"{self._seed}/down"), self._loop)
        self._light.set()
        host, port = self._address
        try:
            self._server = await self._loop.create_server(self._accept, host, port)
        except OSError as error:
            raise PreflightError(
                f"the emulated link cannot listen on {host}:{port}: {error.strerror}",
                hint="choose another port, or 0 for any free one",
            ) from error
        self.port: int = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Stop listening and end every connection."""
        self._server.close()
        for task in self._joining:
            task.cancel()
        await asyncio.gather(*self._joining, return_exceptions=True)
        while self._ends:  # an end leaves when the loop tells it that its socket is gone
            self.cut()
            await asyncio.sleep(0)
        await self._server.wait_closed()

    @property
    def traffic(self) -> Traffic:
        return Traffic(self._up.forwarded, self._down.forwarded, self._connections)

    @_on_loop
    def cut(self) -> None:
        """End every connection now; what is under way is lost. New connections work."""
        for end in self._ends:
            end.transport.abort()

    @_on_loop
    def pause(self) -> None:
        """Become a black hole: forward nothing, take up no new connection (the kernel still completes handshakes)."""
        self._light.clear()
        self._up.hold(True)
        self._down.hold(True)

    @_on_loop
    def resume(self) -> None:
        """End `pause`. What was under way arrives now."""
        self._light.set()
        self._up.hold(False)
        self._down.hold(False)

    @_on_loop
    def corrupt(self, direction: Direction, at_byte: int) -> None:
        """Flip one bit of the byte that is forwarded after `at_byte` others, counted from now over all connections."""
        self._pipe(direction).flip(at_byte)

    @_on_loop
    def record(self, limit: int) -> None:
        """Keep the first `limit` bytes forwarded in each direction from now on, as they came in."""
        self._up.record(limit)
        self._down.record(limit)

    @_on_loop
    def recorded(self, direction: Direction) -> bytes:
        """What `record` has kept so far."""
        return bytes(self._pipe(direction).seen)

    def _pipe(self, direction: Direction) -> Pipe:
        return self._up if direction == "up" else self._down

    def _accept(self) -> End:
        return End(self._up, self._accepted, self._ends.discard)

    def _accepted(self, client: End) -> None:
        self._connections += 1
        self._ends.add(client)
        task = self._loop.create_task(self._join(client))
        self._joining.add(task)
        task.add_done_callback(self._joining.discard)

    async def _join(self, client: End) -> None:
        """Give an accepted connection its other half."""
        await self._light.wait()
        server = End(self._down, self._ends.add, self._ends.discard)
        client.peer, server.peer = server, client
        try:
            await self._loop.create_connection(lambda: server, *self._target)
        except OSError:  # nobody there: the client learns it by a close, as from a proxy without a backend
            client.transport.close()
            return
        if client.transport.is_closing():
            server.transport.abort()
        client.throttle()


@contextmanager
def running(links: Mapping[str, tuple[Link, Target]], *, seed: int = 0) -> Iterator[dict[str, Relay]]:
    """Relays for a synchronous program, all in one background thread for as long as the context lasts.

    Each listens on a free port of 127.0.0.1 (`relays[name].port`). Raises PreflightError when none can be had.
    """
    relays = {name: Relay(link, target, seed=f"{seed}/{name}") for name, (link, target) in links.items()}
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="nebula-links")

    def complete(step: Callable[[], Coroutine[None, None, None]]) -> None:
        asyncio.run_coroutine_threadsafe(step(), loop).result()

    thread.start()
    with ExitStack() as stack:
        stack.callback(loop.close)
        stack.callback(thread.join)
        stack.callback(loop.call_soon_threadsafe, loop.stop)
        stack.callback(complete, loop.shutdown_default_executor)
        for relay in relays.values():
            complete(relay.start)
            stack.callback(complete, relay.close)
        yield relays
