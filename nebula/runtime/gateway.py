"""The one door: all of a cluster's WAN traffic goes through its gateway.

Calls are idempotent and repeated until they succeed or `max_stall` has passed without any answer. Every attempt is
sealed anew; when the coordinator has forgotten the session (it restarted) the gateway joins again first.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import grpc

from nebula.clock import REAL, Clock
from nebula.config import Agreement
from nebula.errors import AuthError, FrameError, NebulaError, PacketError, SessionError, UnreachableError
from nebula.proto.v1 import run_pb2 as pb
from nebula.proto.v1.packet_pb2 import Frame
from nebula.security.pki import Identity
from nebula.security.session import Session, offer
from nebula.types import ROLE, Beat, Held, Packets, Pulled, PushTicket, RoundPlan, RoundReport
from nebula.wan import chunks
from nebula.wan.chunks import CHUNK_BYTES
from nebula.wan.link import LinkMonitor
from nebula.wan.messages import beat_request, plan_of, plan_request
from nebula.wan.transport import GrpcStub, Stub, payload_context, receive, send

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.2, 3.0
"""Seconds between attempts; doubled from the first to the longest."""

LEAST_PATIENCE = 15.0
"""Seconds without movement, at the least (but for a shorter `max_stall`), after which a call is tried again: longer
than the coordinator lets a pull wait, and than a frame takes on a poor link."""

BEAT_TIMEOUT = 10.0
"""Seconds that a sign of life may take; by then, newer ones are under way."""

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


class Gateway:
    """`agreement`: the digest this agent was started for; a coordinator of another run is refused. `max_stall`: seconds
    without an answer before a call raises UnreachableError. `identity`: the folder of the cluster's certificate."""

    def __init__(
        self,
        *,
        identity: str,
        address: str,
        cluster: str,
        agreement: str,
        max_stall: float,
        stub: Stub | None = None,
        clock: Clock = REAL,
    ) -> None:
        self._clock = clock
        self._identity = Identity.load(Path(identity))
        if self._identity.name != cluster:
            raise AuthError(
                f"the identity in {identity} is of {self._identity.name!r}, this agent is of cluster {cluster!r}",
                hint="give each agent the folder of its own certificate",
            )
        self._address = address
        self._agreement = agreement
        self._max_stall = max_stall
        self._patience = min(max_stall, max(max_stall / 4, LEAST_PATIENCE))
        self._stub = stub or GrpcStub(address, Path(identity))
        self._session: Session | None = None
        self._term = 0
        self._life = secrets.randbits(63)
        self._joining = clock.condition()
        self._monitor = LinkMonitor()
        self._heard = float("-inf")
        self._payload_up = self._payload_down = self._retries = 0

    def join(self) -> tuple[bytes, bytes]:
        welcome = self._persist(lambda: self._join())
        return welcome.agreement, welcome.tokenizer

    def plan(self, held: Mapping[str, Held], report: RoundReport | None) -> RoundPlan:
        request = plan_request(held, self._measured(report) if report else None)

        def ask(session: Session) -> RoundPlan:
            start = self._clock.now()
            frames = self._stub.plan(send(session.send, request, b"plan"), timeout=self._patience)
            answer = receive(session.receive, frames, pb.PlanResponse, b"plan-answer")
            self._monitor.observe_rtt(self._clock.now() - start)
            return plan_of(answer)

        return self._call(ask)

    def beat(self, beat: Beat) -> None:
        def tell(session: Session) -> None:
            frames = self._stub.beat(send(session.send, beat_request(beat), b"beat"), timeout=BEAT_TIMEOUT)
            receive(session.receive, frames, pb.BeatResponse, b"beat-answer")

        with contextlib.suppress(*PASSING):  # the next one comes soon
            self._attempt(tell)

    def push(self, ticket: PushTicket, packets: Packets) -> Literal["accepted", "duplicate", "late"]:
        payload = b"".join(packets)
        head = pb.PushHead(
            role=ticket.role,
            fragment=ticket.fragment,
            round=ticket.round,
            base=ticket.base,
            weight=ticket.weight,
            parts=[len(packet) for packet in packets],
            sha256=hashlib.sha256(payload).digest(),
        )

        def deliver(session: Session) -> Literal["accepted", "duplicate", "late"]:
            start = self._clock.now()
            frames = self._stub.push(self._noted(_pushed(session, head, payload)), timeout=self._patience)
            receipt = receive(session.receive, frames, pb.Receipt, b"receipt")
            self._monitor.observe_transfer("up", len(payload), self._clock.now() - start)
            return _VERDICTS[receipt.status]

        verdict = self._call(deliver)
        self._payload_up += len(payload)
        return verdict

    def pull(self, kind: Literal["update", "state"], fragment: str, version: int) -> tuple[Pulled, bytes]:
        head, payload = self._update(fragment, version) if kind == "update" else self._state(fragment)
        pulled = Pulled(
            status=_STATUSES[head.status],
            version=head.version,
            digest=head.digest,
            contributors=tuple(head.contributors),
        )
        return pulled, payload

    def close(self) -> None:
        self._stub.close()

    def _update(self, fragment: str, version: int) -> tuple[pb.PullHead, bytes]:
        while True:
            head, payload = self._ask(kind=pb.PullRequest.KIND_UPDATE, fragment=fragment, version=version)
            if head.status != pb.PullHead.STATUS_PENDING:
                self._payload_down += len(payload)
                return head, payload

    def _state(self, fragment: str) -> tuple[pb.PullHead, bytes]:
        """The newest. Each of its chunks is asked for by itself, so a connection that breaks costs those under way."""

        def chunk(of: pb.PullHead, sha256: bytes) -> bytes | None:
            wanted = {"fragment": fragment, "version": of.version, "chunk": sha256}
            head, payload = self._ask(kind=pb.PullRequest.KIND_CHUNK, **wanted)
            return payload if head.status == pb.PullHead.STATUS_READY else None

        def manifest() -> pb.PullHead:
            return self._ask(kind=pb.PullRequest.KIND_STATE, fragment=fragment)[0]

        start = self._clock.now()
        head, state, moved = chunks.fetch(manifest, chunk, self._clock, CHUNK_BYTES)
        self._monitor.observe_transfer("down", moved, self._clock.now() - start)
        self._payload_down += moved
        return head, state

    def _ask(self, **wanted: Any) -> tuple[pb.PullHead, bytes]:
        request = pb.PullRequest(role=ROLE, **wanted)
        return self._call(lambda session: self._fetch(session, request))

    def _fetch(self, session: Session, request: pb.PullRequest) -> tuple[pb.PullHead, bytes]:
        frames = self._noted(self._stub.pull(send(session.send, request, b"pull"), timeout=self._patience))
        head = receive(session.receive, frames, pb.PullHead, b"pull-answer")
        if head.status != pb.PullHead.STATUS_READY or request.kind == pb.PullRequest.KIND_STATE:
            return head, b""
        start = self._clock.now()
        payload = session.receive.open(frames, context=payload_context(head), limit=head.payload_bytes)
        if request.kind == pb.PullRequest.KIND_UPDATE:  # a chunk shares the link with others
            self._monitor.observe_transfer("down", len(payload), self._clock.now() - start)
        if hashlib.sha256(payload).digest() != head.sha256:
            raise FrameError("hash", f"fragment {request.fragment} does not match the digest its head states")
        return head, payload

    def _noted(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        """As frames pass, the link is alive, however long the call takes."""
        for frame in frames:
            yield frame
            self._heard = self._clock.now()

    def _measured(self, report: RoundReport) -> RoundReport:
        wire = self._stub.wire()
        return replace(
            report,
            up_bytes=wire.up_bytes,
            down_bytes=wire.down_bytes,
            payload_up_bytes=self._payload_up,
            payload_down_bytes=self._payload_down,
            retries=self._retries,
            rtt_s=self._monitor.stats().rtt_s,
            life=self._life,
        )

    # --- sessions and repetition ----------------------------------------------------------------------------------

    def _join(self) -> pb.Welcome:
        message, pending = offer(self._identity, self._agreement)
        response = self._stub.join(pb.JoinRequest(offer=message), timeout=self._patience)
        session = pending.complete(response.answer)
        if session.term < self._term:
            raise SessionError(f"a coordinator of term {session.term} answered after one of term {self._term}")
        welcome = receive(session.receive, iter(response.welcome), pb.Welcome, b"welcome")
        digest = Agreement.parse(welcome.agreement).digest()
        if digest != self._agreement:
            raise AuthError(f"the coordinator sent agreement {digest}, this agent was started for {self._agreement}")
        self._session, self._term = session, session.term
        return welcome

    def _call(self, act: Callable[[Session], T]) -> T:
        return self._persist(lambda: self._attempt(act))

    def _attempt(self, act: Callable[[Session], T]) -> T:
        """Once, in a session."""
        with self._joining:
            if self._session is None:
                self._join()
            session = self._session
        assert session is not None
        try:
            return act(session)
        except PASSING as error:
            with self._joining:  # several calls may fail together; only the first drops the session
                if self._session is session and _stale(error):
                    self._session = None
            raise

    def _persist(self, attempt: Callable[[], T]) -> T:
        """Repeat until it works, fails for good, or nothing was heard for `max_stall`."""
        since, pause = self._clock.now(), FIRST_PAUSE
        while True:
            try:
                return attempt()
            except PASSING as error:
                self._retries += 1
                self._raise_if_final(error)
                if self._heard > since:  # a long transfer that broke was no silence
                    since, pause = self._heard, FIRST_PAUSE
                if self._clock.now() - since + pause > self._max_stall:
                    raise UnreachableError(
                        f"the coordinator at {self._address} did not answer for {self._max_stall:g} s: {_said(error)}",
                        hint="check that it runs and that the address and port can be reached from here",
                    ) from error
            finally:
                self._stub.wire()  # a connection that breaks later has been counted up to here
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
        return self._stub.refusal(timeout=min(LONGEST_PAUSE, self._max_stall))


def _pushed(session: Session, head: pb.PushHead, payload: bytes) -> Iterator[Frame]:
    yield from send(session.send, head, b"push")
    yield from session.send.seal(payload, context=payload_context(head))


def _stale(error: Exception) -> bool:
    return isinstance(error, (FrameError, SessionError)) or (isinstance(error, grpc.Call) and error.code() in REJOIN)


def _said(error: Exception) -> str:
    return str(error.details()) if isinstance(error, grpc.Call) else str(error)


_STATUSES: dict[pb.PullHead.Status.ValueType, Literal["ready", "gone", "ended"]] = {
    pb.PullHead.STATUS_READY: "ready",
    pb.PullHead.STATUS_GONE: "gone",
    pb.PullHead.STATUS_ENDED: "ended",
}
_VERDICTS: dict[pb.Receipt.Status.ValueType, Literal["accepted", "duplicate", "late"]] = {
    pb.Receipt.STATUS_ACCEPTED: "accepted",
    pb.Receipt.STATUS_DUPLICATE: "duplicate",
    pb.Receipt.STATUS_LATE: "late",
}
