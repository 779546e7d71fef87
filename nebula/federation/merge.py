"""The arithmetic of a commit: decode, average, step, encode, and the fragment's state on disk.

Everything here is a function of the journaled deltas and the fragment's last committed state, in fp32 on the CPU and
in a fixed order, so a merge repeated after a crash gives the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt

from torch import Tensor

from nebula.checkpoint.ledger import Ledger
from nebula.clock import Clock
from nebula.config import Agreement
from nebula.errors import JournalError, PacketError
from nebula.federation.aggregate import Shapes, WeightedMean, check_tiling
from nebula.federation.events import Arrived, Committed, Merge
from nebula.federation.outer import outer_step
from nebula.models.fragments import fragments
from nebula.models.init import initial, parameter_shapes
from nebula.parallel.export import box, boxes, region
from nebula.types import ROLE, Delta, Packet, Slice
from nebula.wan.codec.layout import flatten
from nebula.wan.codec.pipeline import Encoder, decode
from nebula.wan.codec.prior import remember
from nebula.wan.digest import fragment_digest, lanes
from nebula.wan.frame import pack, unpack

ENVELOPE = 1 << 20
"""Bytes of headers a packet may have beyond its values."""


def fragment_shapes(agreement: Agreement) -> dict[str, Shapes]:
    """Fragment → parameter → shape."""
    model = agreement.run.model
    shapes = parameter_shapes(model)
    groups = fragments(list(shapes), model.layers, agreement.run.fragments)
    return {fragment: {name: shapes[name] for name in names} for fragment, names in groups.items()}


def largest_payload(shapes: Shapes, ranks: int) -> int:
    """The most bytes an honest cluster sends for a fragment: fp32, padded, one packet per rank."""
    return 5 * sum(prod(shape) for shape in shapes.values()) + ranks * ENVELOPE


def read_delta(
    payload: bytes | memoryview, parts: Sequence[int], shapes: Shapes, last: Mapping[str, Tensor] | None = None
) -> dict[Slice, Tensor]:
    """Decode one packet per rank. `last`: the update before, which they may need. Raises PacketError unless together
    they tile the fragment with finite values."""
    if sum(parts) != len(payload):
        raise PacketError(f"the packets' sizes add up to {sum(parts)} bytes but {len(payload)} came")
    elements = sum(prod(shape) for shape in shapes.values())
    slices: dict[Slice, Tensor] = {}
    at = 0
    for size in parts:
        part = memoryview(payload)[at : at + size]
        decoded = decode(unpack(part, max_bytes=size), max_elements=2 * elements + 65536, last=_lookup(last))
        if twice := slices.keys() & decoded.keys():
            raise PacketError(f"two packets hold the same slice of parameter {min(w.name for w in twice)!r}")
        slices |= decoded
        at += size
    check_tiling(slices, shapes)
    return slices


@dataclass(slots=True)
class FragmentState:
    """What the coordinator holds of a fragment, by full parameter name. `last`: the update that led to this version,
    which clusters know too, as `remember` keeps it; empty at version 0."""

    version: int
    params: dict[str, Tensor]
    momentum: dict[str, Tensor]
    last: dict[str, Tensor]
    encoder: Encoder


class Merger:
    """Owns the tensors of every fragment; the state machine owns which version they are."""

    def __init__(self, agreement: Agreement, ledger: Ledger, clock: Clock) -> None:
        self.shapes = fragment_shapes(agreement)
        self._clock = clock
        self._run = agreement.run
        self._ledger = ledger
        self._states: dict[str, FragmentState] = {}

    def found(self) -> Iterator[Committed]:
        """Version 0 of every fragment, from the seed."""
        for fragment, shapes in self.shapes.items():
            params = {name: initial(name, shape, self._run.model, self._run.seed) for name, shape in shapes.items()}
            self._states[fragment] = FragmentState(0, params, {}, {}, Encoder(self._run.wan.down))
            blobs = {"params": self._write(params)}
            yield Committed(
                fragment=fragment,
                version=0,
                digest=state_digest(params),
                blobs=blobs,
                state_bytes=self._ledger.size(blobs["params"]),
            )

    def restore(self, commit: Committed) -> None:
        """Load a fragment's committed state. Raises JournalError if a blob is missing or corrupt."""
        blobs = commit.blobs
        encoder = Encoder(self._run.wan.down)
        if "residual" in blobs:
            encoder.restore(boxes(self._read(blobs["residual"])))
        momentum = self._read(blobs["momentum"]) if "momentum" in blobs else {}
        params = self._read(blobs["params"])
        check_digest(params, commit.digest)
        last = {}
        if "update" in blobs:
            data = self._ledger.get(blobs["update"])
            last = remembered(by_name(unpack(data, max_bytes=len(data)), self.shapes[commit.fragment]))
        self._states[commit.fragment] = FragmentState(commit.version, params, momentum, last, encoder)

    def repair(self, previous: Committed, effect: Merge, commit: Committed) -> None:
        """Have a commit whose blobs are damaged once more: merge its deltas again, onto the state before it. Raises
        JournalError if those are damaged, too, or the result is another one."""
        self.restore(previous)
        again = self.merge(effect)
        if (again.digest, again.blobs) != (commit.digest, commit.blobs):
            raise JournalError(f"merging {effect.fragment} version {effect.version} again gave another result")

    def merge(self, effect: Merge) -> Committed:
        """Average, step, encode the update, apply what was encoded, store. Raises OSError if the disk is full."""
        start = self._clock.now()
        state, shapes = self._states[effect.fragment], self.shapes[effect.fragment]
        mean = WeightedMean(shapes)
        for arrival in effect.arrivals:
            mean.add(self._delta(arrival, shapes, state))
        delta = mean.result()
        update, momentum = outer_step(self._run.outer, delta, state.momentum, effect.scale)
        packet = state.encoder.encode(boxes(update))
        applied = by_name(packet, shapes)
        params = {name: state.params[name] + values for name, values in applied.items()}
        state.encoder.settle(True)
        blobs = {"update": self._ledger.put(pack(packet)), "params": self._write(params)}
        if momentum:
            blobs["momentum"] = self._write(momentum)
        if residual := {where.name: values for where, values in state.encoder.residual().items()}:
            blobs["residual"] = self._write(residual)
        last = remembered(applied)
        self._states[effect.fragment] = FragmentState(effect.version, params, momentum, last, state.encoder)
        return Committed(
            fragment=effect.fragment,
            version=effect.version,
            digest=state_digest(params),
            contributors=tuple(arrival.cluster for arrival in effect.arrivals),
            blobs=blobs,
            update_bytes=self._ledger.size(blobs["update"]),
            state_bytes=self._ledger.size(blobs["params"]),
            norm=sqrt(sum(float(d.square().sum()) for d in delta.values())),
            seconds=self._clock.now() - start,
        )

    def check(self, fragment: str, version: int, payload: bytes, parts: Sequence[int]) -> bool:
        """Whether a delta against `version` still can be merged. Raises PacketError if it cannot be read."""
        state = self._states[fragment]
        if state.version != version:
            return False
        read_delta(payload, parts, self.shapes[fragment], state.last)
        return True

    def _delta(self, arrival: Arrived, shapes: Shapes, state: FragmentState) -> Delta:
        return Delta(
            cluster=arrival.cluster,
            role=ROLE,
            round=arrival.round,
            fragment=arrival.fragment,
            base=state.version,
            weight=arrival.weight,
            tensors=read_delta(self._ledger.get(arrival.blob), arrival.parts, shapes, state.last),
        )

    def _write(self, tensors: Mapping[str, Tensor]) -> str:
        return self._ledger.put(pack(flatten(boxes(tensors), 1)))

    def _read(self, blob: str) -> dict[str, Tensor]:
        return read_state(self._ledger.get(blob))


