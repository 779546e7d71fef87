"""The state machine alone: rounds commit or do not, whatever the order of events."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula.federation import coordinator as machine
from nebula.federation.events import (
    Alarm,
    Arrived,
    Committed,
    Heard,
    Joined,
    Merge,
    Planned,
    QuorumLost,
    Reported,
    RoundClosed,
    Stopping,
    Tick,
    Waiting,
)
from nebula.federation.state import Rules, State, initial
from nebula.types import Beat, Held, RoundReport

NORTH, SOUTH = "north", "south"


def rules(**changes):
    return Rules(
        **{
            "members": {NORTH: 2, SOUTH: 2},
            "fragments": ("f0", "f1"),
            "rounds": 3,
            "inner_steps": 5,
            "evaluate_every": 2,
            "quorum": 1,
            "max_stall": 100.0,
            **changes,
        }
    )


def run(state: State, *events, now: float = 0.0):
    effects = []
    for event in events:
        state, more = machine.step(state, event, now)
        effects += more
    return state, effects


def founded(**changes) -> State:
    state = initial(rules(**changes))
    state, _ = run(state, *(Committed(fragment=f, version=0, digest=f"d{f}0") for f in ("f0", "f1")))
    return run(state, Joined(cluster=NORTH, epoch=1), Joined(cluster=SOUTH, epoch=1))[0]


def held(version: int) -> dict[str, Held]:
    return {f: Held(version, f"d{f}{version}") for f in ("f0", "f1")}


def alive(state: State, *clusters: str, now: float) -> State:
    return run(state, *(Heard(cluster=c) for c in clusters), now=now)[0]


def waited(state: State, since: float, until: float):
    """Tick every second from `since` on, and at `until`."""
    effects = []
    for now in [*(since + second for second in range(int(until - since) + 1)), until]:
        state, more = run(state, Tick(), now=now)
        effects += more
    return state, effects


def arrived(cluster: str, fragment: str, round: int, seconds: float | None = 1.0) -> Arrived:
    return Arrived(
        cluster=cluster,
        fragment=fragment,
        round=round,
        weight=10.0,
        blob=f"{cluster}{fragment}{round}",
        parts=(1,),
        seconds=seconds,
    )


def committed(fragment: str, version: int, *contributors: str) -> Committed:
    return Committed(
        fragment=fragment, version=version, digest=f"d{fragment}{version}", contributors=contributors or (NORTH, SOUTH)
    )


def after_round(state: State, round: int = 0) -> State:
    """Both clusters take part in `round` and everything commits."""
    state, _ = run(state, *(Planned(cluster=c, held=held(round)) for c in (NORTH, SOUTH)))
    for fragment in ("f0", "f1"):
        state, _ = run(state, *(arrived(c, fragment, round) for c in (NORTH, SOUTH)))
        state, _ = run(state, committed(fragment, round + 1))
    return state


def test_a_fragment_merges_once_when_everyone_expected_has_delivered():
    state = founded()
    state, none = run(state, arrived(SOUTH, "f0", 0))
    assert none == []
    state, (merge,) = run(state, arrived(NORTH, "f0", 0))
    assert isinstance(merge, Merge)
    assert [a.cluster for a in merge.arrivals] == [NORTH, SOUTH]  # member order, not order of arrival
    assert run(state, Tick(), now=1e9)[1] == []  # never a second merge of the same version


@given(order=st.permutations([(c, f) for c in (NORTH, SOUTH) for f in ("f0", "f1")]))
def test_merges_do_not_depend_on_the_order_of_arrival(order):
    _, effects = run(founded(), *(arrived(c, f, 0) for c, f in order))
    merges = sorted((e for e in effects if isinstance(e, Merge)), key=lambda e: e.fragment)
    assert [(m.fragment, m.version, [a.blob for a in m.arrivals]) for m in merges] == [
        (f, 1, [f"{c}{f}0" for c in (NORTH, SOUTH)]) for f in ("f0", "f1")
    ]


def test_fragments_are_independent():
    state, effects = run(founded(), arrived(NORTH, "f1", 0), arrived(SOUTH, "f1", 0), committed("f1", 1))
    assert len(effects) == 1
    assert state.round == 0
    assert state.fragments["f1"].version == 1
    assert state.fragments["f0"].version == 0


def test_a_missing_cluster_is_waited_for_until_max_stall_when_nothing_was_measured_yet():
    state = alive(founded(), SOUTH, now=9.0)
    state, _ = run(state, arrived(NORTH, "f0", 0), now=10.0)
    state = alive(state, SOUTH, now=105.0)
    state, waiting = run(state, Tick(), now=109.0)
    assert waiting == [Waiting(0, {SOUTH: "alive, its delta is not here yet"})]
    (merge,) = run(state, Tick(), now=110.0)[1]
    assert [a.cluster for a in merge.arrivals] == [NORTH]


def test_measured_arrivals_shorten_the_wait():
    state = after_round(after_round(founded()), 1)
    state, _ = run(state, *(Planned(cluster=c, held=held(2)) for c in (NORTH, SOUTH)))
    state, _ = run(state, arrived(NORTH, "f0", 2), now=1.0)
    # median 1 s, spread at least a quarter of it, four spreads: 2 s after the round opened at 0
    assert run(state, Tick(), now=1.9)[1] == []
    assert [type(e) for e in run(state, Tick(), now=2.0)[1]] == [Merge]


def test_who_tells_of_progress_is_waited_for_and_who_stands_still_is_not():
    state = after_round(after_round(founded()), 1)
    state, _ = run(state, *(Planned(cluster=c, held=held(2)) for c in (NORTH, SOUTH)))
    state, _ = run(state, arrived(NORTH, "f0", 2), now=1.0)
    for second in range(1, 31):
        beat = Beat(round=2, step=second, steps=40)
        state, effects = run(state, Heard(cluster=SOUTH, beat=beat), Tick(), now=float(second))
        assert [e for e in effects if isinstance(e, Merge)] == [], "beyond what is ordinary, and on its way"
    for second in range(31, 41):
        state, effects = run(state, Heard(cluster=SOUTH, beat=beat), Tick(), now=float(second))
        if any(isinstance(e, Merge) for e in effects):
            break
    assert second == 38, "it lives; its steps have been silent for too long, a quarter of the round"


def test_a_cluster_that_comes_back_is_not_judged_by_how_long_it_was_away():
    state, _ = run(founded(), Heard(cluster=SOUTH), now=1.0)
    state, _ = run(state, Joined(cluster=SOUTH, epoch=2), now=901.0)
    assert state.pulses[SOUTH].silent_at == 909.0


def test_a_cluster_that_left_the_last_round_unfinished_is_not_waited_for():
    state = founded()
    for fragment in ("f0", "f1"):
        state, _ = run(state, arrived(NORTH, fragment, 0), committed(fragment, 1, NORTH))
    state, _ = run(state, Planned(cluster=NORTH, held=held(1)))
    _, effects = run(state, arrived(NORTH, "f0", 1))
    assert [type(e) for e in effects] == [Merge]


def test_a_cluster_that_falls_silent_is_not_waited_for_longer_than_its_silence_is_ordinary():
    state, _ = run(founded(), Planned(cluster=SOUTH, held=held(0)), now=4.0)
    state, none = run(state, *(arrived(NORTH, f, 0) for f in ("f0", "f1")), Tick(), now=6.0)
    assert none == []
    until = state.pulses[SOUTH].silent_at
    assert 12.0 <= until < 20.0
    state, none = waited(state, 6.0, until - 0.1)
    assert none == []
    state, merges = run(state, Tick(), now=until)
    assert [(m.fragment, [a.cluster for a in m.arrivals]) for m in merges] == [("f0", [NORTH]), ("f1", [NORTH])]


def test_a_coordinator_that_stood_still_does_not_blame_the_clusters():
    state, _ = run(founded(quorum=2), *(Planned(cluster=c, held=held(0)) for c in (NORTH, SOUTH)), now=4.0)
    state, none = run(state, arrived(NORTH, "f0", 0), Tick(), now=6.0)
    assert none == []
    state, none = run(state, Heard(cluster=SOUTH), Tick(), now=1006.0)
    assert none == []
    state, _ = run(state, arrived(NORTH, "f0", 0), Tick(), now=1007.0)
    assert state.pulses[SOUTH].last == 1006.0
    state, effects = waited(state, 1007.0, 1106.9)  # what it is awake for counts
    assert [type(e) for e in effects] == [Waiting]
    state, effects = run(state, Tick(), now=1107.0)
    assert [type(e) for e in effects] == [QuorumLost]


def test_a_cluster_that_leaves_is_not_waited_for_at_all_and_may_come_back():
    state, _ = run(founded(), *(Planned(cluster=c, held=held(0)) for c in (NORTH, SOUTH)))
    state, none = run(state, arrived(NORTH, "f0", 0))
    assert none == []
    state, effects = run(state, Heard(cluster=SOUTH, beat=Beat(leaving=True)))
    assert [(type(e), [a.cluster for a in e.arrivals]) for e in effects] == [(Merge, [NORTH])]
    state, _ = run(state, committed("f0", 1, NORTH), arrived(NORTH, "f1", 0), committed("f1", 1, NORTH))
    assert state.expected() == {NORTH}
    state, _ = run(state, Joined(cluster=SOUTH, epoch=2), Planned(cluster=SOUTH, held=held(1)))
    assert state.expected() == {NORTH, SOUTH}


def test_a_delta_of_a_cluster_that_left_counts_if_it_came_before():
    state, _ = run(founded(), *(Planned(cluster=c, held=held(0)) for c in (NORTH, SOUTH)), arrived(SOUTH, "f0", 0))
    state, _ = run(state, Heard(cluster=SOUTH, beat=Beat(leaving=True)))
    _, (merge,) = run(state, arrived(NORTH, "f0", 0))
    assert [a.cluster for a in merge.arrivals] == [NORTH, SOUTH]


# --- whoever is missing: batch and rate ---------------------------------------------------------------------------


def without_south(state: State, round: int) -> State:
    for fragment in ("f0", "f1"):
        state, _ = run(state, Heard(cluster=SOUTH, beat=Beat(leaving=True)), arrived(NORTH, fragment, round))
        state, _ = run(state, committed(fragment, round + 1, NORTH))
    return state


def test_the_global_batch_shrinks_with_the_clusters_that_are_missing_or_is_held_by_the_others():
    for hold, steps in ((False, 5), (True, 10)):
        state = without_south(founded(hold=hold), 0)
        plan = machine.plan(state, NORTH, held(1))
        assert (plan.inner_steps, plan.position) == (steps, 5)
        state = after_round(state, 1)
        plan = machine.plan(state, NORTH, held(2))
        assert (plan.inner_steps, plan.position) == (5, 5 + steps), "back to its place once the other is back"
        redo = machine.plan(state, SOUTH, held(1))
        assert (redo.round, redo.inner_steps, redo.position) == (1, steps, 5), "a repeated round is the same round"


def test_held_batches_are_shared_by_weight():
    three = rules(members={NORTH: 30, SOUTH: 10, "west": 20}, hold=True, inner_steps=6)
    assert three.steps([NORTH, SOUTH, "west"]) == 6
    assert three.steps([NORTH]) == 12
    assert three.steps([SOUTH, "west"]) == 12
    assert three.steps([SOUTH]) == 36
    assert three.steps([]) == 6


@pytest.mark.parametrize(("power", "scale"), [(0.0, 1.0), (0.5, 0.5**0.5), (1.0, 0.5)])
def test_the_outer_rate_follows_the_share_of_tokens_as_asked(power, scale):
    state, _ = run(founded(power=power), Heard(cluster=SOUTH, beat=Beat(leaving=True)))
    _, (merge,) = run(state, arrived(NORTH, "f0", 0))  # 10 of 2 clusters · 5 steps · 2 tokens
    assert merge.scale == pytest.approx(scale)
    assert rules(power=power).scale(1e9) == 1.0


# --- catching up --------------------------------------------------------------------------------------------------


def test_updates_are_kept_while_they_are_less_than_half_the_state():
    state = founded(rounds=20)
    sizes = {"update_bytes": 10, "state_bytes": 80}
    for round in range(8):
        for fragment in ("f0", "f1"):
            state, _ = run(state, *(arrived(c, fragment, round) for c in (NORTH, SOUTH)))
            state, _ = run(state, replace(committed(fragment, round + 1), **sizes))
    assert [commit.version for commit in state.fragments["f0"].chain] == [5, 6, 7, 8]
    dear = {"update_bytes": 70, "state_bytes": 80}
    for fragment in ("f0", "f1"):
        state, _ = run(state, *(arrived(c, fragment, 8) for c in (NORTH, SOUTH)))
        state, _ = run(state, replace(committed(fragment, 9), **dear))
    assert [commit.version for commit in state.fragments["f0"].chain] == [8, 9], "the newest two in any case"


def test_below_quorum_nothing_commits_and_the_run_pauses_after_max_stall():
    state, _ = run(founded(quorum=2), Planned(cluster=NORTH, held=held(0)), arrived(NORTH, "f0", 0), now=5.0)
    state, waiting = run(state, Tick(), now=104.0)
    assert waiting == [Waiting(0, {SOUTH: "silent for 104 s"})]
    state, effects = run(state, Tick(), now=105.0)
    assert effects == [QuorumLost(0, (NORTH,))]
    assert machine.plan(state, NORTH, held(0)).action == "stop"
    assert run(state, Tick(), arrived(SOUTH, "f0", 0), now=200.0)[1] == []  # kept for the resumed run
    assert machine.ended(state, 105.0) is None
    state, _ = run(state, Planned(cluster=NORTH, held=held(0)), now=106.0)
    assert machine.ended(state, 106.0) == "stopped"


def test_a_delta_may_be_replaced_until_its_merge_begins_and_is_then_a_duplicate():
    state, _ = run(founded(), arrived(NORTH, "f0", 0))
    assert machine.receipt(state, NORTH, "f0", 0) == "accept"
    state, _ = run(state, arrived(SOUTH, "f0", 0))
    assert machine.receipt(state, NORTH, "f0", 0) == "duplicate"
    state, _ = run(state, committed("f0", 1))
    assert machine.receipt(state, NORTH, "f0", 0) == "duplicate"
    with pytest.raises(ValueError, match="collecting round 1, not 2"):
        machine.receipt(state, NORTH, "f0", 2)


def test_a_delta_that_comes_after_the_commit_is_late():
    state, _ = run(founded(), arrived(NORTH, "f0", 0))
    state, _ = run(state, Tick(), now=1000.0)
    assert machine.receipt(state, SOUTH, "f0", 0) == "late"
    state, _ = run(state, committed("f0", 1, NORTH))
    assert machine.receipt(state, SOUTH, "f0", 0) == "late"


def test_plan_trains_what_the_cluster_holds_and_evaluates_every_second_round():
    state = founded()
    first = machine.plan(state, SOUTH, held(0))
    assert (first.action, first.round, first.inner_steps) == ("train", 0, 5)
    assert first.fragments == {"f0": 0, "f1": 0}
    assert (first.eval_index, first.eval_count) == (1, 2)
    assert machine.plan(after_round(state), SOUTH, held(1)).eval_count == 0


def test_a_cluster_behind_catches_up_and_one_that_delivered_repeats_the_round():
    state = after_round(after_round(founded()), 1)
    plan = machine.plan(state, NORTH, held(0))
    assert (plan.action, plan.fragments) == ("catch_up", {"f0": 2, "f1": 2})
    plan = machine.plan(state, NORTH, held(1))
    assert (plan.action, plan.round, plan.fragments) == ("train", 1, {"f0": 1, "f1": 1})


def test_a_cluster_left_out_of_a_commit_does_not_repeat_it():
    state = founded()
    for fragment in ("f0", "f1"):
        state, _ = run(state, arrived(NORTH, fragment, 0), committed(fragment, 1, NORTH))
    assert machine.plan(state, SOUTH, held(0)).action == "catch_up"


def test_caught_up_in_the_middle_of_a_round_it_trains_what_is_still_open():
    state, _ = run(founded(), *(arrived(c, "f0", 0) for c in (NORTH, SOUTH)), committed("f0", 1))
    mixed = {"f0": held(1)["f0"], "f1": held(0)["f1"]}
    plan = machine.plan(state, NORTH, mixed)
    assert (plan.action, plan.round, plan.fragments) == ("train", 0, {"f1": 0})


@pytest.mark.parametrize(
    ("version", "digest", "kind"), [(0, "other", "digest_mismatch"), (7, "x", "ahead_of_coordinator")]
)
def test_a_diverged_cluster_raises_an_alarm_and_is_sent_the_state(version, digest, kind):
    wrong = {**held(0), "f1": Held(version, digest)}
    state, effects = run(founded(), Planned(cluster=NORTH, held=wrong))
    assert [(type(e), e.kind, e.cluster) for e in effects] == [(Alarm, kind, NORTH)]
    plan = machine.plan(state, NORTH, wrong)
    assert (plan.action, plan.fragments) == ("catch_up", {"f1": 0})


def report(round: int, loss: float = 1.0) -> RoundReport:
    return RoundReport(round=round, steps=5, tokens=50, loss=loss, compute_s=1.0, stall_s=0.1)


def test_a_round_closes_once_when_its_contributors_have_reported():
    state = after_round(founded())
    state, none = run(state, Reported(cluster=NORTH, report=report(0)))
    assert none == []
    state, (closed,) = run(state, Reported(cluster=SOUTH, report=report(0)))
    assert isinstance(closed, RoundClosed)
    assert set(closed.reports) == {NORTH, SOUTH}
    assert run(state, Reported(cluster=SOUTH, report=report(0)))[1] == []


def test_a_round_closes_without_a_cluster_that_never_reports():
    state = after_round(founded())
    state, _ = run(state, Reported(cluster=NORTH, report=report(0)))
    closing: list = []
    for fragment in ("f0", "f1"):
        state, effects = run(state, arrived(NORTH, fragment, 1), committed(fragment, 2, NORTH))
        closing += [e for e in effects if isinstance(e, RoundClosed)]
    assert [(c.round, set(c.reports)) for c in closing] == [(0, {NORTH})]


def test_stopping_lets_the_round_under_way_finish():
    state, _ = run(founded(), Planned(cluster=NORTH, held=held(0)), Stopping("asked to"))
    assert machine.plan(state, SOUTH, held(0)).action == "train"
    state = after_round(state)
    assert machine.plan(state, NORTH, held(1)).action == "stop"
    state, _ = run(state, Planned(cluster=NORTH, held=held(1)))
    assert machine.ended(state, 0.0) is None
    state, _ = run(state, Planned(cluster=SOUTH, held=held(1)))
    assert machine.ended(state, 0.0) == "stopped"


def test_stopping_in_the_last_round_still_evaluates_the_final_model():
    state, _ = run(founded(rounds=1), Planned(cluster=NORTH, held=held(0)), Stopping("asked to"))
    plan = machine.plan(after_round(state), NORTH, held(1))
    assert (plan.action, plan.inner_steps, plan.eval_count) == ("train", 0, 2)


def test_a_delta_that_comes_after_the_stop_is_kept_but_not_merged():
    state, _ = run(founded(), Stopping("asked to"), *(arrived(c, "f0", 0) for c in (NORTH, SOUTH)))
    state, none = run(state, Tick(), now=1e9)
    assert none == []
    assert set(state.fragments["f0"].arrived) == {NORTH, SOUTH}


def test_stopping_between_rounds_stops_at_once():
    state, _ = run(founded(), Stopping("asked to"))
    assert machine.plan(state, NORTH, held(0)).action == "stop"


def test_the_last_model_is_evaluated_before_the_run_is_done():
    state = founded(rounds=1)
    state = after_round(state)
    plan = machine.plan(state, NORTH, held(1))
    assert (plan.action, plan.inner_steps, plan.fragments, plan.eval_count) == ("train", 0, {}, 2)
    for cluster in (NORTH, SOUTH):
        state, _ = run(state, Reported(cluster=cluster, report=report(0)))
        state, _ = run(state, Reported(cluster=cluster, report=report(1)), Planned(cluster=cluster, held=held(1)))
        assert machine.plan(state, cluster, held(1)).action == "done"
    assert machine.ended(state, 0.0) == "completed"


def test_the_end_does_not_wait_for_a_dead_cluster_longer_than_max_stall():
    state = after_round(founded(rounds=1))
    for round in (0, 1):
        state, _ = run(state, Reported(cluster=NORTH, report=report(round)))
    state, _ = run(state, Planned(cluster=NORTH, held=held(1)), now=50.0)
    state, none = run(state, Tick(), now=149.0)
    assert (machine.ended(state, 149.0), none) == (None, [])
    state, closing = run(state, Tick(), now=150.0)
    assert machine.ended(state, 150.0) == "completed"
    # ... and what the others reported counts
    assert [(type(c), c.round, set(c.reports)) for c in closing] == [(RoundClosed, r, {NORTH}) for r in (0, 1)]


def test_a_restart_after_everyone_has_left_ends_by_itself():
    state = machine.restarted(after_round(founded(rounds=1)), 50.0)
    state, _ = run(state, Tick(), now=149.0)
    assert machine.ended(state, 149.0) is None
    state, _ = run(state, Tick(), now=150.0)
    assert machine.ended(state, 150.0) == "completed"


def test_a_stop_repeated_after_everyone_has_left_ends_by_itself():
    state = machine.restarted(after_round(founded()), 50.0)
    state, _ = run(state, Stopping("asked to"), now=60.0)
    assert machine.ended(state, 159.0) is None
    assert machine.ended(state, 160.0) == "stopped"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_replaying_what_was_journaled_gives_the_same_answers(data):
    """Rules 1 and 3: an interrupted machine, rebuilt from its events, decides as before."""
    journal, state = [], founded()
    base = state
    for _ in range(data.draw(st.integers(1, 12))):
        cluster = data.draw(st.sampled_from([NORTH, SOUTH]))
        fragment = data.draw(st.sampled_from(["f0", "f1"]))
        version = state.fragments[fragment].version
        if version < 3 and machine.receipt(state, cluster, fragment, version) == "accept":
            event = arrived(cluster, fragment, version)
            state, effects = run(state, event)
            journal.append(event)
            for merge in [e for e in effects if isinstance(e, Merge)]:
                commit = committed(merge.fragment, merge.version, *(a.cluster for a in merge.arrivals))
                state, _ = run(state, commit)
                journal.append(commit)
    again, _ = run(base, *journal)
    assert again.fragments == state.fragments
    for cluster in (NORTH, SOUTH):
        for version in range(4):
            assert machine.plan(again, cluster, held(version)) == machine.plan(state, cluster, held(version))
