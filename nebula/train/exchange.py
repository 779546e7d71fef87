"""One rank's end of the exchange between clusters: the global parameters it holds, what it sends, what it takes.

Memory, beside the model: `base`, one fp32 copy of this rank's part of the parameters on the host, the codecs'
residuals, another, and the last update in bf16; while a fragment is sent or taken, that fragment once more.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nebula.config import Run
from nebula.errors import PacketError
from nebula.models.fragments import fragments
from nebula.parallel.export import by_name, local, placed, region, slices
from nebula.parallel.mesh import Group
from nebula.types import Slice
from nebula.wan.codec.layout import capacity
from nebula.wan.codec.pipeline import Encoder, decode
from nebula.wan.codec.prior import remember
from nebula.wan.digest import Lanes, lanes
from nebula.wan.frame import MAX_HEADER, pack, unpack


class Exchange:
    """`base` holds the global parameters that the local ones started from; delta = base − local."""

    def __init__(self, model: nn.Module, run: Run, group: Group) -> None:
        self._parameters = dict(model.named_parameters())
        self._local = slices(model)
        self._host = group.host
        self._base = {name: local(p).to("cpu", torch.float32, copy=True) for name, p in self._parameters.items()}
        self.fragments = fragments(list(self._parameters), run.model.layers, run.fragments)
        self._feedback = bool(run.wan.up.feedback)
        self._encoders = {fragment: Encoder(run.wan.up) for fragment in self.fragments}
        self._last = {name: torch.full_like(b, torch.nan, dtype=torch.bfloat16) for name, b in self._base.items()}

    @torch.no_grad()
    def encode(self, fragment: str) -> bytes:
        """This rank's slices of base − local, encoded where the parameters lie. The same bytes until settled."""
        here = dict(self._slices(fragment))
        base = {where: self._base[where.name] for where in here}
        last = {where: self._last[where.name] for where in here}
        known = not any(bool(values.isnan().any()) for values in last.values())
        return pack(self._encoders[fragment].encode(base, last if known else None, minus=here))

    @torch.no_grad()
    def apply(self, fragment: str, payload: bytes, *, merged: bool) -> dict[str, Lanes]:
        """base += update, in fp32 and on the host, so that the sum has the same bits everywhere; local := base.
        `merged`: our last packet is part of the update, so its error feedback moves on.

        Raises PacketError, with nothing changed, if the update does not cover the fragment exactly.
        """
        updates = self._cut(fragment, payload)
        for where, update in updates.items():
            self._base[where.name] += update
            self._last[where.name] = remember(update)
        return self._reset(fragment, merged=merged)

    @torch.no_grad()
    def adopt(self, fragment: str, payload: bytes) -> dict[str, Lanes]:
        """base := the fragment's fp32 parameters as sent; local := base; residual := 0, for it may be part of a packet
        that was merged meanwhile and must not count twice. Raises PacketError as `apply` does."""
        for where, value in self._cut(fragment, payload).items():
            self._base[where.name].copy_(value)
            self._last[where.name].fill_(torch.nan)
        self._encoders[fragment].restore({})
        return self._reset(fragment, merged=False)

    def lanes(self, fragment: str) -> dict[str, Lanes]:
        """This rank's parts of the fragment's digest."""
        return {where.name: lanes(self._base[where.name], where) for where, _ in self._slices(fragment)}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep of this: base and the last update (in place; NaN where there was none), and
        residuals (copies; zero where there is none)."""
        kept = self._placed("base", self._base) | self._placed("last", self._last)
        return kept | self._placed("residual", self._residuals())

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over the residuals of a `state()` that has been filled; all else was filled in place."""
        for fragment, encoder in self._encoders.items() if self._feedback else ():
            encoder.restore(
                {
                    where: local(state[f"residual/{where.name}"]).to(view.device)
                    for where, view in self._slices(fragment)
                }
            )

    def _residuals(self) -> dict[str, Tensor]:
        if not self._feedback:
            return {}
        residuals = {name: torch.zeros_like(base) for name, base in self._base.items()}
        for encoder in self._encoders.values():
            for where, value in encoder.residual().items():
                residuals[where.name].copy_(value)
        return residuals

    def _placed(self, kind: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"{kind}/{name}": placed(part, self._parameters[name], self._host) for name, part in parts.items()}

    def _slices(self, fragment: str) -> list[tuple[Slice, Tensor]]:
        return [self._local[name] for name in self.fragments[fragment] if name in self._local]

    def _cut(self, fragment: str, payload: bytes) -> dict[Slice, Tensor]:
        """This rank's boxes of a packet that holds the fragment in any layout."""
        names = self.fragments[fragment]
        elements = sum(self._parameters[name].numel() for name in names)
        packet = unpack(payload, max_bytes=2 * MAX_HEADER + 4 * capacity(elements))
        pieces = by_name(decode(packet, max_elements=elements))
        if pieces.keys() != set(names):
            raise PacketError(f"fragment {fragment}: the packet holds {sorted(pieces)}, not {sorted(names)}")
        cut = {where: region(where, pieces[where.name]) for where, _ in self._slices(fragment)}
        if not all(bool(torch.isfinite(value).all()) for value in cut.values()):
            raise PacketError(f"fragment {fragment}: the packet holds values that are not finite")
        return cut

    def _reset(self, fragment: str, *, merged: bool) -> dict[str, Lanes]:
        for where, view in self._slices(fragment):
            view.copy_(self._base[where.name])
        self._encoders[fragment].settle(merged)
        return self.lanes(fragment)
