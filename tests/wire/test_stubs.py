"""One suite for both ways to reach a coordinator: every answer it can give is the same in memory and over gRPC."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest
import torch

from nebula.config import Codec
from nebula.errors import AuthError, PacketError
from nebula.federation import hub as hub_module
from nebula.federation.hub import Hub
from nebula.federation.merge import read_state
from nebula.proto.v1 import run_pb2 as pb
from nebula.runtime.gateway import Gateway
from nebula.types import ROLE, Evaluation, Held, PushTicket, RoundReport, Slice
from nebula.wan.codec import Encoder, decode
from nebula.wan.frame import pack, unpack
from tests.federated import Federated
from tests.wire.wired import wait_for, wired


@dataclass
class Both:
    """Two clusters without ranks: their deltas are made up."""

    federated: Federated
    north: Gateway
    south: Gateway

    @property
    def hub(self) -> Hub:
        return self.federated.hub

    def held(self) -> dict[str, Held]:
        return {name: Held(f.version, f.digest) for name, f in self.hub.state.fragments.items()}

    def commit(self, round: int) -> None:
        """Both deliver every fragment of a round."""
        for fragment in self.hub.state.fragments:
            for gateway in (self.north, self.south):
                assert push(self, gateway, fragment, round) == "accepted"
        wait_for(self.hub, lambda: self.hub.state.round > round)


def delta(federated: Federated, fragment: str, seed: int) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    shapes = federated.hub._merger.shapes[fragment]
    tensors = {Slice(n, (0,) * len(s), s): torch.randn(s, generator=generator) for n, s in shapes.items()}
    return pack(Encoder(Codec(steps=(), feedback=None)).encode(tensors))


def push(both: Both, gateway: Gateway, fragment: str, round: int) -> str:
    ticket = PushTicket(role=ROLE, fragment=fragment, round=round, base=round, weight=64.0)
    return gateway.push(ticket, [delta(both.federated, fragment, round)])


@contextmanager
def in_memory(federated: Federated) -> Iterator[Both]:
    yield Both(federated, federated.gateway("north"), federated.gateway("south"))
    federated.hub.close()


@contextmanager
def over_grpc(federated: Federated) -> Iterator[Both]:
    with wired(federated) as wires, ExitStack() as stack:
        both = Both(federated, wires.gateway("north"), wires.gateway("south"))
        stack.callback(both.north.close)
        stack.callback(both.south.close)
        yield both


@pytest.fixture(params=[in_memory, over_grpc])
def both(request, federate, tmp_path) -> Iterator[Both]:
    with request.param(federate(tmp_path)) as both:
        yield both


def test_join_hands_over_agreement_and_tokenizer(both):
    agreement, tokenizer = both.north.join()
    assert agreement == both.federated.agreement.canonical()
    assert tokenizer.decode() == both.federated.tokenizer
    both.north.join()
    assert both.hub.state.epochs == {"north": 2}


def test_join_is_refused_for_another_agreement(both):
    both.north._caller._digest = "sha256:another"
    with pytest.raises(AuthError, match="another"):
        both.north.join()
    assert both.hub.state.epochs == {}


def test_plan_says_what_to_do_next(both):
    first = both.north.plan(both.held(), None)
    assert (first.action, first.round, first.inner_steps) == ("train", 0, 2)
    assert first.fragments == {"f0": 0, "f1": 0}
    assert (first.eval_index, first.eval_count) == (0, 2)
    assert both.south.plan(both.held(), None).eval_index == 1
    held = both.held()
    both.commit(0)
    behind = both.south.plan({**held, "f1": both.held()["f1"]}, None)
    assert (behind.action, behind.fragments) == ("catch_up", {"f0": 1})
    both.hub.stop("a test asks")
    stopped = both.north.plan(both.held(), None)
    assert (stopped.action, stopped.reason) == ("stop", "a test asks")


def test_plan_brings_the_report(both):
    evaluation = Evaluation(loss_sum=12.5, tokens=4)
    report = RoundReport(round=0, steps=2, tokens=100, loss=3.25, compute_s=1.5, stall_s=0.5, eval=evaluation)
    both.commit(0)
    both.north.plan(both.held(), report)
    heard = both.hub.state.reports[0]["north"]
    assert (heard.steps, heard.tokens, heard.loss, heard.compute_s, heard.stall_s) == (2, 100, 3.25, 1.5, 0.5)
    assert heard.eval == evaluation
    assert heard.payload_up_bytes == sum(len(delta(both.federated, fragment, 0)) for fragment in ("f0", "f1"))


def test_push_is_accepted_until_its_round_is_committed_then_duplicate_then_late(both):
    assert push(both, both.north, "f0", 0) == "accepted"
    assert push(both, both.north, "f0", 0) == "accepted"
    assert len(both.federated.events("delta")) == 1  # the very same delta
    both.commit(0)
    assert push(both, both.north, "f0", 0) == "duplicate"
    both.commit(1)
    assert push(both, both.north, "f0", 0) == "late"
    assert len(both.federated.events("delta")) == 2 * 2 * 2


@pytest.mark.parametrize(("fragment", "round"), [("f0", 1), ("f9", 0)])
def test_push_of_what_does_not_exist_is_refused(fragment, round, both):
    ticket = PushTicket(role=ROLE, fragment=fragment, round=round, base=round, weight=64.0)
    with pytest.raises(PacketError, match=fragment):
        both.north.push(ticket, [delta(both.federated, "f0", 0)])


def test_pull_waits_for_a_commit_and_brings_it(both, monkeypatch):
    monkeypatch.setattr(hub_module, "LONG_POLL", 0.0)
    request = pb.PullRequest(kind=pb.PullRequest.KIND_UPDATE, role=ROLE, fragment="f0", version=1)
    head, coming = both.north._caller.call(lambda session: both.north._ask(session, request, 0))
    assert (head.status, [*coming]) == (pb.PullHead.STATUS_PENDING, [])
    _, before = both.north.pull("state", "f0", 0)
    both.commit(0)
    pulled, update = both.north.pull("update", "f0", 1)
    assert (pulled.status, pulled.version, pulled.contributors) == ("ready", 1, ("north", "south"))
    assert pulled.digest == both.held()["f0"].digest
    state, after = both.north.pull("state", "f0", 1)
    assert (state.status, state.version, state.digest) == ("ready", 1, pulled.digest)
    applied = decode(unpack(update, max_bytes=len(update)), max_elements=1 << 20)
    step = {where.name: values for where, values in applied.items()}
    for name, values in read_state(after).items():
        assert torch.equal(values, read_state(before)[name] + step[name])


def test_pull_of_what_is_no_longer_kept_or_will_never_be(both):
    both.commit(0)
    both.commit(1)
    assert both.north.pull("update", "f0", 1)[0].status == "ready"  # for who is one round behind
    assert both.north.pull("update", "f0", 0)[0].status == "gone"
    assert both.north.pull("update", "f0", 3)[0].status == "ended"  # the run has two rounds


def test_a_session_that_was_forgotten_is_opened_again(both):
    both.north.join()
    both.hub._sessions = hub_module.Sessions()
    assert both.north.plan(both.held(), None).action == "train"
    assert both.hub.state.epochs == {"north": 2}
