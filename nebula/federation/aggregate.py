"""Merging one fragment's deltas into their weighted mean, one cluster at a time, in the order they are given."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from nebula.errors import PacketError, QuorumError
from nebula.types import Delta, Slice

Shapes = Mapping[str, tuple[int, ...]]

LARGEST = 1e6
"""No parameter moves this far in a round. Larger values could overflow the fp32 sums, and a delta that was accepted has
to merge: the journal would offer it again after every restart."""


def check_tiling(slices: Mapping[Slice, Tensor], shapes: Shapes) -> None:
    """Raise PacketError unless the slices cover every parameter of the fragment exactly once, finite and no larger than
    LARGEST."""
    by_name: dict[str, list[Slice]] = {name: [] for name in shapes}
    for where, values in slices.items():
        if where.name not in by_name:
            raise PacketError(f"parameter {where.name!r} is not in this fragment")
        _check_inside(where, shapes[where.name])
        if not bool(torch.isfinite(values).all()):
            raise PacketError(f"parameter {where.name!r} has values that are not finite")
        if bool((values.abs() > LARGEST).any()):
            raise PacketError(f"parameter {where.name!r} is said to have moved by more than {LARGEST:g}")
        by_name[where.name].append(where)
    for name, boxes in by_name.items():
        if sum(prod(box.shape) for box in boxes) != prod(shapes[name]):
            raise PacketError(f"the slices of parameter {name!r} do not add up to its shape {shapes[name]}")
        for i, box in enumerate(boxes):
            if any(_overlap(box, other) for other in boxes[:i]):
                raise PacketError(f"two slices of parameter {name!r} overlap")


def _check_inside(where: Slice, shape: tuple[int, ...]) -> None:
    fits = len(where.offset) == len(where.shape) == len(shape) and all(
        o >= 0 and n > 0 and o + n <= size for o, n, size in zip(where.offset, where.shape, shape, strict=True)
    )
    if not fits:
        raise PacketError(f"slice {where.offset}+{where.shape} of parameter {where.name!r} is not inside {shape}")


def _overlap(a: Slice, b: Slice) -> bool:
    boxes = zip(a.offset, a.shape, b.offset, b.shape, strict=True)
    return all(ao < bo + bn and bo < ao + an for ao, an, bo, bn in boxes)


class WeightedMean:
    """Σ wₖ·δₖ / Σ wₖ in fp32. The caller adds clusters in a fixed order, so the sum is the same bits every time; only
    one decoded delta is held beside the sum."""

    def __init__(self, shapes: Shapes) -> None:
        self._sum = {name: torch.zeros(shape) for name, shape in shapes.items()}
        self._weight = 0.0

    def add(self, delta: Delta) -> None:
        for where, values in delta.tensors.items():
            box = self._sum[where.name]
            for axis, (offset, size) in enumerate(zip(where.offset, where.shape, strict=True)):
                box = box.narrow(axis, offset, size)
            box.add_(values, alpha=delta.weight)
        self._weight += delta.weight

    def result(self) -> dict[str, Tensor]:
        """The mean by parameter name. Raises QuorumError when nothing of weight was added."""
        if self._weight <= 0:
            raise QuorumError("no delta to merge")
        return {name: total.div_(self._weight) for name, total in self._sum.items()}
