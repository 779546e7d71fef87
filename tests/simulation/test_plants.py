"""Is the simulator able to see what it is for? Each bug here is planted in the real code, and has to be found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import pytest

from nebula import clock, files
from nebula.checkpoint.ledger import Ledger
from nebula.federation import coordinator, hub, merge, shell
from nebula.federation.coordinator import Rules
from nebula.federation.events import Merge
from nebula.federation.journal_sqlite import SqliteJournal
from nebula.federation.membership import Pulse
from nebula.federation.sessions import Sessions
from nebula.runtime.gateway import Gateway
from nebula.security import seal
from nebula.sim.world.campaign import Seeds
from nebula.sim.world.rank import Memory
from nebula.sim.world.witness import INVARIANTS, Violation
from nebula.train.exchange import Exchange

CLUSTERS = 4

Patch = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Plant:
    """`seeds`: where it must be found, and the invariants by which it shows."""

    plant: Patch
    shows: set[str]


PLANTS: dict[str, Plant] = {}


def plant(*shows: str) -> Callable[[Patch], Patch]:
    def note(patch: Patch) -> Patch:
        PLANTS[patch.__name__] = Plant(patch, set(shows))
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


@plant("once", "clean")
def a_version_is_merged_twice(patch):
    perform = shell.Shell._perform

    def twice(self, effect):
        perform(self, effect)
        if isinstance(effect, Merge):
            perform(self, effect)

    patch.setattr(shell.Shell, "_perform", twice)


@plant("authentic")
def a_delta_counts_twice(patch):
    made = coordinator._merge

    def doubled(rules, version, arrivals):
        return made(rules, version, (*arrivals, *arrivals[:1]))

    patch.setattr(coordinator, "_merge", doubled)


@plant("authentic")
def deltas_are_summed_as_they_come(patch):
    made = coordinator._merge

    def unordered(rules, version, arrivals):
        return made(rules, version, tuple(reversed(arrivals)))

    patch.setattr(coordinator, "_merge", unordered)


@plant("authentic", "clean")
def a_late_delta_goes_into_the_next_round(patch):
    receipt = coordinator.receipt

    def lenient(state, cluster, fragment, round):
        answer = receipt(state, cluster, fragment, round)
        return "accept" if answer == "late" and not state.fragments[fragment].merging else answer

    patch.setattr(coordinator, "receipt", lenient)


@plant("authentic")
def a_cluster_that_is_behind_trains_all_the_same(patch):
    plan = coordinator.plan

    def hasty(state, cluster, held):
        answer = plan(state, cluster, held)
        if answer.reason != "behind" or state.finished:
            return answer
        return coordinator._train(state, cluster, state.round, dict.fromkeys(held, state.round))

    patch.setattr(coordinator, "plan", hasty)


@plant("same")
def the_base_stays_where_it_was(patch):
    apply = Exchange.apply

    def forgetful(self, fragment, payload, *, merged):
        before = {where.name: self._base[where.name].clone() for where, _ in self._slices(fragment)}
        lanes = apply(self, fragment, payload, merged=merged)
        self._base.update(before)
        return self.lanes(fragment)

    patch.setattr(Exchange, "apply", forgetful)


@plant("same")
def an_update_is_added_to_another_version(patch):
    merging = merge.Merger.merge

    def stale(self, effect):
        before = self._states[effect.fragment].params
        commit = merging(self, effect)
        self._states[effect.fragment].params = before
        return commit

    patch.setattr(merge.Merger, "merge", stale)


# --- what must outlive a crash ------------------------------------------------------------------------------------


@plant("promised", "once", "repeats", "same", "authentic", "clean", "right")
def the_journal_is_not_synced(patch):
    opening = SqliteJournal._open

    def careless(self, agreement):
        term = opening(self, agreement)
        self._db.execute("PRAGMA synchronous=OFF")
        return term

    patch.setattr(SqliteJournal, "_open", careless)


@plant("promised", "once", "repeats", "same", "authentic", "clean", "right")
def the_journal_is_synced_at_checkpoints_only(patch):
    opening = SqliteJournal._open

    def careless(self, agreement):
        term = opening(self, agreement)
        self._db.execute("PRAGMA synchronous=NORMAL")
        return term

    patch.setattr(SqliteJournal, "_open", careless)


@plant("ends", "clean", "once", "promised")
def files_are_not_synced(patch):
    writing = files.write_all

    def careless(path, chunks, *, private=False, system):
        writing(path, chunks, private=private, system=Without(system, "fsync"))

    patch.setattr(files, "write_all", careless)


@plant("ends", "clean", "once", "promised")
def folders_are_not_synced(patch):
    patch.setattr(files, "sync", lambda folder, system: None)


@plant("promised")
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


@plant("repeats")
def a_cluster_comes_back_without_its_residual(patch):
    patch.setattr(Exchange, "restore", lambda self, state: None)


@plant("repeats")
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


@plant("right")
def the_coordinator_comes_back_without_its_residual(patch):
    restored_without(patch, "residual")


@plant("right")
def the_coordinator_comes_back_without_its_momentum(patch):
    restored_without(patch, "momentum")


@plant("exact")
def a_round_done_again_reads_other_data(patch):
    train = coordinator._train

    def elsewhere(state, cluster, round, versions):
        plan = train(state, cluster, round, versions)
        return replace(plan, position=state.span(state.round).position)

    patch.setattr(coordinator, "_train", elsewhere)


# --- sessions and terms -------------------------------------------------------------------------------------------


@plant("fresh")
def a_replay_is_accepted(patch):
    patch.setattr(seal._Accepted, "add", lambda self, counter: True)


@plant("fresh")
def a_session_that_was_replaced_is_accepted(patch):
    answered, find = Sessions.answered, Sessions._find

    def keep(self, session):
        vars(self).setdefault("all", {})[session.cluster, session.epoch] = session
        answered(self, session)

    def any_of(self, source, epoch):
        return vars(self).get("all", {}).get((source, epoch)) or find(self, source, epoch)

    patch.setattr(Sessions, "answered", keep)
    patch.setattr(Sessions, "_find", any_of)


@plant("once", "same", "promised", "right", "clean", "authentic", "ends")
def a_coordinator_goes_on_after_it_was_replaced(patch):
    patch.setattr(SqliteJournal, "_check_term", lambda self: None)


# --- waiting, counting, keeping -----------------------------------------------------------------------------------


@plant("ends")
def nobody_wakes_the_merge(patch):
    begin = shell.Shell.__init__

    class Deaf:
        def __init__(self, clock):
            self._clock = clock

        def condition(self):
            return Without(self._clock.condition(), "notify_all")

        def __getattr__(self, name):
            return getattr(self._clock, name)

    patch.setattr(shell.Shell, "__init__", lambda self, a, j, l, e, clock: begin(self, a, j, l, e, Deaf(clock)))


@plant("ends")
def nobody_wakes_a_pull(patch):
    run = clock.Task._run

    def silent(self):
        self._over = Without(self._over, "notify_all")
        run(self)

    patch.setattr(clock.Task, "_run", silent)


@plant("counted")
def bytes_are_counted_twice(patch):
    push = Gateway.push

    def generous(self, ticket, packets):
        verdict = push(self, ticket, packets)
        self._payload_up += sum(map(len, packets))
        return verdict

    patch.setattr(Gateway, "push", generous)


@plant("bounded")
def blobs_are_never_deleted(patch):
    patch.setattr(Ledger, "keep", lambda self, live: None)
    patch.setattr(Ledger, "begin", lambda self, live: None)
