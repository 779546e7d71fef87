"""What a member of the federation that is faulty or hostile can do to the coordinator: nothing. It has genuine keys and
says whatever it likes; each attack gets a typed error, changes no state and costs the others nothing."""

from __future__ import annotations

import os
import random
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

import grpc
import pytest
import torch

from nebula.config import Codec, Membership
from nebula.errors import AuthError, FrameError, NebulaError, PacketError, SessionError
from nebula.federation import hub as hub_module
from nebula.federation.memory import MemoryStub
from nebula.federation.service import Service
from nebula.federation.state import State
from nebula.proto.v1 import run_pb2 as pb
from nebula.proto.v1.packet_pb2 import Frame
from nebula.security.pki import Identity
from nebula.security.seal import FRAME_BYTES
from nebula.security.session import Session, offer
from nebula.types import ROLE, Slice
from nebula.wan.chunks import CHUNK_BYTES, manifest, spans
from nebula.wan.codec import Encoder
from nebula.wan.frame import pack
from nebula.wan.transport import payload_context, receive, send
from tests.federated import Federated, clusters, tiny, write_corpus

TOKENS = 2 * 2 * 32
"""Inner steps · batch · sequence length: what one cluster can train in one round."""


@pytest.fixture(scope="module")
def federate(tmp_path_factory) -> Callable[[Path], Federated]:
    folder = tmp_path_factory.mktemp("hub")
    run = tiny(write_corpus(folder / "corpus"), inner_steps=2, membership=Membership(quorum=2, max_stall=60.0))
    return lambda where: Federated(run, clusters(north=1, south=1), where, folder / "cache")


class Member:
    """A cluster with keys of its own, that seals and sends whatever it is told to."""

    def __init__(self, federated: Federated, name: str) -> None:
        self.name = name
        self.hub = federated.hub
        self.stub = MemoryStub(federated.hub)
        self.agreement = federated.agreement.digest()
        self.identity = Identity.load(federated.folder / "pki" / name)
        self.session = self.join()

    def join(self) -> Session:
        self.offered, pending = offer(self.identity, self.agreement)
        response = self.stub.join(pb.JoinRequest(offer=self.offered), timeout=1.0)
        session = pending.complete(response.answer)
        receive(session.receive, iter(response.welcome), pb.Welcome, b"welcome")
        return session

    def delta(self, fragment: str = "f0", **changes: torch.Tensor) -> dict[Slice, torch.Tensor]:
        """An honest delta, some parameters of which may be replaced."""
        shapes = self.hub._merger.shapes[fragment]
        generator = torch.Generator().manual_seed(0)
        tensors = {n: changes.get(n, torch.randn(s, generator=generator)) for n, s in shapes.items()}
        return {Slice(n, (0,) * t.dim(), tuple(t.shape)): t for n, t in tensors.items()}

    def frames(self, packet: bytes, /, **changes: object) -> Iterator[Frame]:
        """A push of one packet, under a head that may say something else."""
        fields = {"role": ROLE, "fragment": "f0", "round": 0, "base": 0, "weight": 64.0, "parts": [len(packet)]}
        whole = manifest(memoryview(packet), CHUNK_BYTES)
        following = range(len(whole.chunks))
        head = pb.PushHead(**{**fields, "payload": whole, "following": following, **changes})
        yield from send(self.session.send, head, b"push")
        for at, length in spans(len(packet), CHUNK_BYTES):
            yield from self.session.send.seal(packet[at : at + length], context=payload_context(head))

    def deliver(self, frames: Iterator[Frame]) -> pb.Receipt.Status.ValueType:
        answer = self.stub.push(iter(frames), timeout=1.0, lane=0)
        return receive(self.session.receive, answer, pb.Receipt, b"receipt").status

    def push(self, packet: bytes, /, **changes: object) -> pb.Receipt.Status.ValueType:
        return self.deliver(self.frames(packet, **changes))

    def plan(self, request: pb.PlanRequest) -> pb.PlanResponse:
        answer = self.stub.plan(send(self.session.send, request, b"plan"), timeout=1.0)
        return receive(self.session.receive, answer, pb.PlanResponse, b"plan-answer")

    def pull(self, **fields: object) -> pb.PullHead:
        request = pb.PullRequest(**{"kind": pb.PullRequest.KIND_UPDATE, "role": ROLE, "fragment": "f0", **fields})
        answer = self.stub.pull(send(self.session.send, request, b"pull"), timeout=1.0, lane=0)
        return receive(self.session.receive, answer, pb.PullHead, b"pull-answer")

    def held(self, **versions: int) -> dict[str, pb.Held]:
        fragments = self.hub.state.fragments.items()
        return {n: pb.Held(version=versions.get(n, f.version), digest=f.digest) for n, f in fragments}


