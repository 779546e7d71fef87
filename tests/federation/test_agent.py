"""The agent's loop over an engine and a transport of straw."""

from __future__ import annotations

import threading

import pytest

from nebula.errors import NebulaError, RankFailure
from nebula.federation.agent import MOST_REBUILDS, Agent
from nebula.types import Evaluation, Held, Pulled, Report, RoundPlan

TRAIN = {
    round: RoundPlan(action="train", round=round, inner_steps=1, fragments={"f0": round, "f1": round})
    for round in range(4)
}
CATCH_UP = RoundPlan(action="catch_up", round=1, fragments={"f0": 1, "f1": 1})
STOP = RoundPlan(action="stop")
DONE = RoundPlan(action="done")


class Engine:
    """`failing`: method → how many of its first calls lose a rank."""

    def __init__(self, **failing: int) -> None:
        self.failing, self.calls = failing, []

    def _called(self, method: str, *args) -> None:
        self.calls.append((method, *args))
        if self.failing.get(method, 0):
            self.failing[method] -= 1
            raise RankFailure(0, "rank 0 was killed")

    def start(self):
        self._called("start")
        return {"f0": Held(0, "d0"), "f1": Held(0, "d0")}

    def train(self, steps):
        self._called("train", steps.round)
        return Report(steps=steps.count, tokens=10, loss=1.0, seconds=1.0)

    def pull(self, fragment):
        self._called("pull", fragment)
        return [b"packet"]

    def push(self, fragment, kind, payload, *, merged):
        self._called("push", fragment, kind, merged)
        return payload

    def evaluate(self, index, count):
        return Evaluation(loss_sum=1.0, tokens=1)

    def save(self, tag, held):
        self._called("save", tag, {name: h.version for name, h in held.items()})

    def stop(self):
        self._called("stop")

    def saves(self):
        return [call[1:] for call in self.calls if call[0] == "save"]


class Transport:
    def __init__(self, *plans: RoundPlan, ends: frozenset[str] = frozenset()) -> None:
        self.plans, self.ends, self.reports, self.beats = list(plans), ends, [], []

    def beat(self, beat):
        self.beats.append(beat)

    def plan(self, held, report):
        self.reports.append(report)
        return self.plans.pop(0)

    def push(self, ticket, packets):
        return "accepted"

    def pull(self, kind, fragment, version):
        if fragment in self.ends:
            return Pulled(status="ended"), b""
        return Pulled(status="ready", version=version, digest=f"d{version}", contributors=("north",)), f"d{version}"


def agent(engine, transport, every: int = 1) -> Agent:
    return Agent("north", engine, transport, emit=lambda *_, **__: None, checkpoint_every=every)


def test_a_stop_between_checkpoints_saves_what_is_not_on_disk_yet():
    engine = Engine()
    assert agent(engine, Transport(TRAIN[0], TRAIN[1], TRAIN[2], RoundPlan(action="stop", round=3)), 2).run() == "stop"
    assert engine.saves() == [(2, {"f0": 2, "f1": 2}), (3, {"f0": 3, "f1": 3})]
    assert engine.calls[-1] == ("stop",)


def test_what_is_on_disk_is_not_written_again():
    engine = Engine()
    agent(engine, Transport(TRAIN[0], RoundPlan(action="stop", round=1))).run()
    assert engine.saves() == [(1, {"f0": 1, "f1": 1})]


def test_a_round_that_the_stop_cut_off_is_neither_reported_nor_saved():
    engine, transport = Engine(), Transport(TRAIN[0], STOP, ends=frozenset({"f1"}))
    assert agent(engine, transport).run() == "stop"
    assert transport.reports == [None, None]
    assert engine.saves() == []


def test_a_round_that_the_stop_cut_off_is_not_trained_on_top_of_itself_when_the_run_goes_on():
    class Stopped(Transport):
        def pull(self, kind, fragment, version):
            answer = super().pull(kind, fragment, version)
            self.ends = frozenset()
            return answer

    engine, transport = Engine(), Stopped(TRAIN[0], TRAIN[0], DONE, ends=frozenset({"f0", "f1"}))
    assert agent(engine, transport).run() == "done"
    assert [call for call in engine.calls if call[0] == "train"] == [("train", 0)]
    assert transport.reports[-1].tokens == 10


@pytest.mark.parametrize(
    ("plans", "failing"),
    [((TRAIN[0], TRAIN[0], DONE), "push"), ((CATCH_UP, CATCH_UP, DONE), "push"), ((DONE,), "start")],
)
def test_a_rank_may_die_at_any_time(plans, failing):
    engine = Engine(**{failing: 1})
    one = agent(engine, Transport(*plans))
    assert one.run() == "done"
    assert one.rebuilds == 1
    assert [call[0] for call in engine.calls].count("start") == 2


def test_ranks_that_die_at_once_again_and_again_end_the_agent():
    engine = Engine(start=99)
    with pytest.raises(NebulaError, match="lost a rank 6 times") as caught:
        agent(engine, Transport()).run()
    assert not isinstance(caught.value, RankFailure)
    assert engine.calls == [("start",)] * (MOST_REBUILDS + 1)


def test_an_agent_that_is_told_to_end_does_not_wait_for_the_others():
    release, pulled = threading.Event(), []

    class Slow(Transport):
        def pull(self, kind, fragment, version):
            if fragment == "f1":
                release.wait(5)
                pulled.append(fragment)
            return super().pull(kind, fragment, version)

    engine = Engine()

    def terminated(*_, **__):
        raise SystemExit(143)  # what the handler of SIGTERM does, wherever the loop is

    engine.push = terminated
    with pytest.raises(SystemExit):
        agent(engine, Slow(TRAIN[0])).run()
    assert pulled == []
    release.set()
