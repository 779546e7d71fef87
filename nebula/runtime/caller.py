"""Sessions with the coordinator, and calls in them that are repeated until they succeed.

Calls are idempotent and repeated until they succeed or `max_stall` has passed without any answer. Every attempt is
sealed anew; when the coordinator has forgotten the session (it restarted) the caller joins again first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import grpc

from nebula.clock import Clock
from nebula.config import Agreement
from nebula.errors import AuthError, FrameError, NebulaError, PacketError, SessionError, UnreachableError
from nebula.proto.v1 import run_pb2 as pb
from nebula.proto.v1.packet_pb2 import Frame
from nebula.security.pki import Identity
from nebula.security.session import Session, offer
from nebula.wan.transport import GrpcStub, Stub, receive

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.2, 3.0
"""Seconds between attempts; doubled from the first to the longest."""

LEAST_PATIENCE = 15.0
"""Seconds without movement, at the least (but for a shorter `max_stall`), after which a call is tried again: longer
than the coordinator lets a pull wait, and than a frame takes on a poor link."""

REPEAT = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,  # a connection that broke in the middle of a frame
    grpc.StatusCode.UNKNOWN,
}
PASSING = (grpc.RpcError, FrameError, SessionError)
"""What may be better at the next attempt."""

REJOIN = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.DATA_LOSS}


class Caller:
    """`agreement`: the digest this agent was started for; a coordinator of another run is refused. `max_stall`: seconds
    without an answer before a call raises UnreachableError. `identity`: the folder of the cluster's certificate.
    `patience`: seconds without movement after which an attempt is given up; `retries`: how many failed."""

    def __init__(
        self,
        identity: str,
        address: str,
        cluster: str,
        agreement: str,
        max_stall: float,
        stub: Stub | None,
        clock: Clock,
    ) -> None:
        self._clock = clock
        self._identity = Identity.load(Path(identity))
        if self._identity.name != cluster:
            raise AuthError(
                f"the identity in {identity} is of {self._identity.name!r}, this agent is of cluster {cluster!r}",
                hint="give each agent the folder of its own certificate",
            )
        self._address = address
        self._digest = agreement
        self._max_stall = max_stall
        self.patience = min(max_stall, max(max_stall / 4, LEAST_PATIENCE))
        self.stub = stub or GrpcStub(address, Path(identity))
        self.retries = 0
        self._agreement: Agreement | None = None
        self._session: Session | None = None
        self._term = 0
        self._joining = clock.condition()
        self._heard = float("-inf")

    @property
    def agreement(self) -> Agreement:
        """Which a coordinator hands over to whoever joins."""
        if self._agreement is None:
            self.join()
        assert self._agreement is not None
        return self._agreement

    def join(self) -> pb.Welcome:
        return self._persist(self._join)

    def call(self, act: Callable[[Session], T]) -> T:
        """`act` in a session, until it works, fails for good, or nothing was heard for `max_stall`."""
        return self._persist(lambda: self.attempt(act))

    def attempt(self, act: Callable[[Session], T]) -> T:
        """Once. Raises what is among PASSING, too."""
        with self._joining:
            if self._session is None:
                self._join()
            session = self._session
        assert session is not None
        try:
            return act(session)
        except PASSING as error:
            self._drop(session, error)
            raise

    def as_far_as_it_comes(self, session: Session, coming: Iterator[bytes]) -> Iterator[bytes]:
        """What a connection that breaks does not bring is asked for again by whoever wants it."""
        try:
            yield from coming
        except PASSING as error:
            self.retries += 1
            self._drop(session, error)

    def _drop(self, session: Session, error: Exception) -> None:
        with self._joining:  # several calls may fail together; only the first drops the session
            if self._session is session and _stale(error):
                self._session = None

    def noted(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        """As frames pass, the link is alive, however long the call takes."""
        for frame in frames:
            yield frame
            self._heard = self._clock.now()

    def _join(self) -> pb.Welcome:
        message, pending = offer(self._identity, self._digest)
        response = self.stub.join(pb.JoinRequest(offer=message), timeout=self.patience)
        session = pending.complete(response.answer)
        if session.term < self._term:
            raise SessionError(f"a coordinator of term {session.term} answered after one of term {self._term}")
        welcome = receive(session.receive, iter(response.welcome), pb.Welcome, b"welcome")
        agreement = Agreement.parse(welcome.agreement)
        if (digest := agreement.digest()) != self._digest:
            raise AuthError(f"the coordinator sent agreement {digest}, this agent was started for {self._digest}")
        self._session, self._term, self._agreement = session, session.term, agreement
        return welcome

    def _persist(self, attempt: Callable[[], T]) -> T:
        """Repeat until it works, fails for good, or nothing was heard for `max_stall`."""
        since, pause = self._clock.now(), FIRST_PAUSE
        while True:
            try:
                return attempt()
            except PASSING as error:
                self.retries += 1
                self._raise_if_final(error)
                if self._heard > since:  # a long transfer that broke was no silence
                    since, pause = self._heard, FIRST_PAUSE
                if self._clock.now() - since + pause > self._max_stall:
                    raise UnreachableError(
                        f"the coordinator at {self._address} did not answer for {self._max_stall:g} s: {_said(error)}",
                        hint="check that it runs and that the address and port can be reached from here",
                    ) from error
            finally:
                self.stub.wire()  # a connection that breaks later has been counted up to here
            self._clock.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _raise_if_final(self, error: Exception) -> None:
        """Raise what no repetition will change."""
        if not isinstance(error, grpc.Call):
            return
        code, said = error.code(), _said(error)
        if code == grpc.StatusCode.PERMISSION_DENIED:
            raise AuthError(f"the coordinator at {self._address} refused this cluster: {said}") from error
        if code == grpc.StatusCode.INVALID_ARGUMENT:
            raise PacketError(f"the coordinator at {self._address} refused what this cluster sent: {said}") from error
        if code not in REPEAT | REJOIN:
            raise NebulaError(f"the coordinator at {self._address} gave up: {said}") from error
        # Asked twice: by chance, one handshake may break as well.
        if code == grpc.StatusCode.UNAVAILABLE and self._refusal() and (why := self._refusal()):
            raise AuthError(
                f"the coordinator at {self._address} and this cluster do not trust each other: {why}",
                hint="both certificates must come from the same authority and be valid now",
            ) from error

    def _refusal(self) -> str | None:
        return self.stub.refusal(timeout=min(LONGEST_PAUSE, self._max_stall))


def _stale(error: Exception) -> bool:
    return isinstance(error, (FrameError, SessionError)) or (isinstance(error, grpc.Call) and error.code() in REJOIN)


def _said(error: Exception) -> str:
    return str(error.details()) if isinstance(error, grpc.Call) else str(error)
