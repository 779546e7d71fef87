"""Codec steps in a row, and error feedback around them.

tensors ─ flatten ─ blockwise ─ zstd ─► packet        one trail entry per step, oldest first
tensors ◄ unflatten ◄───── undo ◄────── packet        from the trail alone
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor

from nebula import config
from nebula.errors import PacketError, UsageError
from nebula.types import Codec, Packet, Slice
from nebula.wan.codec.entropy import Zstd
from nebula.wan.codec.layout import flatten, read, unflatten
from nebula.wan.codec.quantize import Blockwise

MAX_STEPS = 8


class Step(Codec, Protocol):
    """`align`: slices are padded to a multiple of it. `lossless`: leaves nothing for error feedback."""

    @property
    def align(self) -> int: ...
    @property
    def lossless(self) -> bool: ...


ENCODERS: dict[type[config.Config], Callable[[Any], Step]] = {
    config.Blockwise: lambda step: Blockwise(step.bits, step.block),
    config.Zstd: lambda step: Zstd(step.level),
}
"""How each step of a config encodes."""

DECODERS: dict[str, Callable[[Packet], Packet]] = {
    "blockwise": Blockwise.decode,
    "zstd": Zstd.decode,
}
"""How each kind of trail entry is undone. A decoder removes the last entry and believes nothing in it."""


class Pipeline:
    """Encodes tensors by the steps of a config; no steps: plain fp32. Raises UsageError if they do not fit together."""

    def __init__(self, cfg: config.Codec) -> None:
        steps = [ENCODERS[type(step)](step) for step in cfg.steps]
        if len(steps) >= MAX_STEPS:
            raise UsageError(f"a codec of {len(steps)} steps, at most {MAX_STEPS - 1} are supported")
        self.align = math.lcm(*(step.align for step in steps))
        # Error feedback needs only what the lossy steps at the front decode to.
        cut = max((index + 1 for index, step in enumerate(steps) if not step.lossless), default=0)
        self.lossy, self.rest = steps[:cut], steps[cut:]
        self.encode({})  # a dry run finds steps in the wrong order now, not at the end of the first round

    def encode(self, tensors: Mapping[Slice, Tensor]) -> Packet:
        return apply(self.rest, apply(self.lossy, flatten(tensors, self.align)))


def apply(steps: Iterable[Step], packet: Packet) -> Packet:
    for step in steps:
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


def decode(packet: Packet, *, max_elements: int) -> dict[Slice, Tensor]:
    """fp32 tensors, from nothing but the packet, on the device it lies on (the CPU if it was compressed).

    Raises PacketError if it is malformed or holds more than `max_elements` parameters. Memory stays below a small
    multiple of that, whatever the packet says. Plain fp32 may hold NaN; quantised packets cannot.
    """
    elements = read(packet).elements
    if elements > max_elements:
        raise PacketError(f"the packet holds {elements} parameters, at most {max_elements} are expected")
    return unflatten(undo(packet))


class Encoder:
    """A pipeline with error feedback (arXiv 1809.07599, 1901.09847) for one fragment in one direction.

    With residual e, decay β and x = tensors + β·e, a packet P = encode(x) leaves e′ = x − decode(P); e′ replaces e
    only when the round that carried P has happened. Holds up to two fp32 copies of the fragment (e and e′), none if
    feedback is off or all steps are lossless; while encoding, one more.
    """

    def __init__(self, cfg: config.Codec) -> None:
        self._pipeline = Pipeline(cfg)
        self._decay = (cfg.feedback or 0.0) if self._pipeline.lossy else 0.0
        self._residual: Packet | None = None
        self._pending: Packet | None = None

    def encode(self, tensors: Mapping[Slice, Tensor]) -> Packet:
        """Until `settle`, equal tensors give equal packets. Raises PacketError if tensors + residual are not finite,
        UsageError if the residual belongs to other slices."""
        self._pending = None
        flat = flatten(tensors, self._pipeline.align)
        if self._residual is not None:
            if self._residual.trail != flat.trail:
                raise UsageError(
                    "the error-feedback residual belongs to other slices than the delta",
                    hint="resume with the layout that the checkpoint was saved with",
                )
            flat.arrays["values"].add_(self._residual.arrays["values"], alpha=self._decay)
        packet = apply(self._pipeline.lossy, flat)
        if self._decay:
            flat.arrays["values"].sub_(undo(packet).arrays["values"])
            self._pending = flat
        return apply(self._pipeline.rest, packet)

    def settle(self, merged: bool) -> None:
        """The fate of the last packet. True: its error is carried on; if the packet is not at hand any more (it was
        sent before a crash), its error is lost, and the residual that went into it must not go into another. False:
        the round did not happen, the residual stays as it was."""
        if merged:
            self._residual = self._pending
        self._pending = None

    def residual(self) -> dict[Slice, Tensor]:
        """What a checkpoint keeps: views, empty before the first settled round. A packet in flight is not part."""
        return {} if self._residual is None else unflatten(self._residual)

    def restore(self, residual: Mapping[Slice, Tensor]) -> None:
        """Take over what `residual` returned, on the device on which deltas will lie."""
        self._residual = flatten(residual, self._pipeline.align) if residual and self._decay else None
        self._pending = None
