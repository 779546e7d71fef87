"""The one door: all of a cluster's WAN traffic goes through its gateway."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from nebula.clock import REAL, Clock, Task
from nebula.proto.v1 import run_pb2 as pb
from nebula.proto.v1.packet_pb2 import Frame
from nebula.runtime.caller import PASSING, Caller
from nebula.security.session import Session
from nebula.types import ROLE, Beat, Held, Packets, Pulled, PushTicket, RoundPlan, RoundReport
from nebula.wan import chunks
from nebula.wan.chunks import CHUNK_BYTES
from nebula.wan.link import LinkMonitor
from nebula.wan.messages import beat_request, plan_of, plan_request
from nebula.wan.transport import Stub, payload_context, receive, send

BEAT_TIMEOUT = 10.0
"""Seconds that a sign of life may take; by then, newer ones are under way."""


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
        self._caller = Caller(identity, address, cluster, agreement, max_stall, stub, clock)
        self._clock = clock
        self._life = secrets.randbits(63)
        self._monitor = LinkMonitor()
        self._payload_up = self._payload_down = 0

    def join(self) -> tuple[bytes, bytes]:
        welcome = self._caller.join()
        return welcome.agreement, welcome.tokenizer

    def plan(self, held: Mapping[str, Held], report: RoundReport | None) -> RoundPlan:
        request = plan_request(held, self._measured(report) if report else None)

        def ask(session: Session) -> RoundPlan:
            start = self._clock.now()
            frames = self._caller.stub.plan(send(session.send, request, b"plan"), timeout=self._caller.patience)
            answer = receive(session.receive, frames, pb.PlanResponse, b"plan-answer")
            self._monitor.observe_rtt(self._clock.now() - start)
            return plan_of(answer)

        return self._caller.call(ask)

    def beat(self, beat: Beat) -> None:
        def tell(session: Session) -> None:
            frames = self._caller.stub.beat(send(session.send, beat_request(beat), b"beat"), timeout=BEAT_TIMEOUT)
            receive(session.receive, frames, pb.BeatResponse, b"beat-answer")

        with contextlib.suppress(*PASSING):  # the next one comes soon
            self._caller.attempt(tell)

    def push(self, ticket: PushTicket, packets: Packets) -> Literal["accepted", "duplicate", "late"]:
        payload = memoryview(b"".join(packets))
        manifest = chunks.manifest(payload, CHUNK_BYTES)
        head = pb.PushHead(
            role=ticket.role,
            fragment=ticket.fragment,
            round=ticket.round,
            base=ticket.base,
            weight=ticket.weight,
            parts=[len(packet) for packet in packets],
            payload=manifest,
        )
        start = self._clock.now()
        receipt = self._deliver(head, payload)
        self._monitor.observe_transfer("up", len(payload), max(self._clock.now() - start - receipt.seconds, 0.0))
        self._payload_up += len(payload)
        return _VERDICTS[receipt.status]

    def pull(self, kind: Literal["update", "state"], fragment: str, version: int) -> tuple[Pulled, bytes]:
        """A state is the newest, whatever the `version`."""
        lanes, started = self._lanes(), self._clock.now()
        first = pb.PullRequest(role=ROLE, fragment=fragment, kind=_KINDS[kind], version=version, every=lanes)
        if kind == "state":
            first.every = 0  # what we have of it is not sent again

        def begin() -> tuple[pb.PullHead, chunks.Coming]:
            nonlocal started

            def ask(session: Session) -> tuple[pb.PullHead, chunks.Coming]:
                head, coming = self._ask(session, first, 0)
                return head, self._caller.as_far_as_it_comes(session, coming)

            while True:
                head, coming = self._caller.call(ask)
                if head.status != pb.PullHead.STATUS_PENDING:
                    started = self._clock.now()
                    return head, coming

        def rest(head: pb.PullHead, missing: list[bytes], state: chunks.Assembly, lane: int) -> bool:
            left = list(missing)

            def ask(session: Session) -> bool:
                request = pb.PullRequest(
                    role=ROLE, fragment=fragment, kind=_KINDS[kind], version=head.version, chunks=left
                )
                found, coming = self._ask(session, request, lane)
                for data in coming:
                    state.put(left[0], data)
                    del left[0]
                return found.status == pb.PullHead.STATUS_READY

            return self._caller.call(ask)

        head, payload, moved = chunks.fetch(begin, rest, self._clock, CHUNK_BYTES, lanes)
        if moved:
            self._monitor.observe_transfer("down", moved, self._clock.now() - started)
        self._payload_down += moved
        pulled = Pulled(
            status=_STATUSES[head.status],
            version=head.version,
            digest=head.digest,
            contributors=tuple(head.contributors),
        )
        return pulled, payload

    def close(self) -> None:
        self._caller.stub.close()

    def _deliver(self, head: pb.PushHead, payload: memoryview) -> pb.Receipt:
        """Until the coordinator has said what became of it."""
        missing: Sequence[int] = range(len(head.payload.chunks))
        lanes = self._lanes()
        while True:
            shares = [missing[lane::lanes] for lane in range(min(lanes, len(missing)))] or [()]
            beside = [
                Task(self._clock, "chunks", partial(self._bring, head, payload, share, lane))
                for lane, share in enumerate(shares[1:], start=1)
            ]
            try:
                receipts = [self._bring(head, payload, shares[0], 0)]
            finally:
                for lane in beside:  # whatever happens, none is left behind
                    lane.wait()
            receipts += [lane.result() for lane in beside]
            if all(receipt.status == pb.Receipt.STATUS_INCOMPLETE for receipt in receipts):
                receipts = [self._bring(head, payload, (), 0)]  # the coordinator was replaced, and knows of none
            # A lane that ends after the one that completed it may hear that it is merged: the least is the truth.
            receipt = min(receipts, key=lambda receipt: receipt.status)
            if receipt.status != pb.Receipt.STATUS_INCOMPLETE:
                return receipt
            missing = receipt.missing

    def _bring(self, head: pb.PushHead, payload: memoryview, share: Sequence[int], lane: int) -> pb.Receipt:
        """Some chunks, over one connection. When that breaks, what the coordinator lacks of them."""
        left: Sequence[int] | None = share

        def attempt(session: Session) -> pb.Receipt:
            nonlocal left
            if left is None:
                receipt = self._send(session, head, payload, (), lane)
                left = sorted(set(share).intersection(receipt.missing))
                if receipt.status != pb.Receipt.STATUS_INCOMPLETE or not left:
                    return receipt
            sending, left = left, None
            return self._send(session, head, payload, sending, lane)

        return self._caller.call(attempt)

    def _send(
        self, session: Session, head: pb.PushHead, payload: memoryview, numbers: Sequence[int], lane: int
    ) -> pb.Receipt:
        of = pb.PushHead()
        of.CopyFrom(head)
        of.following.extend(numbers)
        context = payload_context(of)

        def frames() -> Iterator[Frame]:
            yield from send(session.send, of, b"push")
            for number in numbers:
                at = number * CHUNK_BYTES
                yield from session.send.seal(payload[at : at + CHUNK_BYTES], context=context)

        answer = self._caller.stub.push(self._caller.noted(frames()), timeout=self._caller.patience, lane=lane)
        return receive(session.receive, answer, pb.Receipt, b"receipt")

    def _ask(self, session: Session, request: pb.PullRequest, lane: int) -> tuple[pb.PullHead, chunks.Coming]:
        """The head, and the chunks that come with it. Reading those may fail as this does."""
        asked = send(session.send, request, b"pull")
        frames = self._caller.noted(self._caller.stub.pull(asked, timeout=self._caller.patience, lane=lane))
        head = receive(session.receive, frames, pb.PullHead, b"pull-answer")
        count = len(request.chunks) if head.status == pb.PullHead.STATUS_READY else 0
        if request.every and head.payload.chunks:
            count = len(chunks.shared(head.payload.chunks, request.every)[0])
        context = payload_context(head)
        return head, (session.receive.open(frames, context=context, limit=CHUNK_BYTES) for _ in range(count))

    def _lanes(self) -> int:
        return self._caller.agreement.run.wan.streams

    def _measured(self, report: RoundReport) -> RoundReport:
        wire = self._caller.stub.wire()
        return replace(
            report,
            up_bytes=wire.up_bytes,
            down_bytes=wire.down_bytes,
            payload_up_bytes=self._payload_up,
            payload_down_bytes=self._payload_down,
            retries=self._caller.retries,
            rtt_s=self._monitor.stats().rtt_s,
            life=self._life,
        )


_KINDS = {"update": pb.PullRequest.KIND_UPDATE, "state": pb.PullRequest.KIND_STATE}
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