def encoded(slices: dict[Slice, torch.Tensor]) -> bytes:
    return pack(Encoder(Codec(steps=(), feedback=None)).encode(slices))


@pytest.fixture
def federated(federate, tmp_path) -> Iterator[Federated]:
    federated = federate(tmp_path)
    yield federated
    federated.hub.close()


@pytest.fixture
def honest(federated) -> Member:
    return Member(federated, "north")


@pytest.fixture
def attacker(federated, honest) -> Member:
    return Member(federated, "south")


def but_for_liveness(state: State) -> State:
    return replace(state, pulses={}, progress={})


@pytest.fixture
def unharmed(federated, honest, attacker) -> Iterator[None]:
    """Whatever happens in between leaves the state as it was, and both clusters are served afterwards."""
    before = but_for_liveness(federated.hub.state)
    yield
    assert but_for_liveness(federated.hub.state) == before
    federated.hub.tick()
    for member in (honest, attacker):
        assert member.plan(pb.PlanRequest(held=member.held())).action == pb.PlanResponse.ACTION_TRAIN
        assert member.push(encoded(member.delta())) == pb.Receipt.STATUS_ACCEPTED
    with federated.hub._changed:
        assert federated.hub._changed.wait_for(lambda: federated.hub.state.fragments["f0"].version == 1, timeout=30)


