"""One simulated rank: the real exchange over the real parameters of a tiny model, under a toy instead of a loss.

The toy makes mistakes loud. Every inner step hashes all bits of the parameters and of the inner momentum into the
gradient, so a cluster that comes back with one wrong bit sends a packet that has nothing in common with the right one;
and `Produced`, which outlives every simulated process, notices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nebula.checkpoint.store import Folder, Store
from nebula.clock import Clock
from nebula.config import Agreement
from nebula.errors import PreflightError, RankFailure
from nebula.files import System
from nebula.models.fragments import fragments
from nebula.parallel.apply import build
from nebula.parallel.mesh import Group
from nebula.train.exchange import Exchange
from nebula.types import Evaluation, Held, Json, Packet, Report, Steps
from nebula.wan.digest import fragment_digest
from nebula.wan.frame import pack, unpack

Floats: TypeAlias = NDArray[np.float32]
Emit: TypeAlias = Callable[..., Any]

KEEP = 2
"""Checkpoints that stay, as many as real ranks keep."""

_SHA = 32
_ALONE = Group(rank=0, world=1, device=torch.device("cpu"))

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


class Memory:
    """What a rank holds and loses when it dies, from the seed or from a checkpoint. By fragment: `parameters`, of which
    the model's are views; inner `momentum`; `digests` of the global parameters; `versions` as they were at the start;
    `lineage`, a hash chain over all that has happened to it."""

    def __init__(self, agreement: Agreement, cluster: str, checkpoint: Packet | None) -> None:
        run = agreement.run
        model = build(run.model, run.seed, _ALONE, run.precision)
        parts = fragments([name for name, _ in model.named_parameters()], run.model.layers, run.fragments)
        self.round = 0
        self.parameters = {fragment: back_to_back(model, names) for fragment, names in parts.items()}
        self.momentum = {fragment: torch.zeros_like(flat) for fragment, flat in self.parameters.items()}
        self.exchange = Exchange(model, run, _ALONE)
        self.lineage = {fragment: _hash(agreement.digest(), cluster, fragment) for fragment in parts}
        self.versions = dict.fromkeys(parts, 0)
        if checkpoint is not None:
            self._load(checkpoint)
        self.digests = {fragment: fragment_digest([self.exchange.lanes(fragment)]) for fragment in parts}
        self._cluster = cluster
        self._in_flight: dict[str, str] = {}

    def inner_step(self, step: int) -> None:
        for fragment, flat in self.parameters.items():
            parameters, momentum = flat.numpy(), self.momentum[fragment].numpy()
            parameters[:], momentum[:] = toy_step(f"{self._cluster}/{fragment}/{step}", parameters, momentum)
            self._happened(fragment, "step", step)

    def loss(self) -> float:
        """A figure that depends on no order of summation: the largest parameter."""
        return max(float(flat.abs().max()) for flat in self.parameters.values())

    def encode(self, fragment: str) -> bytes:
        packet = self.exchange.encode(fragment)
        self._in_flight[fragment] = self.lineage[fragment]
        return packet

    def apply(self, fragment: str, kind: Literal["update", "state"], payload: bytes, *, merged: bool) -> str:
        """Returns the fragment's digest."""
        if kind == "update":
            lanes = self.exchange.apply(fragment, payload, merged=merged)
        else:
            lanes = self.exchange.adopt(fragment, payload)
        packet = self._in_flight.pop(fragment, "lost")
        self._happened(fragment, kind, hashlib.sha256(payload).hexdigest(), packet if merged else "not merged")
        self.digests[fragment] = fragment_digest([lanes])
        return self.digests[fragment]

    def pack(self, versions: Mapping[str, int]) -> bytes:
        note: dict[str, Json] = {"kind": "checkpoint", "versions": versions, "lineage": self.lineage}
        state = torch.cat([value.flatten() for value in self._state(self.exchange.state())])
        return pack(Packet({"state": state}, (note,)))

    def _load(self, checkpoint: Packet) -> None:
        note: Any = checkpoint.trail[0]
        exchanged = self.exchange.state()
        state = self._state(exchanged)
        saved = torch.split(checkpoint.arrays["state"], [value.numel() for value in state])
        for value, part in zip(state, saved, strict=True):
            value.copy_(part.view_as(value))
        self.exchange.restore(exchanged)
        self.lineage, self.versions = dict(note["lineage"]), dict(note["versions"])

    def _state(self, exchanged: Mapping[str, Tensor]) -> list[Tensor]:
        """Everything but the notes, in a fixed order and, all but the residuals, in place."""
        return [*self.parameters.values(), *self.momentum.values(), *exchanged.values()]

    def _happened(self, fragment: str, *what: object) -> None:
        self.lineage[fragment] = _hash(self.lineage[fragment], *what)


def toy_step(what: str, parameters: Floats, momentum: Floats) -> tuple[Floats, Floats]:
    """m ← 0.9 m + g + p / 16, p ← p − m / 64, elementwise in fp32. The gradient g ∈ [−1, 1) is SHAKE-128 of `what` and
    all bits of p and m; the pull towards zero keeps p bounded, however long the run."""
    bits = hashlib.shake_128(what.encode() + parameters.tobytes() + momentum.tobytes()).digest(2 * parameters.size)
    gradient = np.frombuffer(bits, "<i2").astype(np.float32) * np.float32(2**-15)
    momentum = np.float32(0.9) * momentum + gradient + parameters * np.float32(1 / 16)
    return parameters - momentum * np.float32(1 / 64), momentum


def back_to_back(model: nn.Module, names: Sequence[str]) -> Tensor:
    """Parameters as one flat tensor, of which those of the model are views from now on."""
    parameters = [model.get_parameter(name) for name in names]
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    for parameter, view in zip(parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True):
        parameter.data = view.view_as(parameter)
    return flat


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
