"""How messages cross the wire: sealed protobuf over mTLS gRPC, and the same without a socket.

A stream carries sealed messages one after another, each ending with a frame marked `last`. Both ends name the same
context for each message, so a message cannot be passed off as another kind. A payload's context includes the digest of
the head before it, which ties the two together.
"""

from __future__ import annotations

import hashlib
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from nebula.errors import FrameError
from nebula.proto.v1.federation_pb2_grpc import FederationStub
from nebula.proto.v1.packet_pb2 import Frame
from nebula.proto.v1.run_pb2 import JoinRequest, JoinResponse
from nebula.security.pki import AUTHORITY, CERTIFICATE, KEY, Identity
from nebula.wan.link import Wire, WireMeter

if TYPE_CHECKING:
    from nebula.types import Channel

M = TypeVar("M", bound=Message)

HEAD_LIMIT = 4 << 20
"""No control message comes near 4 MiB."""

TLS_NAME = "nebula-coordinator"
"""Every coordinator's certificate carries this name, so agents need not know which address a load balancer shows."""

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 8 << 20),  # a frame is 1 MiB and a little
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_retries", 0),  # the gateway retries whole calls: frames of a retry need fresh nonces
)

LANE_OPTIONS = (
    ("grpc.ssl_target_name_override", TLS_NAME),
    ("grpc.use_local_subchannel_pool", 1),  # channels to one address share a connection otherwise
)


class Stub(Protocol):
    """What the coordinator offers, as an agent calls it. `timeout`: seconds without any movement after which a call
    fails; a payload that moves may take as long as it takes. `lane`: over which connection, from 0 on; whatever is
    small goes over that one. Failures are grpc.RpcError."""

    def join(self, request: JoinRequest, timeout: float) -> JoinResponse: ...
    def plan(self, frames: Iterator[Frame], timeout: float) -> Iterator[Frame]: ...
    def beat(self, frames: Iterator[Frame], timeout: float) -> Iterator[Frame]: ...
    def push(self, frames: Iterator[Frame], timeout: float, lane: int) -> Iterator[Frame]: ...
    def pull(self, frames: Iterator[Frame], timeout: float, lane: int) -> Iterator[Frame]: ...

    def wire(self) -> Wire:
        """What has crossed the wire so far."""
        ...

    def refusal(self, timeout: float) -> str | None:
        """Why the two ends do not trust each other; None if they do, or nobody answers within `timeout` seconds."""
        ...

    def close(self) -> None: ...


class GrpcStub:
    """Mutually authenticated channels to the coordinator, one for each lane, opened when it is first used. `folder`: of
    the cluster's certificate."""

    def __init__(self, address: str, folder: Path) -> None:
        identity = Identity.load(folder)
        self._address, self._folder = address, folder
        host, _, port = address.rpartition(":")
        self._meter = WireMeter(host, int(port))
        self._credentials = grpc.ssl_channel_credentials(
            identity.authority_pem, private_key=identity.key_pem, certificate_chain=identity.certificate_pem
        )
        self._channels: list[grpc.Channel] = []
        self._lanes: list[FederationStub] = []
        self._opening = threading.Lock()

    def join(self, request: JoinRequest, timeout: float) -> JoinResponse:
        return self._lane(0).Join(request, timeout=timeout)

    def plan(self, frames: Iterator[Frame], timeout: float) -> Iterator[Frame]:
        return _watched(self._lane(0).Plan, frames, timeout)

    def beat(self, frames: Iterator[Frame], timeout: float) -> Iterator[Frame]:
        return _watched(self._lane(0).Beat, frames, timeout)

    def push(self, frames: Iterator[Frame], timeout: float, lane: int) -> Iterator[Frame]:
        return _watched(self._lane(lane).Push, self._seen(frames), timeout)

    def pull(self, frames: Iterator[Frame], timeout: float, lane: int) -> Iterator[Frame]:
        return _watched(self._lane(lane).Pull, frames, timeout)

    def wire(self) -> Wire:
        return self._meter.sample()

    def refusal(self, timeout: float) -> str | None:
        return tls_refusal(self._address, self._folder, timeout)

    def close(self) -> None:
        for channel in self._channels:
            channel.close()

    def _seen(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        """gRPC asks for a second frame once there is a connection that has taken the first: the meter sees it early."""
        for index, frame in enumerate(frames):
            if index == 1:
                self._meter.sample()
            yield frame

    def _lane(self, number: int) -> FederationStub:
        with self._opening:
            while len(self._lanes) <= number:
                options = (*CHANNEL_OPTIONS, *LANE_OPTIONS)
                self._channels.append(grpc.secure_channel(self._address, self._credentials, options=options))
                self._lanes.append(FederationStub(self._channels[-1]))  # type: ignore[no-untyped-call, unused-ignore]
            return self._lanes[number]


class Movement:
    """Notes when frames pass, and cancels a call on which none has for `patience` seconds."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._last = time.monotonic()
        self._over = threading.Event()

    def noted(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        for frame in frames:
            self._last = time.monotonic()
            yield frame

    def watch(self, call: grpc.Call) -> None:
        while not self._over.wait(max(self._last + self._patience - time.monotonic(), 0.0)):
            if time.monotonic() - self._last >= self._patience:
                call.cancel()
                return

    def stop(self) -> None:
        self._over.set()


def _watched(method: Any, frames: Iterator[Frame], timeout: float) -> Iterator[Frame]:
    movement = Movement(timeout)
    answer = method(movement.noted(frames))
    threading.Thread(target=movement.watch, args=(answer,), name="movement", daemon=True).start()
    try:
        yield from movement.noted(answer)
    finally:
        movement.stop()


def tls_refusal(address: str, identity: Path, timeout: float) -> str | None:
    """Why TLS with the coordinator fails although it is there; None if it works, or nobody answers within `timeout`
    seconds. `identity`: folder of the cluster's certificate.

    gRPC does not tell: in TLS 1.3 a server judges the client's certificate when the client's handshake has ended, and
    gRPC's servers then close the connection without an alert, as if it had broken."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(identity / AUTHORITY)
    context.load_cert_chain(identity / CERTIFICATE, identity / KEY)
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    trusted = False
    try:
        with (
            socket.create_connection((host, int(port)), timeout) as connection,
            context.wrap_socket(connection, server_hostname=TLS_NAME) as secure,
        ):
            trusted = True
            if secure.recv(1):  # an HTTP/2 server speaks first
                return None
    except TimeoutError:
        return None
    except ssl.SSLError as error:
        if not isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):  # closed: which one differs by release
            return str(error)
    except OSError:  # nobody there, or a connection that broke
        pass
    return "it closes connections that show this certificate" if trusted else None


def send(channel: Channel, message: Message, context: bytes) -> Iterator[Frame]:
    return channel.seal(message.SerializeToString(deterministic=True), context=context)


def receive(channel: Channel, frames: Iterable[Frame], kind: type[M], context: bytes) -> M:
    """Raises FrameError if the next message in the stream is not an authentic `kind`."""
    plain = channel.open(frames, context=context, limit=HEAD_LIMIT)
    try:
        return kind.FromString(plain)
    except DecodeError as error:
        raise FrameError("schema", f"a sealed {kind.__name__} does not parse") from error


def payload_context(head: Message) -> bytes:
    """Ties a payload to the head it follows."""
    return b"payload:" + hashlib.sha256(head.SerializeToString(deterministic=True)).digest()