@pytest.fixture
def flat_memory() -> Iterator[None]:
    """The resident set may peak at most 16 MiB above where it was."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = kib("VmRSS")
    yield
    assert kib("VmHWM") - before < 16 * 1024


def kib(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


def refused(kind: type[NebulaError], act: Callable[[], object], *, reason: str = "") -> None:
    with pytest.raises(kind) as caught:
        act()
    assert type(caught.value) is kind
    assert str(caught.value)
    if isinstance(caught.value, FrameError):
        assert caught.value.reason == reason


# --- deltas that are not what they should be ----------------------------------------------------------------------


def with_value(value: float) -> Callable[[Member], dict[Slice, torch.Tensor]]:
    def spoil(member):
        delta = member.delta()
        next(iter(delta.values())).view(-1)[7] = value
        return delta

    return spoil


def without_a_parameter(member):
    return dict(list(member.delta().items())[1:])


def with_another_fragments_parameter(member):
    return {**member.delta(), **dict(islice(member.delta("f1").items(), 1))}


def with_an_overlap(member):
    where, values = max(member.delta().items(), key=lambda item: item[0].shape)
    half = Slice(where.name, where.offset, (where.shape[0] // 2, *where.shape[1:]))
    rest = {at: x for at, x in member.delta().items() if at != where}
    again = Slice(where.name, (1, *where.offset[1:]), half.shape)
    return {**rest, half: values[: half.shape[0]].contiguous(), again: values[: half.shape[0]].contiguous()}


def beyond_the_edge(member):
    where = next(iter(member.delta()))
    moved = Slice(where.name, (1, *where.offset[1:]), where.shape)
    return {moved if at == where else at: x for at, x in member.delta().items()}


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    "spoilt",
    [
        with_value(float("nan")),
        with_value(float("inf")),
        without_a_parameter,
        with_another_fragments_parameter,
        with_an_overlap,
        beyond_the_edge,
    ],
    ids=["nan", "inf", "missing", "foreign", "overlap", "outside"],
)
def test_a_delta_that_does_not_tile_its_fragment_with_finite_values(spoilt, attacker):
    refused(PacketError, lambda: attacker.push(encoded(spoilt(attacker))))


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("parts", [[], [1], [0, 0], [10, -10 % 2**64], [2**63, 2**63]])
def test_parts_that_do_not_add_up(parts, attacker):
    refused(PacketError, lambda: attacker.push(encoded(attacker.delta()), parts=parts))


@pytest.mark.usefixtures("unharmed")
def test_parts_that_split_a_packet_in_the_wrong_place(attacker):
    payload = encoded(attacker.delta())
    refused(PacketError, lambda: attacker.push(payload, parts=[100, len(payload) - 100]))
    refused(PacketError, lambda: attacker.push(payload, parts=[len(payload), 0]))


@pytest.mark.usefixtures("unharmed")
def test_bytes_that_are_no_packet(attacker):
    for size in (0, 1, 1000):
        refused(PacketError, lambda size=size: attacker.push(os.urandom(size)))


# --- heads that say what is not so --------------------------------------------------------------------------------


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    "lie",
    [
        {"weight": -1.0},
        {"weight": 0.0},
        {"weight": 1e-30},
        {"weight": float("nan")},
        {"weight": float("inf")},
        {"round": 1, "base": 1},
        {"round": 2**63, "base": 2**63},
        {"base": 1},
        {"fragment": "f9"},
        {"fragment": ""},
        {"role": "teacher"},
    ],
    ids=str,
)
def test_a_head_that_cannot_be(lie, attacker):
    refused(PacketError, lambda: attacker.push(encoded(attacker.delta()), **lie))


def test_a_weight_is_bounded_by_what_can_have_been_trained(attacker):
    assert attacker.push(encoded(attacker.delta()), weight=1e300) == pb.Receipt.STATUS_ACCEPTED
    assert attacker.hub.state.fragments["f0"].arrived["south"].weight == TOKENS


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    "lie",
    [
        {"sha256": bytes(32)},
        {"sha256": b"short"},
        {"chunks": [bytes(32)]},
        {"chunks": []},
        {"chunks": [bytes(32)] * 2},
        {"bytes": 1},
        {"bytes": 2**64 - 1},
        {"bytes": 1 << 40, "chunks": [bytes(32)] * 10_000},
    ],
    ids=lambda lie: str(lie)[:40],
)
def test_a_manifest_of_something_else(lie, attacker):
    payload = encoded(attacker.delta())
    whole = manifest(memoryview(payload), CHUNK_BYTES)
    fields = {"bytes": whole.bytes, "sha256": whole.sha256, "chunks": whole.chunks}
    refused(PacketError, lambda: attacker.push(payload, payload=pb.Manifest(**{**fields, **lie})))


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("following", [[1], [2**32 - 1], [0, 1]], ids=str)
def test_chunks_that_there_are_not(following, attacker):
    refused(PacketError, lambda: attacker.push(encoded(attacker.delta()), following=following))


# --- streams ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unharmed", "flat_memory")
def test_a_payload_without_end_is_read_no_further_than_its_limit(attacker):
    taken = []

    def watched(frames):
        for frame in frames:
            taken.append(len(frame.ciphertext))
            yield frame

    message = bytes(256 << 20)  # pages of zeros that nothing touches, unless it is sent
    refused(FrameError, lambda: attacker.deliver(watched(endless(attacker, message))), reason="size")
    assert sum(taken) < 3 * FRAME_BYTES


def endless(member: Member, message: bytes) -> Iterator[Frame]:
    whole = pb.Manifest(bytes=10, sha256=bytes(32), chunks=[bytes(32)])
    head = pb.PushHead(role=ROLE, fragment="f0", weight=64.0, parts=[10], payload=whole, following=[0])
    yield from send(member.session.send, head, b"push")
    yield from member.session.send.seal(message, context=payload_context(head))


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("kept", [0, 1])
def test_a_stream_that_breaks_off(kept, attacker):
    frames = attacker.frames(encoded(attacker.delta()))
    refused(FrameError, lambda: attacker.deliver(islice(frames, kept)), reason="order" if kept else "schema")


@pytest.mark.usefixtures("unharmed")
def test_a_payload_under_another_head(attacker):
    payload = encoded(attacker.delta())
    first, second = list(attacker.frames(payload)), list(attacker.frames(payload, weight=1.0))
    refused(FrameError, lambda: attacker.deliver([first[0], *second[1:]]), reason="auth")


@pytest.mark.usefixtures("unharmed")
def test_a_message_passed_off_as_another_kind(attacker):
    frames = list(attacker.frames(encoded(attacker.delta())))
    refused(FrameError, lambda: list(attacker.stub.plan(iter(frames), timeout=1.0)), reason="auth")


@pytest.mark.usefixtures("unharmed")
def test_a_message_that_does_not_parse(attacker):
    frames = attacker.session.send.seal(b"\xff" * 40, context=b"plan")
    refused(FrameError, lambda: list(attacker.stub.plan(frames, timeout=1.0)), reason="schema")


def test_frames_of_an_earlier_push_again(attacker):
    frames = list(attacker.frames(encoded(attacker.delta())))
    assert attacker.deliver(frames) == pb.Receipt.STATUS_ACCEPTED
    before = attacker.hub.state
    refused(FrameError, lambda: attacker.deliver(frames), reason="replay")
    assert attacker.hub.state == before


@pytest.mark.usefixtures("unharmed")
def test_frames_in_the_name_of_another_cluster(honest, attacker):
    forged = []
    for frame in attacker.frames(encoded(attacker.delta())):
        frame.source, frame.epoch = "north", honest.session.epoch
        forged.append(frame)
    refused(FrameError, lambda: list(attacker.stub.push(iter(forged), timeout=1.0, lane=0)), reason="auth")
    forged[0].source = "nowhere"
    refused(SessionError, lambda: list(attacker.stub.push(iter(forged), timeout=1.0, lane=0)))


@pytest.mark.usefixtures("unharmed", "flat_memory")
def test_ten_thousand_frames_of_garbage(attacker):
    dice = random.Random(0)
    for _ in range(10_000):
        garbage = Frame(
            source=dice.choice(["north", "south", "coordinator", ""]),
            epoch=dice.choice([0, 1, 2, 2**64 - 1]),
            counter=dice.choice([0, 1, 2**32, 2**64 - 1]),
            index=dice.choice([0, 0, 1]),
            last=dice.choice([True, False]),
            ciphertext=dice.randbytes(dice.choice([0, 16, 17, 100])),
        )
        method = dice.choice(["plan", "push", "pull"])
        lane = {} if method == "plan" else {"lane": 0}
        with pytest.raises((FrameError, SessionError)):
            list(getattr(attacker.stub, method)(iter([garbage]), timeout=1.0, **lane))


# --- plans and pulls ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unharmed")
def test_plans_of_fragments_that_are_not_the_runs(attacker):
    for held in ({}, {"f0": pb.Held()}, {**attacker.held(), "f9": pb.Held()}):
        refused(PacketError, lambda held=held: attacker.plan(pb.PlanRequest(held=held)))


@pytest.mark.usefixtures("unharmed")
def test_a_plan_of_versions_that_do_not_exist_is_set_right(attacker, federated):
    answer = attacker.plan(pb.PlanRequest(held=attacker.held(f0=2**64 - 1)))
    assert answer.action == pb.PlanResponse.ACTION_CATCH_UP
    assert [(f.name, f.base) for f in answer.fragments] == [("f0", 0)]
    (alarm,) = federated.events("alarm")
    assert (alarm["kind"], alarm["cluster"]) == ("ahead_of_coordinator", "south")


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    "lie",
    [
        {"round": 1},
        {"round": 2**64 - 1},
        {"steps": 3},
        {"tokens": TOKENS + 1},
        {"loss": float("nan")},
        {"compute_seconds": float("inf")},
        {"stall_seconds": float("nan")},
        {"rtt_seconds": float("nan")},
        {"eval_tokens": 1, "eval_loss_sum": float("nan")},
    ],
    ids=str,
)
def test_a_report_of_what_cannot_be(lie, attacker, federated):
    report = pb.RoundReport(**{"round": 0, "steps": 2, "tokens": TOKENS, "loss": 1.0, **lie})
    refused(PacketError, lambda: attacker.plan(pb.PlanRequest(held=attacker.held(), report=report)))
    assert federated.hub.tally.of("south").tokens == 0


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("lie", [{"fragment": "f9"}, {"role": "teacher"}, {"kind": 0}, {"kind": 7}], ids=str)
def test_pulls_of_what_there_is_not(lie, attacker):
    refused(PacketError, lambda: attacker.pull(**lie))


@pytest.mark.usefixtures("unharmed")
def test_a_pull_of_a_version_that_will_never_be(attacker):
    assert attacker.pull(version=2**64 - 1).status == pb.PullHead.STATUS_ENDED


def test_closing_sends_away_whoever_waits(honest, monkeypatch):
    monkeypatch.setattr(hub_module, "LONG_POLL", 1e6)
    waiting, wait = threading.Event(), honest.hub._changed.wait

    def spy(timeout):
        waiting.set()
        return wait(timeout)

    honest.hub._changed.wait = spy
    with ThreadPoolExecutor(1) as pool:
        pulling = pool.submit(honest.pull, version=1)
        assert waiting.wait(30)
        honest.hub.close()
        refused(NebulaError, lambda: pulling.result(timeout=20))


# --- sessions -----------------------------------------------------------------------------------------------------


def test_an_old_offer_played_again_does_not_end_the_session_in_use(honest):
    recorded = honest.offered
    honest.session = honest.join()
    assert honest.push(encoded(honest.delta())) == pb.Receipt.STATUS_ACCEPTED
    for _ in range(3):
        honest.stub.join(pb.JoinRequest(offer=recorded), timeout=1.0)  # whoever does it cannot read the answer
    assert honest.push(encoded(honest.delta("f1")), fragment="f1") == pb.Receipt.STATUS_ACCEPTED


def test_the_first_frame_of_a_new_session_ends_the_old_one(honest):
    assert honest.pull(kind=pb.PullRequest.KIND_STATE).status == pb.PullHead.STATUS_READY
    late = list(honest.frames(encoded(honest.delta())))
    before, honest.session = honest.session, honest.join()
    assert honest.pull(kind=pb.PullRequest.KIND_STATE).status == pb.PullHead.STATUS_READY
    refused(SessionError, lambda: honest.deliver(late))
    honest.session = before
    refused(SessionError, lambda: honest.push(encoded(honest.delta())))


def test_a_frame_that_only_claims_the_new_epoch_ends_nothing(honest):
    assert honest.pull(kind=pb.PullRequest.KIND_STATE).status == pb.PullHead.STATUS_READY
    before, honest.session = honest.session, honest.join()
    forged = list(before.send.seal(b"", context=b"pull"))
    forged[0].epoch = honest.session.epoch
    refused(FrameError, lambda: list(honest.stub.pull(iter(forged), timeout=1.0, lane=0)), reason="auth")
    honest.session = before
    assert honest.push(encoded(honest.delta())) == pb.Receipt.STATUS_ACCEPTED


@pytest.mark.usefixtures("unharmed")
def test_a_cluster_that_is_no_member(attacker):
    attacker.offered.cluster = "stranger"
    with pytest.raises(AuthError, match="'stranger' is not part of this run"):
        attacker.stub.join(pb.JoinRequest(offer=attacker.offered), timeout=1.0)


@pytest.mark.usefixtures("unharmed")
def test_an_offer_in_the_name_of_another_member(attacker):
    attacker.offered.cluster = "north"
    refused(AuthError, lambda: attacker.stub.join(pb.JoinRequest(offer=attacker.offered), timeout=1.0))


# --- what the service makes of it ---------------------------------------------------------------------------------


class Aborted(Exception):
    """What gRPC raises inside `abort`."""


class Call:
    """As much of a gRPC context as the service needs, of a client with a certificate."""

    def __init__(self, certificate_pem: bytes) -> None:
        self._certificate_pem = certificate_pem
        self.code: grpc.StatusCode | None = None

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_pem_cert": [self._certificate_pem]}

    def abort(self, code: grpc.StatusCode, details: str) -> None:
        self.code = code
        raise Aborted(details)


def flipped(frames: Iterator[Frame]) -> Iterator[Frame]:
    """A bit of each ciphertext."""
    for frame in frames:
        frame.ciphertext = bytes([frame.ciphertext[0] ^ 1]) + frame.ciphertext[1:]
        yield frame


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    ("attack", "code", "reason"),
    [
        (lambda m: m.frames(b"", weight=-1.0), grpc.StatusCode.INVALID_ARGUMENT, "PacketError"),
        (lambda m: flipped(m.frames(encoded(m.delta()))), grpc.StatusCode.DATA_LOSS, "auth"),
        (lambda m: islice(m.frames(b"ab"), 1), grpc.StatusCode.CANCELLED, None),
        (lambda m: iter([]), grpc.StatusCode.CANCELLED, None),
        (lambda m: iter([Frame(source="north", epoch=1)]), grpc.StatusCode.PERMISSION_DENIED, "AuthError"),
        (lambda m: iter([Frame(source="south", epoch=9)]), grpc.StatusCode.UNAUTHENTICATED, None),
    ],
    ids=["packet", "damage", "broken", "empty", "auth", "session"],
)
def test_refusals_are_counted_and_become_a_status(attack, code, reason, attacker, federated):
    call = Call(attacker.identity.certificate_pem)
    service = Service(federated.hub, attacker.identity.authority_pem)
    with pytest.raises(Aborted):
        list(service.Push(attack(attacker), call))
    assert call.code == code
    expected = [reason] if reason else []
    assert federated.hub.tally.rejected == dict.fromkeys(expected, 1)
    assert [e["reason"] for e in federated.events("rejected") if e["cluster"] == "south"] == expected
