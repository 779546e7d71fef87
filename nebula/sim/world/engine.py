"""One simulated rank as an agent sees it: it takes virtual time, keeps checkpoints and fails.

`Produced`, which outlives every simulated process, notices when a cluster that came back does not repeat itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import structlog

from nebula.checkpoint.store import Folder, Store
from nebula.clock import Clock
from nebula.config import Agreement
from nebula.errors import PreflightError, RankFailure
from nebula.files import System
from nebula.sim.world.rank import Memory
from nebula.types import Evaluation, Held, Packet, Report, Steps
from nebula.wan.frame import unpack

Emit: TypeAlias = Callable[..., Any]

KEEP = 2
"""Checkpoints that stay, as many as real ranks keep."""

_SHA = 32

log = structlog.get_logger()


class Produced:
    """Every packet that any life of any cluster has produced."""

    def __init__(self) -> None:
        self._by_lineage: dict[tuple[str, int, str, str], tuple[str, str]] = {}
        self._known: set[tuple[str, int, str, str, str]] = set()

    def record(self, cluster: str, round: int, fragment: str, lineage: str, base: str, payload: str) -> None:
        """`lineage`: a hash of all that made the state the packet was encoded from; `base`: digest of the global
        parameters it is measured against; `payload`: SHA-256 of its bytes. Raises AssertionError if the same past has
        led to something else before."""
        key, made = (cluster, round, fragment, lineage), (base, payload)
        if self._by_lineage.setdefault(key, made) != made:
            raise AssertionError(
                f"a restored cluster does not repeat its round to the byte: {cluster}, round {round}, {fragment}: "
                f"(base, payload) {made} where an earlier life had {self._by_lineage[key]}"
            )
        self._known.add((cluster, round, fragment, *made))

    def knows(self, cluster: str, round: int, fragment: str, base: str, payload: str) -> bool:
        """Whether that cluster has produced this very packet for that round, against that base."""
        return (cluster, round, fragment, base, payload) in self._known


class SimEngine:
    """types.Engine over one simulated rank of `cluster`. Checkpoints lie in `folder` of `disk`; inner steps take
    `seconds_per_step` of `clock`, an evaluation as long as one step, everything else no time. `emit(kind, **fields)`
    hears of damaged checkpoints.

    `fail_next`, once set, is raised by the call that is under way or comes next, and the rank's memory is lost.
    """

    def __init__(
        self,
        agreement: Agreement,
        cluster: str,
        disk: System,
        folder: Path,
        clock: Clock,
        seconds_per_step: float,
        ledger: Produced,
        *,
        emit: Emit = log.warning,
    ) -> None:
        self.fail_next: RankFailure | None = None
        self.memory: Memory | None = None
        self._agreement, self._cluster = agreement, cluster
        self._disk, self._folder = disk, folder
        self._clock, self._seconds_per_step = clock, seconds_per_step
        self._produced, self._emit = ledger, emit

    def start(self) -> dict[str, Held]:
        """Raises PreflightError if the disk refuses."""
        self._fail()
        self.memory = None
        try:
            store = Folder(self._folder, self._disk)
            store.sweep()
            found = newest(store, self._emit)
        except OSError as error:
            raise PreflightError(f"checkpoints in {self._folder}: {error}", hint="free some space") from error
        self.memory = memory = Memory(self._agreement, self._cluster, found)
        return {fragment: Held(memory.versions.get(fragment, 0), digest) for fragment, digest in memory.digests.items()}

    def train(self, steps: Steps) -> Report:
        assert 0 < steps.count <= steps.total - steps.first, f"{steps}"
        seconds = self._seconds_per_step * steps.count
        memory = self._work(seconds)
        for step in range(steps.first, steps.first + steps.count):
            memory.inner_step(steps.position + step)
        memory.round = steps.round
        tokens = steps.count * self._agreement.members[self._cluster].batch * self._agreement.run.data.seq_len
        return Report(steps=steps.count, tokens=tokens, loss=memory.loss(), seconds=seconds)

    def pull(self, fragment: str) -> Sequence[bytes]:
        memory = self._running()
        packet = memory.encode(fragment)
        lineage, base = memory.lineage[fragment], memory.digests[fragment]
        payload = hashlib.sha256(packet).hexdigest()
        self._produced.record(self._cluster, memory.round, fragment, lineage, base, payload)
        return [packet]

    def push(self, fragment: str, kind: Literal["update", "state"], payload: bytes, *, merged: bool) -> str:
        return self._running().apply(fragment, kind, payload, merged=merged)

    def evaluate(self, index: int, count: int) -> Evaluation:
        memory = self._work(self._seconds_per_step)
        data = self._agreement.run.data
        tokens = data.seq_len * len(range(index, data.eval_windows, count))
        return Evaluation(loss_sum=tokens * memory.loss(), tokens=tokens)

    def save(self, tag: int, held: Mapping[str, Held]) -> None:
        """Raises PreflightError if the disk refuses; the checkpoints before this one are then still there."""
        body = self._running().pack({fragment: h.version for fragment, h in held.items()})
        try:
            store = Folder(self._folder, self._disk)
            store.put(f"{tag:08d}", hashlib.sha256(body).digest() + body)
            for name in store.names()[:-KEEP]:
                store.delete(name)
        except OSError as error:
            raise PreflightError(f"checkpoint {tag} in {self._folder}: {error}", hint="free some space") from error

    def stop(self) -> None:
        self.memory = None

    def _work(self, seconds: float) -> Memory:
        self._running()
        self._clock.sleep(seconds)
        return self._running()

    def _running(self) -> Memory:
        self._fail()
        assert self.memory is not None, "start() first"
        return self.memory

    def _fail(self) -> None:
        if self.fail_next is not None:
            failure, self.fail_next, self.memory = self.fail_next, None, None
            raise failure


def newest(store: Store, emit: Emit) -> Packet | None:
    """The newest intact checkpoint. A damaged one is passed over with a warning."""
    for name in reversed(store.names()):
        data = store.get(name)
        body = data[_SHA:]
        if hashlib.sha256(body).digest() == data[:_SHA]:
            return unpack(body, max_bytes=len(body))
        fault = f"{len(data)} bytes that do not match their SHA-256"
        emit("checkpoint.damaged", path=f"{store}/{name}", fault=fault, action="trying the one before it")
    return None
