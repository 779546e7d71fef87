"""The shell around the state machine: journal, blobs and merges.

Order of every change: check → blob on disk → event in the journal → state → effects. One lock guards state and journal;
merges run on one thread of their own. Whatever fails while writing ends the coordinator: nothing may be acknowledged on
top of it.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Literal, TypeVar

from nebula.checkpoint.ledger import Ledger
from nebula.clock import Clock, Task
from nebula.config import Agreement
from nebula.errors import JournalError, NebulaError, PreflightError, QuorumError
from nebula.federation import coordinator as machine
from nebula.federation import narrate
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
    Waiting,
)
from nebula.federation.journal import JOURNALED, Journal
from nebula.federation.merge import Merger
from nebula.federation.state import Fragment, Rules, State, initial
from nebula.federation.tally import Tally
from nebula.wan.digest import global_digest

T = TypeVar("T")


class Shell:
    """One run's state, durable in `journal`, which it closes, and `ledger`. `emit(kind, **fields)` records events,
    `tally` adds it up."""

    def __init__(
        self, agreement: Agreement, journal: Journal, ledger: Ledger, emit: Callable[..., None], clock: Clock
    ) -> None:
        self.agreement = agreement
        self._emit = emit
        self._clock = clock
        self._changed = clock.condition()
        self._ledger = ledger
        self._merger = Merger(agreement, ledger, clock)
        self._journal = journal
        self._failure: NebulaError | None = None
        self._pause: QuorumError | None = None
        params = sum(prod(shape) for shapes in self._merger.shapes.values() for shape in shapes.values())
        self.tally = Tally(params)
        self._merges: deque[Merge] = deque()
        self._state = self._recover(initial(rules_of(agreement, tuple(self._merger.shapes))))
        self._task = Task(clock, "merge", self._merge_all)
        self._apply(Tick())

    def _recover(self, state: State) -> State:
        for event in self._journal.replay():
            state, effects = machine.step(state, event, self._clock.now())
            self._count(event, effects)
        if any(f.commit is None for f in state.fragments.values()):
            for event in self._merger.found():
                if state.fragments[event.fragment].commit is None:  # else a crash came in between
                    self._journal.append(event)
                    state, _ = machine.step(state, event, self._clock.now())
        else:
            for fragment in state.fragments.values():
                self._restore(fragment)
        self._ledger.begin(_live_blobs(state))
        return machine.restarted(state, self._clock.now())

    def _restore(self, fragment: Fragment) -> None:
        """Load a fragment. Blobs that were damaged are had once more from the state before them, if that is there."""
        *_, newest = fragment.chain
        where = {"fragment": newest.fragment, "version": newest.version}
        try:
            self._merger.restore(newest)
        except JournalError as error:
            self._tell("alarm", kind="damaged_blob", detail=str(error), **where)
            if fragment.merged is None or len(fragment.chain) < 2:
                raise
            self._merger.repair(fragment.chain[-2], fragment.merged, newest)
            self._tell("repaired", **where)

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
        """How the run ended. Raises QuorumError if it pauses for want of clusters."""
        state = machine.ended(self._state, self._clock.now())
        if state == "stopped" and self._pause is not None:
            raise self._pause
        return state

    def close(self) -> None:
        with self._changed:
            self._failure = self._failure or NebulaError("this coordinator was closed")
            self._changed.notify_all()  # nobody waits for what will not come
        self._task.wait()
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
            self._state, effects = machine.step(self._state, event, self._clock.now())
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
                self._merges.append(effect)
            case RoundClosed():
                for kind, fields in narrate.round_closed(
                    effect.round, effect.reports, self.tally, self.global_digest()
                ):
                    self._tell(kind, **fields)
            case Alarm():
                self._tell("alarm", kind=effect.kind, cluster=effect.cluster, detail=effect.detail)
            case Waiting():
                self._tell("waiting", round=effect.round, missing=dict(effect.missing))
            case QuorumLost():
                membership = self.agreement.run.membership
                self._pause = QuorumError(
                    f"round {effect.round} has deltas of {len(effect.arrived)} clusters "
                    f"({', '.join(effect.arrived)}), its quorum is {membership.quorum}, and max_stall "
                    f"({membership.max_stall:g} s) has passed",
                    hint="bring the missing clusters back, then `nebula resume` goes on from the last commit",
                )
                self._tell("paused", round=effect.round, arrived=list(effect.arrived), reason=self._pause.message)

    def _merge_all(self) -> None:
        while True:
            with self._changed:
                while not self._merges and self._failure is None:
                    self._changed.wait()
                if self._failure is not None:
                    return
                effect = self._merges.popleft()
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
        self._guard(lambda: self._emit(event, **fields))

    def _guard(self, act: Callable[[], T]) -> T:
        """Anything that fails while writing ends this coordinator: nothing may be acknowledged on top of it."""
        try:
            return act()
        except Exception as error:
            with self._changed:
                self._failure = self._failure or _fatal(error)
                self._changed.notify_all()
            raise self._failure from error


POWERS = {"constant": 0.0, "sqrt": 0.5, "linear": 1.0}


def rules_of(agreement: Agreement, fragments: tuple[str, ...]) -> Rules:
    run = agreement.run
    return Rules(
        members={name: agreement.tokens_per_step(name) for name in sorted(agreement.members)},
        fragments=fragments,
        rounds=run.rounds,
        inner_steps=run.inner_steps,
        evaluate_every=run.evaluate_every,
        quorum=run.membership.quorum,
        max_stall=run.membership.max_stall,
        hold=run.membership.global_batch == "hold",
        power=POWERS[run.membership.outer_lr],
    )


def _live_blobs(state: State) -> set[str]:
    """The newest two states of every fragment, the updates of its chain, the deltas of the newest commit and of the
    current round."""
    live: set[str] = set()
    for fragment in state.fragments.values():
        live |= {commit.blobs["update"] for commit in fragment.chain if "update" in commit.blobs}
        live |= {blob for commit in fragment.chain[-2:] for blob in commit.blobs.values()}
        live |= {arrival.blob for arrival in fragment.arrived.values()}
        live |= {arrival.blob for arrival in (fragment.merged.arrivals if fragment.merged else ())}
    return live


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
