"""gRPC in, hub out: identities from client certificates, errors to status codes. Nothing else happens here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, TypeVar

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from google.protobuf.message import DecodeError

from nebula.errors import AuthError, FrameError, NebulaError, PacketError, PreflightError, SessionError
from nebula.federation.hub import Hub
from nebula.proto.v1.federation_pb2_grpc import FederationServicer, add_FederationServicer_to_server
from nebula.proto.v1.packet_pb2 import Frame
from nebula.proto.v1.run_pb2 import JoinRequest, JoinResponse
from nebula.security.pki import Identity, peer_name
from nebula.wan.link import listeners_prefer_bbr
from nebula.wan.transport import CHANNEL_OPTIONS

T = TypeVar("T")

STATUS: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (SessionError, grpc.StatusCode.UNAUTHENTICATED),  # join again
    (FrameError, grpc.StatusCode.DATA_LOSS),  # damaged on the way: join again, send again
    (AuthError, grpc.StatusCode.PERMISSION_DENIED),
    (PacketError, grpc.StatusCode.INVALID_ARGUMENT),
    (DecodeError, grpc.StatusCode.INVALID_ARGUMENT),
    (NebulaError, grpc.StatusCode.CANCELLED),  # this coordinator cannot go on: ask its successor
    (ConnectionError, grpc.StatusCode.CANCELLED),  # send again
)


class Service(FederationServicer):
    def __init__(self, hub: Hub, authority_pem: bytes) -> None:
        self._hub = hub
        self._authority = authority_pem

    def Join(self, request: JoinRequest, context: grpc.ServicerContext) -> JoinResponse:
        return self._translated(context, self._caller(context), lambda peer: self._hub.join(peer, request))

    def Plan(self, frames: Iterator[Frame], context: grpc.ServicerContext) -> Iterator[Frame]:
        return self._stream(context, self._hub.plan, frames)

    def Beat(self, frames: Iterator[Frame], context: grpc.ServicerContext) -> Iterator[Frame]:
        return self._stream(context, self._hub.beat, frames)

    def Push(self, frames: Iterator[Frame], context: grpc.ServicerContext) -> Iterator[Frame]:
        return self._stream(context, self._hub.push, frames)

    def Pull(self, frames: Iterator[Frame], context: grpc.ServicerContext) -> Iterator[Frame]:
        return self._stream(context, self._hub.pull, frames)

    def _stream(
        self, context: Any, call: Callable[[str, Iterator[Frame]], Iterator[Frame]], frames: Iterator[Frame]
    ) -> Iterator[Frame]:
        peer = self._caller(context)
        answer = self._translated(context, peer, lambda peer: call(peer, _whole(frames)))
        while (frame := self._translated(context, peer, lambda _: next(answer, None))) is not None:
            yield frame

    def _caller(self, context: Any) -> str:
        """Whom the client certificate names."""
        return self._translated(context, "unknown", lambda _: self._peer(context))

    def _translated(self, context: Any, peer: str, act: Callable[[str], T]) -> T:
        """Run `act` for `peer`; a refusal is counted and becomes a status."""
        try:
            return act(peer)
        except tuple(kind for kind, _ in STATUS) as error:
            if isinstance(error, (AuthError, PacketError)) and not isinstance(error, SessionError):
                self._hub.rejected(peer, error.reason if isinstance(error, FrameError) else type(error).__name__)
            code = next(code for kind, code in STATUS if isinstance(error, kind))
            context.abort(code, str(error))
            raise AssertionError("abort raises") from error

    def _peer(self, context: Any) -> str:
        pem = context.auth_context()["x509_pem_cert"][0]
        der = x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)
        return peer_name(der, self._authority, datetime.now(UTC))


def _whole(frames: Iterator[Frame]) -> Iterator[Frame]:
    """Nothing is read beyond the last frame of a message, so whoever comes to the end reads one that broke off. gRPC
    ends a stream in the same way when its connection is lost: nobody tampered with anything."""
    yield from frames
    raise ConnectionError("the call broke off before the last frame of its message")


def serve(hub: Hub, identity: Identity, host: str, port: int) -> tuple[grpc.Server, int]:
    """Start listening. Returns server and port (chosen if 0 was asked). Raises PreflightError if it is taken."""
    # Every cluster may have a push and a pull per fragment, over every connection, and a plan, and a beat.
    run = hub.agreement.run
    waiting = len(hub.agreement.members) * (2 * run.fragments * run.wan.streams + 2)
    server = grpc.server(
        ThreadPoolExecutor(max_workers=waiting + 4), options=(*CHANNEL_OPTIONS, ("grpc.so_reuseport", 0))
    )
    add_FederationServicer_to_server(Service(hub, identity.authority_pem), server)  # type: ignore[no-untyped-call, unused-ignore]
    credentials = grpc.ssl_server_credentials(
        [(identity.key_pem, identity.certificate_pem)], identity.authority_pem, require_client_auth=True
    )
    try:
        bound = server.add_secure_port(f"{host}:{port}", credentials)
    except RuntimeError as error:
        raise PreflightError(
            f"the coordinator cannot listen on {host}:{port}: {error}",
            hint="another program has the port; change coordinator.port in the cluster file",
        ) from error
    server.start()
    listeners_prefer_bbr(bound)
    return server, bound
