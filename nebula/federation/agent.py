"""The loop each cluster runs. It imports no torch: tensors stay with the ranks, packets pass by reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from nebula.clock import REAL, Clock, Task
from nebula.errors import NebulaError, RankFailure
from nebula.federation.membership import BEAT_SECONDS
from nebula.types import (
    ROLE,
    Beat,
    Engine,
    Evaluation,
    Held,
    Packets,
    Payload,
    Pulled,
    PushTicket,
    Report,
    RoundPlan,
    RoundReport,
    Steps,
    Transport,
)

Emit = Callable[..., None]

PROGRESS_SECONDS = 1.0
"""How often training comes up for air to report progress."""

MOST_REPAIRS = 3
"""Times in a row that a cluster is sent the state because its digest is wrong, before the agent gives up."""

MOST_REBUILDS = 5
"""Rank failures in a row, without a finished round in between, before the agent gives up."""


@dataclass(slots=True)
class Agent:
    """`emit(kind, **fields)` records an event; `checkpoint_every` is in rounds."""

    cluster: str
    engine: Engine
    transport: Transport
    emit: Emit
    checkpoint_every: int
    clock: Clock = REAL
    held: dict[str, Held] = field(default_factory=dict)
    rebuilds: int = 0
    beat: Beat = field(default_factory=Beat)
    """How far this cluster is."""
    _over: bool = False
    _pace: float = 0.0
    _unsaved: bool = False
    """Whether the ranks hold a finished round that the disk does not."""
    _trained: tuple[int, Report, Evaluation | None] | None = None
    """The round whose inner steps the ranks have taken but not merged; they must not be taken on top of themselves."""
    _due: int | None = None
    """The checkpoint to write once the round before it is reported: a round on disk is not trained again, so its report
    could not be had again."""

    def run(self) -> Literal["done", "stop"]:
        """Take part until the run is done or stopped. Raises what cannot be survived here."""
        self.clock.spawn("beats", self._tell)
        try:
            return self._take_part()
        finally:
            self._over = True

    def leave(self) -> None:
        """Tell the coordinator not to wait for this cluster."""
        self._over = True
        self.transport.beat(replace(self.beat, leaving=True))

    def _tell(self) -> None:
        """Say every now and then that this cluster lives, whatever it is busy with."""
        while not self._over:
            try:
                self.transport.beat(self.beat)
            except NebulaError:
                return  # whatever it is, the loop below hears of it
            self.clock.sleep(BEAT_SECONDS)

    def _take_part(self) -> Literal["done", "stop"]:
        report: RoundReport | None = None
        failures, diverged, built = 0, 0, False
        while True:
            try:
                if not built:
                    self._build()
                    built = True
                plan = self.transport.plan(self.held, report)
                report = None
                if self._due is not None:
                    self._save(self._due)
                match plan.action:
                    case "train":
                        report = self._round(plan)
                        failures = 0
                    case "catch_up":
                        diverged = diverged + 1 if plan.reason == "diverged" else 0
                        self._catch_up(plan, diverged)
                    case "done" | "stop":
                        self._leave(plan)
                        return plan.action
            except RankFailure as failure:
                failures, built = failures + 1, False
                self._survive(failure, failures)

    def _round(self, plan: RoundPlan) -> RoundReport | None:
        """One outer round: train, send what was learned, take what everyone learned. None if the run stopped before
        the round was committed; it is then trained anew when the run is resumed."""
        if self._trained is None or self._trained[0] != plan.round:  # else the run was stopped, and goes on already
            evaluation = self._evaluate(plan)
            self._trained = plan.round, self._train(plan), evaluation
        _, trained, evaluation = self._trained
        try:
            stalled = self._exchange(plan, trained) if plan.fragments else 0.0
        except _Ended:
            self._unsaved = False  # the ranks hold half a round; the disk has what came before it
            return None
        self._trained = None
        if plan.fragments:
            self._unsaved = True
            if (plan.round + 1) % self.checkpoint_every == 0:
                self._due = plan.round + 1
        return RoundReport(
            round=plan.round,
            steps=trained.steps,
            tokens=trained.tokens,
            loss=trained.loss,
            compute_s=trained.seconds,
            stall_s=stalled,
            eval=evaluation,
        )

    def _leave(self, plan: RoundPlan) -> None:
        """A stopped run is resumed from here exactly, wherever the last checkpoint was due."""
        if plan.action == "stop" and self._unsaved:
            self._save(plan.round)
        self.emit("phase", phase="done" if plan.action == "done" else "stopped")
        self.engine.stop()

    def _save(self, tag: int) -> None:
        self.engine.save(tag, self.held)
        self._unsaved, self._due = False, None

    def _evaluate(self, plan: RoundPlan) -> Evaluation | None:
        if not plan.eval_count:
            return None
        self.emit("phase", phase="evaluating", round=plan.round)
        return self.engine.evaluate(plan.eval_index, plan.eval_count)

    def _train(self, plan: RoundPlan) -> Report:
        """The inner steps, a second's worth at a time so that progress can be seen."""
        if plan.inner_steps:
            self.emit("phase", phase="training", round=plan.round)
        total, done, tokens, loss, seconds = plan.inner_steps, 0, 0, 0.0, 0.0
        while done < total:
            steps = min(max(int(PROGRESS_SECONDS / self._pace), 1) if self._pace else 1, total - done)
            part = self.engine.train(
                Steps(round=plan.round, position=plan.position, first=done, count=steps, total=total)
            )
            self._pace = part.seconds / part.steps
            done, tokens, seconds = done + part.steps, tokens + part.tokens, seconds + part.seconds
            loss += part.loss * part.tokens
            self.beat = Beat(round=plan.round, step=done, steps=total)
            self.emit(
                "step",
                round=plan.round,
                step=done,
                steps=total,
                tokens=part.tokens,
                loss=part.loss,
                tokens_per_s=part.tokens / part.seconds,
            )
        return Report(steps=done, tokens=tokens, loss=loss / tokens if tokens else 0.0, seconds=seconds)

    def _exchange(self, plan: RoundPlan, trained: Report) -> float:
        """Push every due fragment, then apply the commits as they come. Returns seconds spent waiting."""
        self.emit("phase", phase="pushing", round=plan.round)
        stalled = 0.0
        waiting: dict[str, Task[tuple[Pulled, Payload]]] = {}
        try:
            for fragment, base in plan.fragments.items():
                ticket = PushTicket(
                    role=ROLE, fragment=fragment, round=plan.round, base=base, weight=float(trained.tokens)
                )
                packets = self.engine.pull(fragment)
                waiting[fragment] = Task(self.clock, "exchange", partial(self._deliver, ticket, packets))
            for fragment, delivery in waiting.items():
                start = self.clock.now()
                pulled, payload = delivery.result()
                stalled += self.clock.now() - start
                self._apply(fragment, pulled, payload)
        except Exception:
            for delivery in waiting.values():  # a group that is rebuilt delivers anew, and not beside its predecessor
                delivery.wait()
            raise
        return stalled

    def _deliver(self, ticket: PushTicket, packets: Packets) -> tuple[Pulled, Payload]:
        self.transport.push(ticket, packets)
        return self.transport.pull("update", ticket.fragment, ticket.base + 1)

    def _apply(self, fragment: str, pulled: Pulled, payload: Payload) -> None:
        if pulled.status == "ready":
            self.emit("phase", phase="applying", fragment=fragment)
            merged = self.cluster in pulled.contributors
            self._push(fragment, "update", pulled, payload, merged)
        elif pulled.status == "gone":
            self._adopt(fragment, pulled.version)
        else:
            raise _Ended

    def _push(
        self, fragment: str, kind: Literal["update", "state"], pulled: Pulled, payload: Payload, merged: bool
    ) -> None:
        digest = self.engine.push(fragment, kind, payload, merged=merged)
        if digest != pulled.digest:
            # The next plan request carries it to the coordinator, which raises the alarm and sends the state anew.
            self.emit("alarm", kind="digest_mismatch", fragment=fragment, version=pulled.version)
        self.held[fragment] = Held(pulled.version, digest)

    def _adopt(self, fragment: str, version: int) -> None:
        pulled, payload = self.transport.pull("state", fragment, version)
        self._push(fragment, "state", pulled, payload, False)

    def _catch_up(self, plan: RoundPlan, diverged: int) -> None:
        if diverged > MOST_REPAIRS:
            raise NebulaError(
                f"cluster {self.cluster} was sent the state of {', '.join(sorted(plan.fragments))} "
                f"{MOST_REPAIRS} times and its digest is still wrong",
                hint="a device or its memory computes wrongly, or this Nebula is another version; keep the cluster out",
            )
        self.emit("phase", phase="catching up", round=plan.round)
        self._trained = None
        for fragment, version in plan.fragments.items():
            if plan.reason == "diverged" or not self._follow(fragment, version):
                self._adopt(fragment, version)

    def _follow(self, fragment: str, version: int) -> bool:
        """Take the updates that were missed, one by one: fewer bytes than the state, and the same bits. False if the
        coordinator no longer keeps all of them; it does not have a later one without those in between."""
        while (held := self.held[fragment].version) < version:
            pulled, payload = self.transport.pull("update", fragment, held + 1)
            if pulled.status != "ready":
                return False
            self._push(fragment, "update", pulled, payload, self.cluster in pulled.contributors)
        return True

    def _build(self) -> None:
        self.emit("phase", phase="building")
        self._trained = None
        self.held = self.engine.start()
        self._unsaved, self._due = False, None

    def _survive(self, failure: RankFailure, failures: int) -> None:
        self.emit("rank_failure", rank=failure.rank, message=failure.message)
        if failures > MOST_REBUILDS:
            raise NebulaError(
                f"cluster {self.cluster} lost a rank {failures} times without finishing a round: {failure.message}",
                hint="see the cluster's log; a rank that dies at once usually lacks memory",
            ) from failure
        self.rebuilds += 1


class _Ended(Exception):
    """The run stops before the version that is waited for exists."""