def state_digest(params: Mapping[str, Tensor]) -> str:
    """The fragment's digest, from full parameters."""
    return fragment_digest([{where.name: lanes(values, where) for where, values in boxes(params).items()}])


def check_digest(params: Mapping[str, Tensor], expected: str) -> None:
    """Raises JournalError if a restored state is not the one that was committed."""
    digest = state_digest(params)
    if digest != expected:
        raise JournalError(f"a restored fragment has digest {digest}, its commit says {expected}")


def by_name(update: Packet, shapes: Shapes) -> dict[str, Tensor]:
    """What clusters apply of an update of our own."""
    elements = sum(prod(shape) for shape in shapes.values())
    return {where.name: values for where, values in decode(update, max_elements=elements).items()}


def remembered(update: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an applied update is to those that follow."""
    return {name: remember(values) for name, values in update.items()}


def _lookup(last: Mapping[str, Tensor] | None) -> Callable[[Slice], Tensor] | None:
    """Cuts boxes out of the update before. The function raises PacketError for what is not there."""
    if not last:
        return None
    whole = {name: [(box(name, values), values)] for name, values in last.items()}
    return lambda wanted: region(wanted, whole.get(wanted.name, []))


def read_state(data: bytes) -> dict[str, Tensor]:
    """Full parameters by name from a state blob: a packet that no codec has touched."""
    packet = unpack(data, max_bytes=len(data))
    return {where.name: values.clone() for where, values in decode(packet, max_elements=len(data)).items()}
