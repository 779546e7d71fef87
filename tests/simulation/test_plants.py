"""Is the simulator able to see what it is for? Each bug here is planted in the real code, and has to be found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from test_world import CLUSTERS, SEEDS

from nebula import clock, files
from nebula.checkpoint.ledger import Ledger
from nebula.federation import coordinator, merge, shell
from nebula.federation.events import Merge
from nebula.federation.journal_sqlite import SqliteJournal
from nebula.runtime.gateway import Gateway
from nebula.security import seal
from nebula.sim.world.campaign import Seeds, tell
from nebula.sim.world.rank import Memory
from nebula.sim.world.witness import INVARIANTS
from nebula.train.exchange import Exchange

Patch = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Plant:
    """`shows`: the invariants of which it violates one; `seed`: in this run."""

    plant: Patch
    shows: set[str]
    seed: int


PLANTS: dict[str, Plant] = {}


def plant(*shows: str, seed: int) -> Callable[[Patch], Patch]:
    assert INVARIANTS.keys() >= set(shows)

    def note(patch: Patch) -> Patch:
        PLANTS[patch.__name__] = Plant(patch, set(shows), seed)
        return patch

    return note


class Without:
    """Something that lacks some of what it does."""

    def __init__(self, whole: Any, *names: str) -> None:
        self._whole, self._names = whole, names

    def __enter__(self) -> Any:
        return self._whole.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._whole.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return (lambda *given: None) if name in self._names else getattr(self._whole, name)


# --- commits ------------------------------------------------------------------------------------------------------


@plant("once", "clean", seed=0)
def a_version_is_merged_twice(patch):
    perform = shell.Shell._perform

    def twice(self, effect):
        perform(self, effect)
        if isinstance(effect, Merge):
            perform(self, effect)

    patch.setattr(shell.Shell, "_perform", twice)


@plant("authentic", seed=0)
def a_delta_counts_twice(patch):
    made = coordinator._merge

    def doubled(rules, version, arrivals):
        return made(rules, version, (*arrivals, *arrivals[:1]))

    patch.setattr(coordinator, "_merge", doubled)


@plant("authentic", seed=0)
def deltas_are_summed_as_they_come(patch):
    made = coordinator._merge

    def unordered(rules, version, arrivals):
        return made(rules, version, tuple(reversed(arrivals)))

    patch.setattr(coordinator, "_merge", unordered)


@plant("authentic", "clean", seed=26)
def a_late_delta_goes_into_the_next_round(patch):
    receipt = coordinator.receipt

    def lenient(state, cluster, fragment, round):
        answer = receipt(state, cluster, fragment, round)
        return "accept" if answer == "late" and not state.fragments[fragment].merging else answer

    patch.setattr(coordinator, "receipt", lenient)
    patch.setattr(merge.Merger, "check", lambda self, *delta: True)


@plant("authentic", seed=26)
def a_cluster_that_is_behind_trains_all_the_same(patch):
    plan = coordinator.plan

    def hasty(state, cluster, held):
        answer = plan(state, cluster, held)
        if answer.reason != "behind" or state.finished:
            return answer
        return coordinator._train(state, cluster, state.round, dict.fromkeys(held, state.round))

    patch.setattr(coordinator, "plan", hasty)


@plant("same", seed=0)
def the_base_stays_where_it_was(patch):
    apply = Exchange.apply

    def forgetful(self, fragment, payload, *, merged):
        before = {where.name: self._base[where.name].clone() for where, _ in self._slices(fragment)}
        apply(self, fragment, payload, merged=merged)
        self._base.update(before)
        return self.lanes(fragment)

    patch.setattr(Exchange, "apply", forgetful)


@plant("same", seed=0)
def an_update_is_added_to_another_version(patch):
    merging = merge.Merger.merge

    def stale(self, effect):
        before = self._states[effect.fragment].params
        commit = merging(self, effect)
        self._states[effect.fragment].params = before
        return commit

    patch.setattr(merge.Merger, "merge", stale)


# --- what must outlive a crash ------------------------------------------------------------------------------------


@plant("promised", "once", "repeats", "same", "authentic", "clean", "right", seed=15)
def the_journal_is_not_synced(patch):
    synchronous(patch, "OFF")


@plant("promised", "once", "repeats", "same", "authentic", "clean", "right", seed=15)
def the_journal_is_synced_at_checkpoints_only(patch):
    synchronous(patch, "NORMAL")


def synchronous(patch, level):
    opening = SqliteJournal._open

    def careless(self, agreement):
        term = opening(self, agreement)
        self._db.execute(f"PRAGMA synchronous={level}")
        return term

    patch.setattr(SqliteJournal, "_open", careless)


@plant("ends", "clean", "once", "promised", seed=8)
def files_are_not_synced(patch):
    writing = files.write_all

    def careless(path, chunks, *, private=False, system):
        writing(path, chunks, private=private, system=Without(system, "fsync"))

    patch.setattr(files, "write_all", careless)


@plant("ends", "clean", "once", "promised", seed=41)
def folders_are_not_synced(patch):
    patch.setattr(files, "sync", lambda folder, system: None)


@plant("promised", seed=32)
def a_delta_is_acknowledged_before_it_is_in_the_journal(patch):
    append = SqliteJournal.append

    def later(self, event):
        waiting, self.waiting = getattr(self, "waiting", []), []
        for earlier in waiting:
            append(self, earlier)
        if type(event).__name__ == "Arrived":
            self.waiting = [event]
        else:
            append(self, event)

    patch.setattr(SqliteJournal, "append", later)


@plant("repeats", seed=15)
def a_cluster_comes_back_without_its_residual(patch):
    patch.setattr(Exchange, "restore", lambda self, state: None)


@plant("repeats", seed=15)
def a_cluster_comes_back_without_the_last_update(patch):
    restore = Exchange.restore

    def partly(self, state):
        restore(self, state)
        for last in self._last.values():
            last.fill_(float("nan"))

    patch.setattr(Exchange, "restore", partly)


@plant("clean", "right", seed=12)
def the_coordinator_comes_back_without_the_last_update(patch):
    restoring = merge.Merger.restore

    def partly(self, commit):
        restoring(self, commit)
        self._states[commit.fragment].last = {}

    patch.setattr(merge.Merger, "restore", partly)


@plant("repeats", seed=0)
def a_cluster_comes_back_without_its_inner_momentum(patch):
    load = Memory._load

    def partly(self, checkpoint):
        load(self, checkpoint)
        for momentum in self.momentum.values():
            momentum.zero_()

    patch.setattr(Memory, "_load", partly)


def restored_without(patch, kind):
    restore = merge.Merger.restore

    def partly(self, commit):
        blobs = {name: blob for name, blob in commit.blobs.items() if name != kind}
        restore(self, replace(commit, blobs=blobs))

    patch.setattr(merge.Merger, "restore", partly)


@plant("right", seed=12)
def the_coordinator_comes_back_without_its_residual(patch):
    restored_without(patch, "residual")


@plant("right", seed=2)
def the_coordinator_comes_back_without_its_momentum(patch):
    restored_without(patch, "momentum")


@plant("exact", seed=0)
def a_round_done_again_reads_other_data(patch):
    train = coordinator._train

    def elsewhere(state, cluster, round, versions):
        plan = train(state, cluster, round, versions)
        return replace(plan, position=state.span(state.round).position)

    patch.setattr(coordinator, "_train", elsewhere)


# --- sessions and terms -------------------------------------------------------------------------------------------


@plant("fresh", seed=1)
def a_replay_is_accepted(patch):
    patch.setattr(seal._Accepted, "add", lambda self, counter: True)


@plant("once", "same", "promised", "right", "clean", "authentic", "ends", seed=14)
def a_coordinator_goes_on_after_it_was_replaced(patch):
    patch.setattr(SqliteJournal, "_check_term", lambda self: None)


# --- waiting, counting, keeping -----------------------------------------------------------------------------------


@plant("ends", seed=0)
def nobody_wakes_the_merge(patch):
    begin = shell.Shell.__init__

    class Deaf:
        def __init__(self, clock):
            self._clock = clock

        def condition(self):
            return Without(self._clock.condition(), "notify_all")

        def __getattr__(self, name):
            return getattr(self._clock, name)

    patch.setattr(shell.Shell, "__init__", lambda self, *rest: begin(self, *rest[:-1], Deaf(rest[-1])))


@plant("ends", seed=0)
def nobody_wakes_a_pull(patch):
    run = clock.Task._run

    def silent(self):
        self._over = Without(self._over, "notify_all")
        run(self)

    patch.setattr(clock.Task, "_run", silent)


@plant("counted", seed=0)
def bytes_are_counted_twice(patch):
    push = Gateway.push

    def generous(self, ticket, packets):
        verdict = push(self, ticket, packets)
        self._payload_up += sum(map(len, packets))
        return verdict

    patch.setattr(Gateway, "push", generous)


@plant("bounded", seed=2)
def blobs_are_never_deleted(patch):
    patch.setattr(Ledger, "keep", lambda self, live: None)
    patch.setattr(Ledger, "begin", lambda self, live: None)


# --- the trial ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_bug_is_found(name, monkeypatch):
    """The same runs pass without it: test_world.py takes all of them."""
    planted = PLANTS[name]
    assert planted.seed in SEEDS
    planted.plant(monkeypatch)
    assert tell(Seeds(CLUSTERS), planted.seed).violated in planted.shows
