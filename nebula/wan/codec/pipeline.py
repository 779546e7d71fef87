"""Codec steps in a row, and error feedback around them.

tensors ─ flatten ─ blockwise ─ zstd ─► packet        one trail entry per step, oldest first
tensors ◄ unflatten ◄───── undo ◄────── packet        from the trail alone
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from nebula import config
from nebula.errors import PacketError, UsageError
from nebula.types import Codec, Packet, Slice
from nebula.wan.codec.adaptive import Adaptive
from nebula.wan.codec.entropy import Zstd
from nebula.wan.codec.layout import clear_padding, flatten, read, unflatten, with_last, without_last
from nebula.wan.codec.lowrank import LowRank
from nebula.wan.codec.quantize import BFloat16, Blockwise
from nebula.wan.codec.sparsify import RandomK, TopK

MAX_STEPS = 8


class Step(Codec, Protocol):
    """`align`: slices are padded to a multiple of it. `lossless`: `encode` does not touch "values"; otherwise it leaves
    in them, in place, what the packet lost: values afterwards + decoded = values before, up to one fp32 rounding."""

    @property
    def align(self) -> int: ...
    @property
    def lossless(self) -> bool: ...


ENCODERS: dict[type[config.Config], Callable[[Any], Step]] = {
    config.Adaptive: lambda step: Adaptive(step.bits),
    config.Blockwise: lambda step: Blockwise({8: "int8", 4: "int4", 2: "lloyd2", 1: "sign"}[step.bits], step.block),
    config.Minifloat: lambda step: BFloat16() if step.format == "bf16" else Blockwise(step.format, step.block),
    config.TopK: lambda step: TopK(step.bits, step.block, step.keep),
    config.RandomK: lambda step: RandomK(step.bits, step.block, step.keep),
    config.LowRank: lambda step: LowRank(step.rank, step.iterations),
    config.Zstd: lambda step: Zstd(step.level),
}
"""How each step of a config encodes."""

DECODERS: dict[str, Callable[[Packet], Packet]] = {
    "adaptive": Adaptive.decode,
    "blockwise": Blockwise.decode,
    "bf16": BFloat16.decode,
    "topk": TopK.decode,
    "randomk": RandomK.decode,
    "lowrank": LowRank.decode,
    "zstd": Zstd.decode,
}
"""How each kind of trail entry is undone. A decoder removes the last entry and believes nothing in it."""


class Pipeline:
    """Encodes tensors by the steps of a config; no steps: plain fp32. Raises UsageError unless they are at most one
    lossy step and then only lossless ones: error feedback holds what one step lost."""

    def __init__(self, cfg: config.Codec) -> None:
        self._steps = [ENCODERS[type(step)](step) for step in cfg.steps]
        if len(self._steps) >= MAX_STEPS:
            raise UsageError(f"a codec of {len(self._steps)} steps, at most {MAX_STEPS - 1} are supported")
        if not all(step.lossless for step in self._steps[1:]):
            kinds = ", ".join(step.kind for step in cfg.steps)
            raise UsageError(
                f"the codec steps {kinds} have a lossy one behind the first",
                hint="take one lossy step, put it first, and only lossless ones such as 'zstd' behind it",
            )
        self.align = math.lcm(*(step.align for step in self._steps))
        self.lossless = all(step.lossless for step in self._steps)
        self._conditional = any(isinstance(step, Adaptive) for step in self._steps)

    def encode(self, flat: Packet, last: Mapping[Slice, Tensor] | None = None) -> Packet:
        """Encode what `flatten` made, in place: its "values" end up as what was lost, unless nothing is. Raises
        PacketError where they are not finite and a step cannot have that."""
        packet = with_last(flat, last) if last is not None and self._conditional else flat
        for step in self._steps:
            packet = step.encode(packet)
        return packet


def undo(packet: Packet) -> Packet:
    """Undo all steps down to the layout. Raises PacketError."""
    if len(packet.trail) > MAX_STEPS:
        raise PacketError(f"a packet of {len(packet.trail)} steps, at most {MAX_STEPS} are supported")
    while len(packet.trail) > 1:
        kind = packet.trail[-1].get("kind")
        if not isinstance(kind, str) or kind not in DECODERS:
            raise PacketError(f"unknown codec {reprlib.repr(kind)}, supported: {', '.join(DECODERS)}")
        packet = DECODERS[kind](packet)
    return packet


def decode(packet: Packet, *, max_elements: int, last: Callable[[Slice], Tensor] | None = None) -> dict[Slice, Tensor]:
    """fp32 tensors on the device the packet lies on (the CPU if it was compressed), from nothing but the packet, and,
    if that says so, the update before it: `last` looks up boxes of what `remember` kept of that.

    Raises PacketError if it is malformed or holds more than `max_elements` parameters. Memory stays below a small
    multiple of that, whatever the packet says. Plain fp32 may hold NaN; quantised packets cannot.
    """
    layout = read(packet)
    if layout.elements > max_elements:
        raise PacketError(f"the packet holds {layout.elements} parameters, at most {max_elements} are expected")
    if without_last(packet).arrays.keys() != packet.arrays.keys():
        raise PacketError("the packet brings the update before it along, which only we can know")
    if last is not None and any(entry.get("last") for entry in packet.trail):
        packet = with_last(packet, {piece: last(piece) for piece in layout.slices})
    return unflatten(undo(packet))


class Encoder:
    """A pipeline with error feedback (arXiv 1809.07599, 1901.09847) for one fragment in one direction.

    With residual e, decay β and x = tensors + β·e, a packet P = encode(x) leaves e′ = x − decode(P); e′ replaces e
    only when the round that carried P has happened. Holds up to two fp32 copies of the fragment: e, and one in which x
    is made, coded and left as e′; memory beyond that is the packet's, and a chunk's for each thread. Without feedback
    it holds the one, if all steps are lossless none.
    """

    def __init__(self, cfg: config.Codec) -> None:
        self._pipeline = Pipeline(cfg)
        self._decay = 0.0 if self._pipeline.lossless else cfg.feedback or 0.0
        self._residual: Packet | None = None
        self._pending: Packet | None = None
        self._spare: Tensor | None = None

    def encode(
        self,
        tensors: Mapping[Slice, Tensor],
        last: Mapping[Slice, Tensor] | None = None,
        *,
        minus: Mapping[Slice, Tensor] | None = None,
    ) -> Packet:
        """Of fp32 tensors, or of what they differ by from `minus`, on the device of that; both stay as they are.
        `last`: the update before, as `remember` kept it; a codec that uses it makes packets that only who has it can
        read. Until `settle`, equal tensors give equal packets. Raises PacketError if tensors + residual are not finite,
        UsageError if the residual belongs to other slices."""
        self._reuse(self._pending)
        self._pending = None
        flat = flatten(tensors, self._pipeline.align, minus, self._spare)
        self._spare = None
        if self._residual is not None:
            if self._residual.trail != flat.trail:
                raise UsageError(
                    "the error-feedback residual belongs to other slices than the delta",
                    hint="resume with the layout that the checkpoint was saved with",
                )
            flat.arrays["values"].add_(self._residual.arrays["values"], alpha=self._decay)
        packet = self._pipeline.encode(flat, last)
        if self._decay:
            clear_padding(flat)  # a checkpoint does not keep it
            self._pending = flat
        else:
            self._reuse(flat)
        return packet

    def settle(self, merged: bool) -> None:
        """The fate of the last packet. True: its error is carried on; if the packet is not at hand any more (it was
        sent before a crash), its error is lost, and the residual that went into it must not go into another. False:
        the round did not happen, the residual stays as it was."""
        if merged:
            self._residual, self._pending = self._pending, self._residual
        self._reuse(self._pending)
        self._pending = None

    def _reuse(self, flat: Packet | None) -> None:
        if flat is not None and not self._pipeline.lossless:  # a lossless packet may be its input
            self._spare = flat.arrays["values"]

    def residual(self) -> dict[Slice, Tensor]:
        """What a checkpoint keeps: views, good until the next packet is settled; empty before the first one is. A
        packet in flight is not part."""
        return {} if self._residual is None else unflatten(self._residual)

    def restore(self, residual: Mapping[Slice, Tensor]) -> None:
        """Take over what `residual` returned, on the device on which deltas will lie."""
        self._residual = flatten(residual, self._pipeline.align) if residual and self._decay else None
        self._pending = None
