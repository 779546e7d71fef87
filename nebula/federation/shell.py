"""The shell around the state machine: journal, blobs and merges.

Order of every change: check → blob on disk → event in the journal → state → effects. One lock guards state and journal;
merges run on one thread of their own. Whatever fails while writing ends the coordinator: nothing may be acknowledged on
top of it.
"""

from __future__ import annotations

import errno
import queue
import threading
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Literal, TypeVar

from nebula.checkpoint.ledger import Ledger
from nebula.config import Agreement
from nebula.errors import NebulaError, PreflightError, QuorumError
from nebula.federation import coordinator as machine
from nebula.federation import narrate
from nebula.federation.coordinator import Rules, State
from nebula.federation.events import (
    Alarm,
    Effect,
    Event,
    Joined,
    Merge,
    QuorumLost,
    Reported,
    RoundClosed,
    Stopping,
    Tick,
)
from nebula.federation.journal import JOURNALED, Journal
from nebula.federation.merge import Merger
from nebula.federation.tally import Tally
from nebula.metrics.events import EventLog
from nebula.wan.digest import global_digest

T = TypeVar("T")


class Shell:
    """One run's state, durable in `folder`, where journal and blobs are. `tally` adds up what happened."""

    def __init__(self, agreement: Agreement, folder: Path, events: EventLog, clock: Callable[[], float]) -> None:
        self.agreement = agreement
        self._events = events
        self._clock = clock
        self._changed = threading.Condition()
        self._ledger = Ledger(folder / "blobs")
        self._merger = Merger(agreement, self._ledger)
        self._journal = Journal(folder / "journal.sqlite", agreement=agreement.digest())
        self._failure: NebulaError | None = None
        params = sum(prod(shape) for shapes in self._merger.shapes.values() for shape in shapes.values())
        self.tally = Tally(params)
        self._merges: queue.SimpleQueue[Merge | None] = queue.SimpleQueue()
        self._state = self._recover(machine.initial(rules_of(agreement, tuple(self._merger.shapes))))
        self._thread = threading.Thread(target=self._merge_all, name="merge", daemon=True)
        self._thread.start()
        self._apply(Tick())

    def _recover(self, state: State) -> State:
        for event in self._journal.replay():
            state, effects = machine.step(state, event, self._clock())
            self._count(event, effects)
        if any(f.commit is None for f in state.fragments.values()):
            for event in self._merger.found():
                if state.fragments[event.fragment].commit is None:  # else a crash came in between
                    self._journal.append(event)
                    state, _ = machine.step(state, event, self._clock())
        else:
            self._merger.restore({name: f.commit for name, f in state.fragments.items() if f.commit})
        self._ledger.keep(_live_blobs(state))
        return machine.restarted(state, self._clock())

    @property
    def state(self) -> State:
        return self._state

    def global_digest(self) -> str:
        return global_digest({name: f.digest for name, f in self._state.fragments.items()})

    def tick(self) -> None:
        """Let time pass: deadlines are checked here. Raises what ended the run, if something did."""
        self._apply(Tick())

    def stop(self, reason: str) -> None:
        self._tell("stopping", reason=reason)
        self._apply(Stopping(reason))

    def ended(self) -> Literal["completed", "stopped"] | None:
        return machine.ended(self._state, self._clock())

    def close(self) -> None:
        self._merges.put(None)
        self._thread.join()
        with self._changed:
            self._failure = self._failure or NebulaError("this coordinator was closed")
            self._changed.notify_all()  # nobody waits for what will not come
            self._journal.close()

    def rejected(self, cluster: str, reason: str) -> None:
        """Count a frame or delta that was refused."""
        with self._changed:
            self.tally.rejected[reason] = self.tally.rejected.get(reason, 0) + 1
        self._tell("rejected", cluster=cluster, reason=reason)

    def _apply(self, event: Event) -> None:
        with self._changed:
            if self._failure is not None:
                raise self._failure
            if isinstance(event, JOURNALED):
                self._guard(lambda: self._journal.append(event))
            self._state, effects = machine.step(self._state, event, self._clock())
            self._count(event, effects)
            for effect in effects:
                self._guard(partial(self._perform, effect))
            self._changed.notify_all()

    def _count(self, event: Event, effects: tuple[Effect, ...]) -> None:
        if isinstance(event, Joined):
            self.tally.of(event.cluster).joined()
        if isinstance(event, Reported):
            self.tally.of(event.cluster).reported(event.report)
        for effect in effects:
            if isinstance(effect, RoundClosed):
                self.tally.round_closed(effect.reports)

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Merge():
                self._merges.put(effect)
            case RoundClosed():
                for kind, fields in narrate.round_closed(
                    effect.round, effect.reports, self.tally, self.global_digest()
                ):
                    self._tell(kind, **fields)
            case Alarm():
                self._tell("alarm", kind=effect.kind, cluster=effect.cluster, detail=effect.detail)
            case QuorumLost():
                membership = self.agreement.run.membership
                self._failure = self._failure or QuorumError(
                    f"round {effect.round} has deltas of {len(effect.arrived)} clusters "
                    f"({', '.join(effect.arrived)}), its quorum is {membership.quorum}, and max_stall "
                    f"({membership.max_stall:g} s) has passed",
                    hint="bring the missing clusters back, then `nebula resume` goes on from the last commit",
                )

    def _merge_all(self) -> None:
        while (effect := self._merges.get()) is not None:
            try:
                self._guard(partial(self._merge, effect))
            except NebulaError:
                return  # it is the failure that the next tick raises

    def _merge(self, effect: Merge) -> None:
        committed = self._merger.merge(effect)
        self._apply(committed)
        update_bytes = self._ledger.size(committed.blobs["update"])
        self._tell("commit", **narrate.committed(committed, update_bytes))
        with self._changed:
            self._ledger.keep(_live_blobs(self._state))

    def _tell(self, event: str, /, **fields: object) -> None:
        self._guard(lambda: self._events.emit(event, **fields))

    def _guard(self, act: Callable[[], T]) -> T:
        """Anything that fails while writing ends this coordinator: nothing may be acknowledged on top of it."""
        try:
            return act()
        except Exception as error:
            with self._changed:
                self._failure = self._failure or _fatal(error)
                self._changed.notify_all()
            raise self._failure from error


def rules_of(agreement: Agreement, fragments: tuple[str, ...]) -> Rules:
    run = agreement.run
    return Rules(
        members=tuple(sorted(agreement.members)),
        fragments=fragments,
        rounds=run.rounds,
        inner_steps=run.inner_steps,
        evaluate_every=run.evaluate_every,
        quorum=run.membership.quorum,
        max_stall=run.membership.max_stall,
    )


def _live_blobs(state: State) -> set[str]:
    """What the journal's newest two commits and the deltas of the current round refer to."""
    commits = [c for f in state.fragments.values() for c in (f.commit, f.previous) if c is not None]
    deltas = {a.blob for f in state.fragments.values() for a in f.arrived.values()}
    return deltas.union(*(commit.blobs.values() for commit in commits))


def _fatal(error: Exception) -> NebulaError:
    """What a failed write means for whoever runs the coordinator."""
    if isinstance(error, NebulaError):
        return error
    full = (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "disk is full" in str(error)
    if full:
        return PreflightError(
            f"the coordinator's disk is full ({error}); nothing was acknowledged that is not on it",
            hint="free some space, then `nebula resume` goes on from the last commit",
        )
    return NebulaError(f"the coordinator cannot go on: {type(error).__name__}: {error}")
