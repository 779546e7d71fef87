"""What agents ask of the coordinator, and its answers: sessions, checks on what comes in, long polls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from math import isfinite
from typing import TypeVar

from nebula.checkpoint.ledger import Ledger
from nebula.clock import REAL, Clock
from nebula.config import Agreement
from nebula.errors import AuthError, JournalError, PacketError
from nebula.federation import coordinator as machine
from nebula.federation import pulls
from nebula.federation.events import Arrived, Committed, Heard, Joined, Planned, Reported
from nebula.federation.journal import Journal
from nebula.federation.merge import largest_payload
from nebula.federation.sessions import Sessions, check_peer
from nebula.federation.shell import Shell
from nebula.federation.uploads import Upload, Uploads
from nebula.proto.v1 import run_pb2 as pb
from nebula.proto.v1.packet_pb2 import Frame
from nebula.security.pki import Identity
from nebula.security.session import answer
from nebula.types import ROLE, RoundReport
from nebula.wan.chunks import CHUNK_BYTES
from nebula.wan.messages import beat_of, held_of, plan_response, report_of
from nebula.wan.transport import payload_context, send

T = TypeVar("T")

LONG_POLL = 10.0
"""The most seconds a pull waits at the coordinator before the agent asks again; well under any proxy's idle limit, and
never so long that the agent takes it for silence."""


class Hub(Shell):
    """One run's coordinator. `tokenizer` is handed to whoever joins.

    `peer` arguments are the cluster named by the client certificate, None where no TLS is in between."""

    def __init__(
        self,
        agreement: Agreement,
        tokenizer: bytes,
        identity: Identity,
        journal: Journal,
        ledger: Ledger,
        emit: Callable[..., None],
        clock: Clock = REAL,
    ) -> None:
        super().__init__(agreement, journal, ledger, emit, clock)
        self._tokenizer = tokenizer
        self._identity = identity
        self._sessions = Sessions()
        self._uploads = Uploads(clock)
        self._late: dict[str, tuple[str, int]] = {}
        self._loans = pulls.Loans(ledger, agreement.run.membership.max_stall)

    # --- what agents ask ------------------------------------------------------------------------------------------

    def join(self, peer: str | None, request: pb.JoinRequest) -> pb.JoinResponse:
        cluster = request.offer.cluster
        check_peer(peer, cluster)
        if cluster not in self.agreement.members:
            raise AuthError(
                f"cluster {cluster!r} is not part of this run (members: {', '.join(self.agreement.members)})"
            )
        with self._changed:
            epoch = self._state.epochs.get(cluster, 0) + 1
            reply, session = answer(
                self._identity,
                request.offer,
                epoch=epoch,
                term=self._journal.term,
                agreement=self.agreement.digest(),
            )
            self._apply(Joined(cluster=cluster, epoch=epoch))
            self._sessions.answered(session)
        self._tell("joined", cluster=cluster, epoch=epoch)
        welcome = pb.Welcome(agreement=self.agreement.canonical(), tokenizer=self._tokenizer)
        return pb.JoinResponse(answer=reply, welcome=list(send(session.send, welcome, b"welcome")))

    def plan(self, peer: str | None, frames: Iterable[Frame]) -> Iterator[Frame]:
        session, request, _ = self._sessions.head(peer, frames, pb.PlanRequest, b"plan")
        held, report = held_of(request), report_of(request)
        if held.keys() != self._state.fragments.keys():
            raise PacketError(f"cluster {session.cluster} names fragments that this run does not have")
        with self._changed:
            if report is not None and report.round > self._state.reported.get(session.cluster, -1):
                self._check_report(session.cluster, report)
                self._apply(Reported(cluster=session.cluster, report=report))
            self._loans.give_back(session.cluster, self._clock.now())
            self._apply(Planned(cluster=session.cluster, held=held))
            reply = machine.plan(self._state, session.cluster, held)
        yield from send(session.send, plan_response(reply), b"plan-answer")

    def beat(self, peer: str | None, frames: Iterable[Frame]) -> Iterator[Frame]:
        session, request, _ = self._sessions.head(peer, frames, pb.BeatRequest, b"beat")
        beat = beat_of(request)
        self._apply(Heard(cluster=session.cluster, beat=beat))
        if beat.leaving:
            self._tell("left", cluster=session.cluster)
        yield from send(session.send, pb.BeatResponse(), b"beat-answer")

    def push(self, peer: str | None, frames: Iterable[Frame]) -> Iterator[Frame]:
        session, head, stream = self._sessions.head(peer, frames, pb.PushHead, b"push")
        self._check_head(session.cluster, head)
        receipt = self._settled(session.cluster, head)
        if receipt is None:
            upload = self._uploads.open(session.cluster, head, self._limit(session.cluster, head.fragment))
            chunks, context = head.payload.chunks, payload_context(head)
            for number in head.following:
                if number >= len(chunks):
                    raise PacketError(f"a delta of {len(chunks)} chunks has none of number {number}")
                noted = self._noted(session.cluster, stream)
                data = session.receive.open(noted, context=context, limit=CHUNK_BYTES)
                upload.state.put(chunks[number], data)
            receipt = self._received(session.cluster, head, upload)
        yield from send(session.send, receipt, b"receipt")

    def pull(self, peer: str | None, frames: Iterable[Frame]) -> Iterator[Frame]:
        session, request, _ = self._sessions.head(peer, frames, pb.PullRequest, b"pull")
        if request.role != ROLE or request.fragment not in self._state.fragments or request.kind not in pulls.KINDS:
            raise PacketError(f"no {request.kind} of fragment {request.fragment!r} in role {request.role!r}")
        status, commit = self._wait_for(session.cluster, request)
        if commit is None:
            yield from send(session.send, pb.PullHead(status=status, fragment=request.fragment), b"pull-answer")
            return
        sound = partial(self._sound, session.cluster, request, commit)
        head = sound(partial(pulls.head, self._ledger, commit, request))
        yield from send(session.send, head, b"pull-answer")
        context = payload_context(head)
        for chunk in pulls.wanted(self._ledger, commit, request):
            data = sound(partial(pulls.chunk, self._ledger, commit, request, chunk))
            yield from session.send.seal(data, context=context)

    def _noted(self, cluster: str, frames: Iterator[Frame]) -> Iterator[Frame]:
        """Whose payload moves is alive, however long it takes."""
        for frame in frames:
            self._apply(Heard(cluster=cluster))
            yield frame

    # --- parts ----------------------------------------------------------------------------------------------------

    def _check_report(self, cluster: str, report: RoundReport) -> None:
        """What a cluster says of itself is bounded by what can be true, as its weight is."""
        old = report.round < self._state.round - 1
        steps = self._state.rules.steps([cluster]) if old else self._state.span(report.round).steps
        most = steps * self.agreement.tokens_per_step(cluster)
        possible = report.round <= self._state.round and report.steps <= steps and report.tokens <= most
        figures = (report.loss, report.compute_s, report.stall_s, report.rtt_s)
        if not (possible and all(map(isfinite, figures)) and (report.eval is None or isfinite(report.eval.loss_sum))):
            raise PacketError(f"cluster {cluster} reports what cannot be: {report}")

    def _check_head(self, cluster: str, head: pb.PushHead) -> None:
        if head.role != ROLE or head.fragment not in self._merger.shapes:
            raise PacketError(f"no fragment {head.fragment!r} in role {head.role!r}")
        if head.base != head.round:
            raise PacketError(f"a delta of round {head.round} is measured against version {head.base}")
        if not (isfinite(head.weight) and head.weight >= 1):  # the sum of tiny ones vanishes in fp32
            raise PacketError(f"weight {head.weight} of {cluster} is not a positive number of tokens")

    def _limit(self, cluster: str, fragment: str) -> int:
        return largest_payload(self._merger.shapes[fragment], self.agreement.members[cluster].ranks)

    def _settled(self, cluster: str, head: pb.PushHead) -> pb.Receipt | None:
        """What became of a delta, if that is known: nothing more of it is wanted then."""
        verdict = self._verdict(cluster, head)
        before = self._state.fragments[head.fragment].arrived.get(cluster)
        if verdict == "accept" and (before is None or before.blob != head.payload.sha256.hex()):
            return None
        self._uploads.close(cluster, head)
        return self._receipt(cluster, head, verdict)

    def _received(self, cluster: str, head: pb.PushHead, upload: Upload) -> pb.Receipt:
        """After some of its chunks have come."""
        start = self._clock.now()
        with upload.turn:
            if (receipt := self._settled(cluster, head)) is not None:
                return receipt
            if missing := upload.state.places():
                return pb.Receipt(status=pb.Receipt.STATUS_INCOMPLETE, missing=missing)
            try:
                verdict = self._deliver(cluster, head, upload.state.whole())
            finally:
                self._uploads.close(cluster, head)
        receipt = self._receipt(cluster, head, verdict)
        receipt.seconds = self._clock.now() - start
        return receipt

    def _receipt(self, cluster: str, head: pb.PushHead, verdict: str) -> pb.Receipt:
        late = head.fragment, head.round
        if verdict == "late" and self._late.get(cluster) != late:  # each connection hears of it
            self._late[cluster] = late
            self._tell("late", cluster=cluster, round=head.round, fragment=head.fragment)
        return pb.Receipt(status=_RECEIPTS[verdict])

    def _deliver(self, cluster: str, head: pb.PushHead, payload: bytes) -> str:
        if not self._merger.check(head.fragment, head.base, payload, head.parts):
            return "late"  # the deadline passed just now
        with self._changed:  # held over both: a blob that no event refers to yet would be swept up
            blob = self._guard(lambda: self._ledger.put(payload))
            verdict = self._verdict(cluster, head)  # a deadline may have passed while the delta was checked
            if verdict == "accept":
                most = self._state.span(head.round).steps * self.agreement.tokens_per_step(cluster)
                self._accept(cluster, head, blob, min(head.weight, most))
        return verdict

    def _verdict(self, cluster: str, head: pb.PushHead) -> str:
        try:
            return machine.receipt(self._state, cluster, head.fragment, head.round)
        except ValueError as error:
            raise PacketError(f"cluster {cluster}: {error}") from error

    def _accept(self, cluster: str, head: pb.PushHead, blob: str, weight: float) -> None:
        before = self._state.fragments[head.fragment].arrived.get(cluster)
        if before is not None and before.blob == blob:
            return
        seconds = self._clock.now() - self._state.opened if self._state.witnessed else None
        self._apply(
            Arrived(
                cluster=cluster,
                fragment=head.fragment,
                round=head.round,
                weight=weight,
                blob=blob,
                parts=tuple(head.parts),
                seconds=seconds,
            )
        )
        self._tell(
            "delta", cluster=cluster, round=head.round, fragment=head.fragment, bytes=sum(head.parts), seconds=seconds
        )

    def _sound(self, cluster: str, request: pb.PullRequest, commit: Committed, read: Callable[[], T]) -> T:
        """What is read of a commit that was found for a request. Raises ConnectionError if its time is over meanwhile,
        JournalError if it is damaged."""
        try:
            return read()
        except JournalError:
            with self._changed:
                if self._look(cluster, request)[1] is commit:
                    return self._guard(read)
            raise ConnectionError(f"{commit.fragment} version {commit.version} is no longer kept") from None

    def _wait_for(self, cluster: str, request: pb.PullRequest) -> pulls.Found:
        """What is asked, up to a long poll later."""
        until = self._clock.now() + min(LONG_POLL, self.agreement.run.membership.max_stall / 2)
        with self._changed:
            while True:
                if self._failure is not None:
                    raise self._failure
                status, commit = self._look(cluster, request)
                left = until - self._clock.now()
                if status != pb.PullHead.STATUS_PENDING or left <= 0:
                    break
                self._changed.wait(left)
            if commit is not None and request.kind == pb.PullRequest.KIND_STATE:
                self._loans.lend(cluster, commit, self._clock.now())
        return status, commit

    def _look(self, cluster: str, request: pb.PullRequest) -> pulls.Found:
        return pulls.find(self._state, self._loans.find(cluster, request.fragment), request)


_RECEIPTS = {
    "accept": pb.Receipt.STATUS_ACCEPTED,
    "duplicate": pb.Receipt.STATUS_DUPLICATE,
    "late": pb.Receipt.STATUS_LATE,
}
