"""Matrices as products of two of few columns: PowerSGD (arXiv 1905.13727, algorithm 1).

For M [R, C] and a start Q [C, K]: P = orthonormal columns of M·Q, Q = Mᵀ·P, repeated; sent are P and Q in bf16, decoded
is P·Qᵀ = P·Pᵀ·M, and error feedback keeps the rest.

The paper starts from the Q of the step before, so that one iteration will do. Here every round starts from the same
fixed Q and iterates twice (`iterations`), which makes the packet a function of its tensors alone: a run that resumes
needs no more than its residual. It is also more exact: on 30 rounds of drifting matrices of rank 16 plus noise, with
error feedback at rank 8, mean error over that of the SVD 1.18 and 1.01 (little and much noise), warm start 1.78 and
1.12, one iteration without 4.4 and 1.8. Rounds are minutes apart: the second product costs nothing that matters.

M·Q sums over many values, in an order that depends on the device; so may the packet. Decoding does not: it adds K outer
products one after the other, each by one multiplication and one addition per value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from nebula.errors import PacketError
from nebula.types import Packet
from nebula.wan.codec import grids, layout, wire
from nebula.wan.codec.quantize import chunks, finite, replaced

MAX_RANK = 1024


class LowRank:
    """Array "values" (F32) becomes "factors" (BF16: P and Q of each matrix in turn) and "rest" (F32: other slices)."""

    lossless: ClassVar[bool] = False
    align: ClassVar[int] = 1

    def __init__(self, rank: int, iterations: int) -> None:
        self._rank, self._iterations = rank, iterations

    def encode(self, packet: Packet) -> Packet:
        """Leaves M − P·Qᵀ in "values". Raises PacketError on NaN, infinities and absurd magnitudes."""
        values = packet.arrays["values"]
        if len(values):
            grids.peaks(values[None])
        factors, rest = [values.new_empty(0, dtype=torch.bfloat16)], [values.new_empty(0)]
        for piece, shape in _pieces(values, layout.read(packet), self._rank):
            if shape is None:
                rest.append(piece.clone())
                piece.zero_()
                continue
            matrix_RC = piece.view(shape)
            p_RK, q_CK = _factors(matrix_RC, self._rank, self._iterations)
            for part, product_rC in _product(p_RK, q_CK):
                matrix_RC[part].sub_(product_rC)
            factors += [p_RK.view(-1), q_CK.view(-1)]
        arrays = {"factors": torch.cat(factors), "rest": torch.cat(rest)}
        return replaced(packet, ("values",), arrays, {"kind": "lowrank", "rank": self._rank})

    @staticmethod
    def decode(packet: Packet) -> Packet:
        """Raises PacketError."""
        rank = wire.integer(packet.trail[-1], "rank", 1, MAX_RANK)
        found = layout.read(packet)
        shapes = [_shape(piece.shape, rank) for piece in found.slices]
        widths = [rank * sum(shape) if shape else 0 for shape in shapes]
        others = [0 if shape else size for shape, size in zip(shapes, found.sizes, strict=True)]
        factors = finite(wire.array(packet, "factors", torch.bfloat16), 1.0)
        rest = wire.array(packet, "rest", torch.float32)
        if found.align != 1 or len(factors) != sum(widths) or len(rest) != sum(others):
            raise PacketError(f"{len(factors)} factors and {len(rest)} other values do not fit a layout of rank {rank}")
        finite(rest, 1.0)
        values = torch.empty(found.padded, dtype=torch.float32, device=factors.device)
        parts = zip(_pieces(values, found, rank), torch.split(factors, widths), torch.split(rest, others), strict=True)
        for (piece, shape), pair, other in parts if shapes else ():
            if shape is None:
                piece.copy_(other)
                continue
            factors_SK = pair.view(-1, rank)
            for part, product_rC in _product(factors_SK[: shape[0]], factors_SK[shape[0] :]):
                piece.view(shape)[part] = product_rC
        return replaced(packet, ("factors", "rest"), {"values": values})


def _shape(dims: tuple[int, ...], rank: int) -> tuple[int, int] | None:
    """The matrix as which a slice is sent: of all ways to take its first dims as rows, that of the fewest factors; None
    if they are not fewer than the values."""
    cuts = ((math.prod(dims[:cut]), math.prod(dims[cut:])) for cut in range(1, len(dims)))
    rows, columns = min(cuts, key=sum, default=(0, 0))
    return (rows, columns) if rank * (rows + columns) < rows * columns else None


def _pieces(values: Tensor, found: layout.Layout, rank: int) -> Iterator[tuple[Tensor, tuple[int, int] | None]]:
    for piece, end, size in zip(found.slices, accumulate(found.rooms), found.sizes, strict=True):
        yield values[end - size : end], _shape(piece.shape, rank)


def _factors(matrix_RC: Tensor, rank: int, iterations: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q_CK = torch.randn(matrix_RC.shape[1], rank, generator=generator, dtype=torch.float32).to(matrix_RC.device)
    for _ in range(iterations):
        p_RK = torch.linalg.qr(_scaled(matrix_RC @ _scaled(q_CK))).Q.to(torch.bfloat16)
        q_CK = matrix_RC.T @ p_RK.float()
    q_CK = q_CK.to(torch.bfloat16)
    return p_RK.contiguous(), q_CK.contiguous()


def _scaled(x: Tensor) -> Tensor:
    """To a peak of 1: what is multiplied on, or squared for a norm, must neither overflow nor vanish."""
    return x / x.abs().amax().clamp_min_(grids.SMALLEST_SCALE)


def _product(p_RK: Tensor, q_CK: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """P·Qᵀ, some rows at a time: the same bits on any device. Raises PacketError where it could leave fp32's range."""
    bound = float(p_RK.abs().amax()) * float(q_CK.abs().amax()) * p_RK.shape[1]
    if not bound < grids.LARGEST:  # false for NaN
        raise PacketError(f"a product of low-rank factors may be as large as {bound:g}, which is not a number of fp32")
    q_KC = q_CK.float().T.contiguous()
    for part in chunks(p_RK[:, :1].expand(-1, q_KC.shape[1])):
        columns = torch.split(p_RK[part].float(), 1, dim=1)
        sum_rC = columns[0] * q_KC[0]
        for p_r1, q_C in zip(columns[1:], q_KC[1:], strict=True):
            sum_rC.add_(p_r1 * q_C)
        yield part, sum_rC
