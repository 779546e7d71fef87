"""Merging one fragment's deltas into their weighted mean, one cluster at a time, in the order they are given."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping

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
    LARGEST. Time and memory (a byte each) grow with the parameters, however many slices there are."""
    covered = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}
    for where, values in slices.items():
        if where.name not in covered:
            raise PacketError(f"parameter {reprlib.repr(where.name)} is not in this fragment")
        _check_inside(where, shapes[where.name])
        if not bool(torch.isfinite(values).all()):
            raise PacketError(f"parameter {where.name!r} has values that are not finite")
        if bool((values.abs() > LARGEST).any()):
            raise PacketError(f"parameter {where.name!r} is said to have moved by more than {LARGEST:g}")
        box = region(covered[where.name], where)
        if bool(box.any()):
            raise PacketError(f"two slices of parameter {where.name!r} overlap")
        box.fill_(True)
    for name, mask in covered.items():
        if not bool(mask.all()):
            raise PacketError(f"the slices of parameter {name!r} do not add up to its shape {shapes[name]}")


def region(tensor: Tensor, where: Slice) -> Tensor:
    """The part of a whole parameter that a slice covers, as a view."""
    for axis, (offset, size) in enumerate(zip(where.offset, where.shape, strict=True)):
        tensor = tensor.narrow(axis, offset, size)
    return tensor


def _check_inside(where: Slice, shape: tuple[int, ...]) -> None:
    fits = len(where.offset) == len(where.shape) == len(shape) and all(
        o >= 0 and n > 0 and o + n <= size for o, n, size in zip(where.offset, where.shape, shape, strict=True)
    )
    if not fits:
        raise PacketError(f"slice {where.offset}+{where.shape} of parameter {where.name!r} is not inside {shape}")


class WeightedMean:
    """Σ wₖ·δₖ / Σ wₖ in fp32. The caller adds clusters in a fixed order, so the sum is the same bits every time; only
    one decoded delta is held beside the sum."""

    def __init__(self, shapes: Shapes) -> None:
        self._sum = {name: torch.zeros(shape) for name, shape in shapes.items()}
        self._weight = 0.0

    def add(self, delta: Delta) -> None:
        for where, values in delta.tensors.items():
            region(self._sum[where.name], where).add_(values, alpha=delta.weight)
        self._weight += delta.weight

    def result(self) -> dict[str, Tensor]:
        """The mean by parameter name. Raises QuorumError when nothing of weight was added."""
        if self._weight <= 0:
            raise QuorumError("no delta to merge")
        return {name: total.div_(self._weight) for name, total in self._sum.items()}
