"""The loop each cluster runs. It imports no torch: tensors stay with the ranks, packets pass by reference."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

from nebula.errors import NebulaError, RankFailure
from nebula.types import (
    ROLE,
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
    Transport,
)

Emit = Callable[..., None]

PROGRESS_SECONDS = 1.0
"""How often training comes up for air to report progress."""

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
    held: dict[str, Held] = field(default_factory=dict)
    rebuilds: int = 0
    _pace: float = 0.0

    def run(self) -> Literal["done", "stop"]:
        """Take part until the run is done or stopped. Raises what cannot be survived here."""
        self._build()
        report: RoundReport | None = None
        failures = 0
        while True:
            plan = self.transport.plan(self.held, report, self.rebuilds)
            report = None
            match plan.action:
                case "train":
                    try:
                        report = self._round(plan)
                        failures = 0
                    except RankFailure as failure:
                        failures += 1
                        self._rebuild(failure, failures)
                case "catch_up":
                    self._catch_up(plan)
                case "wait":
                    time.sleep(PROGRESS_SECONDS)
                case "done" | "stop":
                    self.engine.stop()
                    return plan.action

    def _round(self, plan: RoundPlan) -> RoundReport:
        """One outer round: train, send what was learned, take what everyone learned."""
        evaluation = self._evaluate(plan)
        trained = self._train(plan)
        stalled = self._exchange(plan, trained) if plan.fragments else 0.0
        after = plan.round + 1
        if plan.fragments and after % self.checkpoint_every == 0:
            self.engine.save(after, self.held)
        return RoundReport(
            round=plan.round,
            steps=trained.steps,
            tokens=trained.tokens,
            loss=trained.loss,
            compute_s=trained.seconds,
            stall_s=stalled,
            eval=evaluation,
            evaluated_round=plan.round,
        )

    def _evaluate(self, plan: RoundPlan) -> Evaluation | None:
        if not plan.eval_count:
            return None
        self.emit("phase", phase="evaluating", round=plan.round)
        return self.engine.evaluate(plan.eval_index, plan.eval_count)

    def _train(self, plan: RoundPlan) -> Report:
        """The inner steps, a second's worth at a time so that progress can be seen."""
        self.emit("phase", phase="training", round=plan.round)
        total, done, tokens, loss, seconds = plan.inner_steps, 0, 0, 0.0, 0.0
        while done < total:
            steps = min(max(int(PROGRESS_SECONDS / self._pace), 1) if self._pace else 1, total - done)
            part = self.engine.train(plan.round, done, steps, total)
            self._pace = part.seconds / part.steps
            done, tokens, seconds = done + part.steps, tokens + part.tokens, seconds + part.seconds
            loss += part.loss * part.tokens
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
        with ThreadPoolExecutor(len(plan.fragments), thread_name_prefix="exchange") as pool:
            waiting = {}
            for fragment, base in plan.fragments.items():
                ticket = PushTicket(
                    role=ROLE, fragment=fragment, round=plan.round, base=base, weight=float(trained.tokens)
                )
                packets = self.engine.pull(fragment)
                waiting[fragment] = pool.submit(self._deliver, ticket, packets)
            for fragment, delivery in waiting.items():
                start = time.monotonic()
                pulled, payload = delivery.result()
                stalled += time.monotonic() - start
                self._apply(fragment, pulled, payload)
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
            raise NebulaError(f"the run ended before round of fragment {fragment} was committed")

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

    def _catch_up(self, plan: RoundPlan) -> None:
        self.emit("phase", phase="catching up", round=plan.round)
        for fragment, version in plan.fragments.items():
            self._adopt(fragment, version)

    def _build(self) -> None:
        self.emit("phase", phase="building")
        self.held = self.engine.start()

    def _rebuild(self, failure: RankFailure, failures: int) -> None:
        self.emit("rank_failure", rank=failure.rank, message=failure.message)
        if failures > MOST_REBUILDS:
            raise NebulaError(
                f"cluster {self.cluster} lost a rank {failures} times without finishing a round: {failure.message}",
                hint="see the cluster's log; a rank that dies at once usually lacks memory",
            ) from failure
        self.rebuilds += 1
        self._build()
