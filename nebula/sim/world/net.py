"""The network between the clusters and their coordinator, as agents see it: a Stub in front of the real Service."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from google.protobuf.message import Message

from nebula.federation.service import Service
from nebula.proto.v1.packet_pb2 import Frame
from nebula.proto.v1.run_pb2 import JoinRequest, JoinResponse
from nebula.sim.world.call import Call, Ends, Method, Traffic
from nebula.sim.world.link import SimLink
from nebula.sim.world.schedule import Process, Scheduler
from nebula.wan.link import Wire


class Network:
    """`rng` draws the fates of calls, one by one as they are made."""

    def __init__(self, scheduler: Scheduler, rng: random.Random) -> None:
        self._scheduler, self._rng = scheduler, rng
        self._links: dict[str, SimLink] = {}

    def link(self, cluster: str) -> SimLink:
        """The same one at every call, in whatever weather it is."""
        if cluster not in self._links:
            self._links[cluster] = SimLink(cluster, self._scheduler, self._rng)
        return self._links[cluster]


class SimStub:
    """`nebula.wan.transport.Stub` over a link, for one life of an agent. `service` and `server` say what is at the
    coordinator's address at the moment, None if nothing is. `caller` is the agent's process, `certificate` (PEM) its
    cluster's."""

    def __init__(
        self,
        link: SimLink,
        service: Callable[[], Service | None],
        caller: Process,
        server: Callable[[], Process | None],
        certificate: bytes,
    ) -> None:
        self._link = link
        self._traffic = Traffic()
        self._ends = Ends(caller, service, server, certificate, self._traffic)

    def join(self, request: JoinRequest, timeout: float) -> JoinResponse:
        answers: Iterator[JoinResponse] = self._call(_join, iter([request]), timeout)
        return next(answers)

    def plan(self, frames: Iterator[Frame], timeout: float) -> Iterator[Frame]:
        return self._call(lambda service, *call: service.Plan(*call), frames, timeout)

    def beat(self, frames: Iterator[Frame], timeout: float) -> Iterator[Frame]:
        return self._call(lambda service, *call: service.Beat(*call), frames, timeout)

    def push(self, frames: Iterator[Frame], timeout: float, lane: int) -> Iterator[Frame]:
        return self._call(lambda service, *call: service.Push(*call), frames, timeout)

    def pull(self, frames: Iterator[Frame], timeout: float, lane: int) -> Iterator[Frame]:
        return self._call(lambda service, *call: service.Pull(*call), frames, timeout)

    def wire(self) -> Wire:
        return Wire(self._traffic.up, self._traffic.down, retransmits=0, available=True)

    def refusal(self, timeout: float) -> str | None:
        return None

    def close(self) -> None:
        pass

    def _call(self, method: Method, requests: Iterator[Message], timeout: float) -> Iterator[Any]:
        return Call(self._link, self._ends, method, timeout).run(requests)


def _join(service: Service, requests: Iterator[JoinRequest], context: Any) -> Iterator[JoinResponse]:
    for request in requests:
        yield service.Join(request, context)
