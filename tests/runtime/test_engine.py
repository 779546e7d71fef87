from __future__ import annotations

import pytest

from nebula.errors import NebulaError, RankFailure, UsageError
from nebula.runtime import engine
from nebula.runtime.engine import GroupEngine, attempt, settle
from nebula.types import Evaluation, Held, Report, StartReport, Steps
from nebula.wan.digest import fragment_digest

LANES = [{"w": (1, 2)}, {"w": (10, 20), "b": (3, 4)}]
STEPS = Steps(round=4, position=24, first=0, count=2, total=6)
REPORT = Report(steps=2, tokens=8, loss=1.5, seconds=0.1)


class FakeGroup:
    def __init__(self, held=({"f0": 3}, {"f0": 3})):
        self.calls, self.alive = [], True
        reports = [
            StartReport(held=h, lanes={"f0": lanes}, parameters=5, device="cpu")
            for h, lanes in zip(held, LANES, strict=True)
        ]
        self.answers = {
            "start": reports,
            "train": [REPORT, REPORT],
            "apply": LANES,
            "adopt": LANES[::-1],
            "save": [None, None],
            "evaluate": [Evaluation(loss_sum=2.0, tokens=4)] * 2,
        }

    def call(self, method, *args):
        self.calls.append((method, *args))
        return self.answers[method]

    def call_first(self, method, *args):
        assert method == "rendezvous"
        return "here:1"

    def references(self, method, *args):
        self.calls.append((method, *args))
        return ["ref0", "ref1"]

    def kill(self):
        self.alive = False


def test_start_meets_at_rank_0_and_reports_what_the_cluster_holds():
    group = FakeGroup()
    assert GroupEngine(lambda: group).start() == {"f0": Held(3, fragment_digest(LANES))}
    assert group.calls == [("start", "here:1")]


def test_start_again_ends_the_old_group_first():
    groups = []

    def launch():
        assert all(not group.alive for group in groups)
        groups.append(FakeGroup())
        return groups[-1]

    ranks = GroupEngine(launch)
    ranks.start()
    ranks.start()
    assert [group.alive for group in groups] == [False, True]
    ranks.stop()
    ranks.stop()
    assert not groups[1].alive


def test_ranks_that_hold_different_versions_are_refused():
    with pytest.raises(NebulaError, match=r"rank 1 holds versions \{'f0': 2\}, rank 0 holds \{'f0': 3\}"):
        GroupEngine(lambda: FakeGroup(held=({"f0": 3}, {"f0": 2}))).start()


def test_a_round_reaches_the_ranks():
    group = FakeGroup()
    ranks = GroupEngine(lambda: group)
    ranks.start()
    assert ranks.train(STEPS) == REPORT
    assert ranks.pull("f0") == ["ref0", "ref1"]
    assert ranks.push("f0", "update", "payload", merged=True) == fragment_digest(LANES)
    assert ranks.push("f0", "state", "payload", merged=False) == fragment_digest(LANES)
    assert ranks.evaluate(1, 3) == Evaluation(loss_sum=2.0, tokens=4)
    ranks.save(5, {"f0": Held(4, "sha256:ab")})
    assert group.calls[1:] == [
        ("train", STEPS),
        ("encode", "f0"),
        ("apply", "f0", "payload", True),
        ("adopt", "f0", "payload"),
        ("evaluate", 1, 3),
        ("save", 5, {"f0": (4, "sha256:ab")}),
    ]


def script(*outcomes):
    remaining = iter(outcomes)

    def outcome(timeout):
        answer = next(remaining, None)
        if isinstance(answer, RankFailure):
            raise answer
        return answer

    return outcome


def test_settle_blames_the_rank_that_died_and_not_those_that_noticed():
    noticed, died = RankFailure(0, "rank 0 lost a peer"), RankFailure(1, "rank 1 died")
    with pytest.raises(RankFailure) as caught:
        settle(3, script((0, noticed), (2, RankFailure(2, "rank 2 lost a peer")), died))
    assert caught.value is died


def test_settle_prefers_a_rank_s_own_error_to_collateral_ones():
    own = UsageError("loss is not finite")
    with pytest.raises(UsageError) as caught:
        settle(2, script((0, RankFailure(0, "rank 0 lost a peer")), (1, own)))
    assert caught.value is own


def test_settle_does_not_wait_for_ever_once_a_rank_has_failed(monkeypatch):
    monkeypatch.setattr(engine, "GRACE", 7.0)
    asked = []

    def outcome(timeout):
        asked.append(timeout)
        return (1, UsageError("no")) if len(asked) == 1 else None

    with pytest.raises(UsageError):
        settle(3, outcome)
    assert asked[0] is None
    assert len(asked) == 2
    assert 0 < asked[1] <= 7.0


def test_settle_is_silent_when_all_is_well():
    settle(2, script((1, None), (0, None)))


@pytest.mark.parametrize("text", ["Connection closed by peer [::1]:9", "Connection reset by peer", "Broken pipe"])
def test_what_survivors_say_is_a_rank_failure(text):
    def act():
        raise RuntimeError(text)

    error, _ = attempt("rank 3", 3, act)
    assert isinstance(error, RankFailure)
    assert error.rank == 3


def test_a_foreign_error_becomes_ours_with_the_end_of_its_traceback():
    error, value = attempt("rank 3", 3, lambda: {}["absent"])
    assert type(error) is NebulaError
    assert "rank 3 failed: KeyError: 'absent'" in str(error)
    assert "test_engine.py" in str(error)
    assert value is None
