"""What a simulated rank computes and remembers: the real exchange over the real parameters of a tiny model, under a toy
instead of a loss.

The toy makes mistakes loud. Every inner step hashes all bits of the parameters and of the inner momentum into the
gradient, so a cluster that comes back with one wrong bit sends a packet that has nothing in common with the right one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nebula.config import Agreement, Model
from nebula.models.fragments import fragments
from nebula.parallel.apply import build
from nebula.parallel.mesh import Group
from nebula.train.exchange import Exchange
from nebula.types import Json, Packet
from nebula.wan.digest import fragment_digest
from nebula.wan.frame import pack

Floats: TypeAlias = NDArray[np.float32]

_ALONE = Group(rank=0, world=1, device=torch.device("cpu"))


class Memory:
    """What a rank holds and loses when it dies, from the seed or from a checkpoint. By fragment: `parameters`, of which
    the model's are views; inner `momentum`; `digests` of the global parameters; `versions` as they were at the start;
    `lineage`, a hash chain over all that has happened to it."""

    def __init__(self, agreement: Agreement, cluster: str, checkpoint: Packet | None = None) -> None:
        run = agreement.run
        model = Parameters(version_0(run.model, run.seed))
        parts = fragments(list(model.by_name), run.model.layers, run.fragments)
        self.round = 0
        self.parameters = {fragment: model.lay_out(names) for fragment, names in parts.items()}
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


class Parameters(nn.Module):
    """A model's parameters without what computes with them."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.by_name = dict(values)

    def named_parameters(self, *args: Any, **settings: Any) -> Iterator[tuple[str, Any]]:
        yield from self.by_name.items()

    def lay_out(self, names: Sequence[str]) -> Tensor:
        """A flat tensor, of which these parameters are views from now on."""
        values = [self.by_name[name] for name in names]
        flat = torch.cat([value.flatten() for value in values])
        for name, value, view in zip(names, values, torch.split(flat, [v.numel() for v in values]), strict=True):
            self.by_name[name] = view.view_as(value)
        return flat


@cache
def version_0(model: Model, seed: int) -> Mapping[str, Tensor]:
    """By name, from the real model, in fp32. Not to be written to."""
    return {name: value.detach() for name, value in build(model, seed, _ALONE, "fp32").named_parameters()}


def toy_step(what: str, parameters: Floats, momentum: Floats) -> tuple[Floats, Floats]:
    """m ← 0.9 m + g + p / 16, p ← p − m / 64, elementwise in fp32. The gradient g ∈ [−1, 1) is SHAKE-128 of `what` and
    all bits of p and m; the pull towards zero keeps p bounded, however long the run."""
    bits = hashlib.shake_128(what.encode() + parameters.tobytes() + momentum.tobytes()).digest(2 * parameters.size)
    gradient = np.frombuffer(bits, "<i2").astype(np.float32) * np.float32(2**-15)
    momentum = np.float32(0.9) * momentum + gradient + parameters * np.float32(1 / 16)
    return parameters - momentum * np.float32(1 / 64), momentum


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
