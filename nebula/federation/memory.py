"""A stub without a socket: agents and coordinator in one process, every message sealed as on the wire."""

from __future__ import annotations

from collections.abc import Iterator

from nebula.federation.hub import Hub
from nebula.proto.v1.packet_pb2 import Frame
from nebula.proto.v1.run_pb2 import JoinRequest, JoinResponse
from nebula.wan.link import Wire


class MemoryStub:
    """Calls the hub directly. Refusals are raised as they are; nothing times out."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def join(self, request: JoinRequest, timeout: float) -> JoinResponse:
        return self._hub.join(None, request)

    def plan(self, frames: Iterator[Frame], timeout: float) -> Iterator[Frame]:
        return self._hub.plan(None, frames)

    def beat(self, frames: Iterator[Frame], timeout: float) -> Iterator[Frame]:
        return self._hub.beat(None, frames)

    def push(self, frames: Iterator[Frame], timeout: float, lane: int) -> Iterator[Frame]:
        return self._hub.push(None, frames)

    def pull(self, frames: Iterator[Frame], timeout: float, lane: int) -> Iterator[Frame]:
        return self._hub.pull(None, frames)

    def wire(self) -> Wire:
        return Wire(0, 0, 0, available=False)

    def refusal(self, timeout: float) -> str | None:
        return None

    def close(self) -> None:
        pass
