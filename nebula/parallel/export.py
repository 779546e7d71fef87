"""Between a model in its layout and layout-free slices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from nebula.errors import PacketError
from nebula.types import Slice


def local(value: Tensor) -> Tensor:
    """This rank's part, sharing storage: writing it updates the model."""
    value = value.detach()
    return value.to_local() if isinstance(value, DTensor) else value


def box(name: str, value: Tensor) -> Slice:
    """Where this rank's part of `value` lies in the whole."""
    if not isinstance(value, DTensor):
        return Slice(name, (0,) * value.dim(), tuple(value.shape))
    shape, offset = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
    return Slice(name, tuple(offset), tuple(shape))


def slices(module: nn.Module) -> dict[str, tuple[Slice, Tensor]]:
    """This rank's box of each parameter and a view of its storage. A parameter whose shard here is empty is left
    out. Over all ranks the boxes of a parameter tile it."""
    every = {name: (box(name, value), local(value)) for name, value in module.named_parameters()}
    return {name: (where, view) for name, (where, view) in every.items() if view.numel()}


def boxes(tensors: Mapping[str, Tensor]) -> dict[Slice, Tensor]:
    """Tensors by the boxes that they are of."""
    return {box(name, tensor): tensor for name, tensor in tensors.items()}


def placed(part: Tensor, reference: Tensor, host: DeviceMesh | None) -> Tensor:
    """A host tensor that shadows this rank's part of `reference`, as a DTensor placed like it: what a checkpoint
    needs to load it under another layout. Shares storage with `part`."""
    if host is None or not isinstance(reference, DTensor):
        return part
    return DTensor.from_local(
        part, host, reference.placements, run_check=False, shape=reference.shape, stride=reference.stride()
    )


def region(wanted: Slice, pieces: Iterable[tuple[Slice, Tensor]]) -> Tensor:
    """The box `wanted`, cut out of pieces that may lie in any layout: a view where one piece holds all of it.

    Raises PacketError unless the pieces cover every element of the box exactly once.
    """
    parts = []
    for piece, values in pieces:
        if len(piece.offset) != len(wanted.offset):
            raise PacketError(f"{wanted.name} has {len(wanted.offset)} dims, a piece of it has {len(piece.offset)}")
        overlap = _overlap(wanted, piece)
        if overlap is not None:
            parts.append((overlap, values[_relative(overlap, piece)]))
    if [overlap for overlap, _ in parts] == [wanted]:
        return parts[0][1]
    result = torch.empty(wanted.shape, dtype=torch.float32)
    covered = torch.zeros(wanted.shape, dtype=torch.bool)
    for overlap, values in parts:
        inside = _relative(overlap, wanted)
        if bool(covered[inside].any()):
            raise PacketError(f"{wanted.name}: two pieces overlap at offset {overlap.offset}, shape {overlap.shape}")
        covered[inside] = True
        result[inside] = values
    if not bool(covered.all()):
        raise PacketError(f"{wanted.name}: no piece covers part of offset {wanted.offset}, shape {wanted.shape}")
    return result


def by_name(tensors: Mapping[Slice, Tensor]) -> dict[str, list[tuple[Slice, Tensor]]]:
    """Group pieces by the parameter they belong to."""
    grouped: dict[str, list[tuple[Slice, Tensor]]] = {}
    for where, values in tensors.items():
        grouped.setdefault(where.name, []).append((where, values))
    return grouped


def _overlap(a: Slice, b: Slice) -> Slice | None:
    low = tuple(max(i, j) for i, j in zip(a.offset, b.offset, strict=True))
    high = tuple(min(i + m, j + n) for i, m, j, n in zip(a.offset, a.shape, b.offset, b.shape, strict=True))
    if any(i >= j for i, j in zip(low, high, strict=True)):
        return None
    return Slice(a.name, low, tuple(j - i for i, j in zip(low, high, strict=True)))


def _relative(inner: Slice, outer: Slice) -> tuple[slice, ...]:
    return tuple(slice(i - o, i - o + n) for i, n, o in zip(inner.offset, inner.shape, outer.offset, strict=True))
