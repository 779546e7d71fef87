"""A federation on real wires: gRPC over mTLS, each cluster through an emulated link of its own; all in one process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import grpc

from nebula.config import Link
from nebula.federation.agent import Agent
from nebula.federation.hub import Hub
from nebula.federation.service import serve
from nebula.proto.v1.packet_pb2 import Frame
from nebula.proto.v1.run_pb2 import JoinRequest, JoinResponse
from nebula.runtime.gateway import Gateway
from nebula.security.pki import Identity
from nebula.sim.wan import Relay, running
from nebula.wan.link import Wire
from nebula.wan.transport import GrpcStub, Stub
from tests.federated import Federated

FAST = Link(rate_mbps=2000.0, rtt_ms=0.5)

Pass: TypeAlias = Callable[[Iterator[Frame]], Iterator[Frame]]


@dataclass
class Wired:
    """`relays[cluster].port` is where that cluster finds the coordinator."""

    federated: Federated
    server: grpc.Server
    port: int
    relays: Mapping[str, Relay]
    swap: threading.Lock = field(default_factory=threading.Lock)

    @property
    def hub(self) -> Hub:
        return self.federated.hub

    def identity(self, name: str) -> Identity:
        return Identity.load(self.federated.folder / "pki" / name)

    def stub(self, cluster: str) -> GrpcStub:
        return GrpcStub(f"127.0.0.1:{self.relays[cluster].port}", self.federated.folder / "pki" / cluster)

    def gateway(self, cluster: str, **changes: Any) -> Gateway:
        address = f"127.0.0.1:{self.relays[cluster].port}"
        return self.federated.gateway(cluster, **{"address": address, "stub": None, **changes})

    def agents(self, wrap: Mapping[str, Callable[[Stub], Stub]] | None = None) -> dict[str, Agent]:
        """One per cluster; `wrap` may put something between a cluster's gateway and its channel."""
        wrap = wrap or {}
        stubs = {name: wrap.get(name, same)(self.stub(name)) for name in self.federated.federation.clusters}
        return {name: self.federated.agent(name, self.gateway(name, stub=stub)) for name, stub in stubs.items()}

    def finish(self, agents: Mapping[str, Agent] | None = None) -> dict[str, Any]:
        agents = agents or self.agents()
        summary = self.federated.finish(agents)
        for agent in agents.values():
            agent.transport.close()
        return summary

    def restart(self) -> None:
        """The coordinator goes away without a word, and another comes up on its journal and its port."""
        with self.swap:
            self.server.stop(grace=None).wait()
            self.hub.close()
            self.server, _ = serve(self.federated.start_hub(), self.identity("coordinator"), "127.0.0.1", self.port)

    def tick(self) -> None:
        with self.swap:
            self.hub.tick()


@contextmanager
def wired(federated: Federated, link: Link = FAST) -> Iterator[Wired]:
    """Coordinator, links and the coordinator's clock, for as long as the context lasts."""
    server, port = serve(federated.hub, Identity.load(federated.folder / "pki" / "coordinator"), "127.0.0.1", 0)
    done = threading.Event()
    links = dict.fromkeys(federated.federation.clusters, (link, ("127.0.0.1", port)))
    with running(links) as relays:
        wires = Wired(federated, server, port, relays)

        def ticking() -> None:
            while not done.wait(0.02):
                wires.tick()

        ticker = threading.Thread(target=ticking)
        ticker.start()
        try:
            yield wires
        finally:
            done.set()
            ticker.join()
            wires.server.stop(grace=None).wait()
            federated.hub.close()


def same(value: Any) -> Any:
    return value


class Meddler:
    """A stub with somebody on the path above TLS, who changes the first call of one method: the frames that go `up`,
    those that come `down`. `seen` has all frames of all calls as they passed."""

    def __init__(self, stub: Stub, method: str = "", *, up: Pass = same, down: Pass = same) -> None:
        self._stub = stub
        self._method = method
        self._up, self._down = up, down
        self._lock = threading.Lock()
        self.seen: list[Frame] = []

    def join(self, request: JoinRequest, timeout: float) -> JoinResponse:
        response = self._stub.join(request, timeout=timeout)
        self.seen += response.welcome
        return response

    def plan(self, frames: Iterator[Frame], timeout: float) -> Iterator[Frame]:
        return self._call("plan", frames, timeout=timeout)

    def beat(self, frames: Iterator[Frame], timeout: float) -> Iterator[Frame]:
        return self._call("beat", frames, timeout=timeout)

    def push(self, frames: Iterator[Frame], timeout: float, lane: int) -> Iterator[Frame]:
        return self._call("push", frames, timeout=timeout, lane=lane)

    def pull(self, frames: Iterator[Frame], timeout: float, lane: int) -> Iterator[Frame]:
        return self._call("pull", frames, timeout=timeout, lane=lane)

    def wire(self) -> Wire:
        return self._stub.wire()

    def refusal(self, timeout: float) -> str | None:
        return self._stub.refusal(timeout)

    def close(self) -> None:
        self._stub.close()

    def _call(self, method: str, frames: Iterator[Frame], **how: Any) -> Iterator[Frame]:
        up, down = same, same
        with self._lock:
            if method == self._method:
                up, down, self._method = self._up, self._down, ""
        answer = getattr(self._stub, method)(self._watched(up(frames)), **how)
        return self._watched(down(answer))

    def _watched(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        for frame in frames:
            self.seen.append(frame)
            yield frame


def wait_for(hub: Hub, true: Callable[[], bool]) -> None:
    """Until the coordinator's state makes it true."""
    with hub._changed:
        assert hub._changed.wait_for(true, timeout=30)
