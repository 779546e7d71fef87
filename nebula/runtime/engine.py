"""A cluster's ranks as one object. Imports neither torch nor ray: tensors and packets stay with the ranks."""

from __future__ import annotations

import importlib
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from nebula.errors import NebulaError, RankFailure
from nebula.types import Evaluation, Held, Packets, Payload, Report, StartReport, Steps
from nebula.wan.digest import Lanes, fragment_digest

GRACE = 2.0
"""Seconds that the other ranks have to tell their side once one has failed; then they count as blocked."""

COLLATERAL = ("connection closed by peer", "connection reset by peer", "broken pipe", "socket closed", "recvmsg failed")
"""What gloo and NCCL say on a survivor when a peer is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """What to start. `worker` is an importable "module:Class", built as `Class(**settings, rank=…, world=count)` in
    the process of its rank, so that the driver never imports torch. `threads` per rank."""

    count: int
    settings: Mapping[str, Any]
    worker: str = "nebula.train.worker:Worker"
    threads: int = 1

    def build(self, rank: int) -> Any:
        return make(self.worker, {**self.settings, "rank": rank, "world": self.count})


class Group(Protocol):
    """Ranks that run. Raises RankFailure when one dies, blaming the one that died and not those that noticed, and what
    a rank itself raised as a NebulaError. After either, the group is dead: kill it and launch another."""

    def call(self, method: str, *args: Any) -> list[Any]:
        """The method on every rank at once. Results in rank order."""
        ...

    def call_first(self, method: str, *args: Any) -> Any:
        """The method on rank 0 alone."""
        ...

    def references(self, method: str, *args: Any) -> Sequence[Any]:
        """As `call`, but the values stay where they are: one handle per rank, to be passed on as an argument."""
        ...

    def kill(self) -> None:
        """End every rank at once. Never fails, may be repeated."""
        ...


class GroupEngine:
    """types.Engine over groups of ranks. `launch` starts a fresh group or raises PreflightError."""

    def __init__(self, launch: Callable[[], Group]) -> None:
        self._launch = launch
        self._group: Group | None = None

    def start(self) -> dict[str, Held]:
        self._kill()
        self._group = self._launch()
        reports: list[StartReport] = self._group.call("start", self._group.call_first("rendezvous"))
        versions = dict(reports[0].held)
        for rank, report in enumerate(reports):
            if dict(report.held) != versions:
                raise NebulaError(
                    f"rank {rank} holds versions {dict(report.held)}, rank 0 holds {versions}",
                    hint="the checkpoint folder must be one that all ranks of the cluster see",
                )
        return {
            fragment: Held(version, fragment_digest(report.lanes[fragment] for report in reports))
            for fragment, version in versions.items()
        }

    def train(self, steps: Steps) -> Report:
        report: Report = self._running.call("train", steps)[0]
        return report

    def pull(self, fragment: str) -> Packets:
        return self._running.references("encode", fragment)

    def push(self, fragment: str, kind: Literal["update", "state"], payload: Payload, *, merged: bool) -> str:
        parts: list[Mapping[str, Lanes]]
        if kind == "update":
            parts = self._running.call("apply", fragment, payload, merged)
        else:
            parts = self._running.call("adopt", fragment, payload)
        return fragment_digest(parts)

    def evaluate(self, index: int, count: int) -> Evaluation:
        evaluation: Evaluation = self._running.call("evaluate", index, count)[0]
        return evaluation

    def save(self, tag: int, held: Mapping[str, Held]) -> None:
        self._running.call("save", tag, {fragment: (h.version, h.digest) for fragment, h in held.items()})

    def stop(self) -> None:
        """End the ranks; everything worth keeping was saved before."""
        self._kill()

    @property
    def _running(self) -> Group:
        assert self._group is not None, "start() first"
        return self._group

    def _kill(self) -> None:
        if self._group is not None:
            self._group.kill()
            self._group = None


# --- what every kind of group shares ------------------------------------------------------------------------------


def make(name: str, settings: Mapping[str, Any]) -> Any:
    """Import "module:Class" and build it."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)(**settings)


def attempt(who: str, rank: int, act: Callable[[], Any]) -> tuple[NebulaError | None, Any]:
    """Run `act` on a rank. Only errors of ours leave its process: others may not unpickle without torch."""
    try:
        return None, act()
    except NebulaError as error:
        return error, None
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if any(sign in text.lower() for sign in COLLATERAL):
            return RankFailure(rank, f"{who} lost a peer: {text}"), None
        tail = "".join(traceback.format_exception(error)).strip().splitlines()[-8:]
        failure = NebulaError("\n".join([f"{who} failed: {text}", *tail]))
        failure.__cause__ = error  # for --debug; stays behind when the failure is pickled
        return failure, None


def settle(count: int, outcome: Callable[[float | None], tuple[int, NebulaError | None] | None]) -> None:
    """Wait until `count` ranks have answered, or one has failed and the others had time to say why.

    `outcome(timeout)` gives the next (rank, error or None), None when the timeout passed, and raises RankFailure when
    a rank is dead. A rank's own error goes before the collateral ones.
    """
    errors: list[NebulaError] = []
    until: float | None = None
    for _ in range(count):
        answer = outcome(None if until is None else max(until - time.monotonic(), 0.0))
        if answer is None:
            break
        if answer[1] is not None:
            errors.append(answer[1])
            until = until or time.monotonic() + GRACE
    if errors:
        raise next((error for error in errors if not isinstance(error, RankFailure)), errors[0])
