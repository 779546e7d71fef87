"""One call to the coordinator, from both ends. The caller's part runs in the caller's fiber, the handler in one of the
coordinator's; each knows of the other only what has crossed the link."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar

import grpc
from google.protobuf.message import Message

from nebula.federation.service import Service
from nebula.sim.world.link import Lane, SimLink, size_of
from nebula.sim.world.rpc import CANCELLED, OK, REFUSED, RESET, Aborted, CallError, Context, Status
from nebula.sim.world.schedule import Fiber, Process, Scheduler

T = TypeVar("T")

KEEPALIVE = 50.0
"""Seconds until an end gives up a connection from which nothing comes: `keepalive_time_ms` and `keepalive_timeout_ms`
of nebula.wan.transport.CHANNEL_OPTIONS."""


class Inbox(Generic[T]):
    """What has arrived and is not read yet. It has one reader."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._items: deque[T] = deque()
        self._reader: Fiber | None = None

    def put(self, item: T) -> None:
        self._items.append(item)
        if self._reader is not None:
            self._scheduler.wake(self._reader)

    def get(self, timeout: float | None) -> T | None:
        """None if nothing comes for `timeout` seconds."""
        if not self._items:
            self._reader = self._scheduler.running
            self._scheduler.park(timeout)
            self._reader = None
        return self._items.popleft() if self._items else None


Method: TypeAlias = Callable[[Service, Iterator[Any], Any], Iterator[Any]]
"""One of the service's, with the requests and a context."""


@dataclass(slots=True)
class Traffic:
    """Bytes that got from an agent to the coordinator, and from there to it."""

    up: int = 0
    down: int = 0


@dataclass(frozen=True, slots=True)
class Ends:
    """`service` and `server`: what is at the coordinator's address at the moment, and the process that it runs in."""

    caller: Process
    service: Callable[[], Service | None]
    server: Callable[[], Process | None]
    certificate: bytes
    traffic: Traffic

    def serving(self) -> tuple[Service, Process] | None:
        service, server = self.service(), self.server()
        return (service, server) if service is not None and server is not None and server.alive else None


class Call:
    """`timeout`: seconds without movement after which the caller gives up."""

    def __init__(self, link: SimLink, ends: Ends, method: Method, timeout: float) -> None:
        self._link, self._ends, self._method, self._timeout = link, ends, method, timeout
        self._scheduler = link.scheduler
        self._fate = link.fate()
        self._up: Lane[Message] = Lane(link, "up", self._fate, self._asked, self._cut)
        self._down: Lane[Message] = Lane(link, "down", self._fate, self._answered, self._cut)
        self._requests: Inbox[Message | Status] = Inbox(self._scheduler)
        self._answers: Inbox[Message | Status] = Inbox(self._scheduler)
        self._sent: list[Message] = []
        self._over = False  # what the caller has heard
        self._accepted = self._handled = self._cancelled = False

    # --- the caller -----------------------------------------------------------------------------------------------

    def run(self, requests: Iterator[Message]) -> Iterator[Any]:
        """Send all requests, yield the answers as they come. Raises CallError."""
        if self._fate.refused:
            raise CallError(REFUSED)
        if self._fate.again is not None:
            self._scheduler.at(self._scheduler.now + self._fate.again, self._repeat)
        try:
            self._send(requests)
            while (answer := self._next()) is not OK:
                if isinstance(answer, Status):
                    raise CallError(answer)
                yield answer
        finally:
            if not self._handled:
                self._disconnect()

    def _send(self, requests: Iterator[Message]) -> None:
        for message in requests:
            self._sent.append(message)
            left = self._up.send(message)
            if left is None:
                return
            self._ends.caller.clock.sleep(min(left - self._scheduler.now, self._timeout))
            if left > self._scheduler.now + self._timeout:
                raise CallError(self._silence())
            if self._over:
                return
        self._up.end(partial(self._asked, OK))

    def _next(self) -> Message | Status:
        answer = self._answers.get(self._timeout)
        return self._silence() if answer is None else answer

    def _silence(self) -> Status:
        return Status(grpc.StatusCode.DEADLINE_EXCEEDED, f"nothing moved for {self._timeout:g} s")

    def _answered(self, item: Message | Status) -> None:
        """The caller's machine gets something."""
        if isinstance(item, Status):
            self._over = True
        else:
            self._link.down_bytes += size_of(item)
            self._ends.traffic.down += size_of(item)
        self._answers.put(item)

    # --- in between -----------------------------------------------------------------------------------------------

    def _cut(self) -> None:
        """The connection breaks, and both ends will hear of it."""
        self._fate.frames = math.inf
        self._disconnect()
        self._down.end(partial(self._answered, RESET))
        self._fate.lost = {"up": True, "down": True}

    def _disconnect(self) -> None:
        if not self._up.end(self._cancel):
            self._scheduler.at(self._scheduler.now + KEEPALIVE, self._cancel)

    def _repeat(self) -> None:
        """Deliver everything once more. Nobody is interested in the answer."""
        if (serving := self._ends.serving()) is None:
            return
        service, server = serving

        def handle() -> None:
            with suppress(Aborted):
                for _ in self._method(service, iter(self._sent), Context(self._ends.certificate)):
                    pass

        server.spawn("repeated call", handle)

    # --- the coordinator ------------------------------------------------------------------------------------------

    def _asked(self, item: Message | Status) -> None:
        """The coordinator's machine gets something."""
        if not isinstance(item, Status):
            self._link.up_bytes += size_of(item)
            self._ends.traffic.up += size_of(item)
        if not self._accepted:
            self._accepted = True
            self._accept()
        self._requests.put(item)

    def _accept(self) -> None:
        if (serving := self._ends.serving()) is None:
            self._handled = True
            self._down.end(partial(self._answered, REFUSED))
        else:
            service, server = serving
            server.spawn("call", partial(self._handle, service, server))

    def _handle(self, service: Service, server: Process) -> None:
        status = RESET  # if the coordinator is killed, its system closes the connection
        answers = self._method(service, self._incoming(), Context(self._ends.certificate))
        try:
            for answer in answers:
                left = self._down.send(answer)
                if left is not None:
                    server.clock.sleep(left - self._scheduler.now)
                if self._cancelled:
                    break
            status = OK
        except Aborted as error:
            status = error.status
        except grpc.RpcError:
            status = CANCELLED
        except Exception as error:
            status = Status(grpc.StatusCode.UNKNOWN, f"Exception calling application: {error}")
            raise
        finally:
            self._handled = True
            self._down.end(partial(self._answered, status))

    def _incoming(self) -> Iterator[Message]:
        """Ends, or raises, when the caller has left: with gRPC, either can happen."""
        while not isinstance(item := self._requests.get(None), Status):
            assert item is not None
            yield item
        if item is CANCELLED and self._link.rng.random() < 0.5:
            raise grpc.RpcError(CANCELLED.details)

    def _cancel(self) -> None:
        self._cancelled = True
        self._requests.put(CANCELLED)
