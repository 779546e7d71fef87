"""A fixed share of each block is sent, the rest is left to error feedback.

`TopK` keeps the largest magnitudes (arXiv 1809.07599) and sends where they are (`support`). `RandomK` keeps one value
of each of `keep` equal parts of the block, at a pseudo-random place that follows from a seed in the trail, so that only
values are sent. Kept values are coded per block: 32 bits fp32; 8 bits integers as in `grids`; 2 bits a sign and one of
two magnitudes, as in SparseLoCo (arXiv 2508.15706), here by Lloyd's rule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from nebula.errors import PacketError
from nebula.types import Json, Packet
from nebula.wan.codec import grids, layout, support, wire
from nebula.wan.codec.quantize import chunks, finite, replaced

TIMES = 8
"""So much larger are chunks here: few of their values are kept, and work on those should not be all overhead."""

_SUPPORT = ("low", "high")
_VALUES = ("kept", "scales")
_INT8 = grids.GRIDS["int8"]


class _Sparse(ABC):
    lossless: ClassVar[bool] = False

    def __init__(self, bits: int, block: int, keep: int) -> None:
        self._bits, self._block, self._keep, self.align = bits, block, keep, block

    @abstractmethod
    def encode(self, packet: Packet) -> Packet: ...

    def _code(self, blocks_NB: Tensor, positions_NK: Tensor) -> dict[str, Tensor]:
        """The kept values in their coded form, rows of a block each; what is lost stays in the blocks."""
        kept_NK = blocks_NB.gather(1, positions_NK)
        coded = _coded(kept_NK, self._bits)
        blocks_NB.scatter_(1, positions_NK, kept_NK - _decoded(coded, self._bits))
        return coded

    def _entry(self, kind: str) -> dict[str, Json]:
        return {"kind": kind, "bits": self._bits, "block": self._block, "keep": self._keep}


class TopK(_Sparse):
    """Array "values" (F32) becomes "low" and "high" (U8, the support), "kept", and "scales" (BF16) below 32 bits."""

    def encode(self, packet: Packet) -> Packet:
        """Leaves in "values" what was not sent. Of equal magnitudes the first are kept, so that CPU and GPU agree.
        Raises PacketError on NaN, infinities and absurd magnitudes."""
        blocks_NB = packet.arrays["values"].view(-1, self._block)
        grids.peaks(blocks_NB)
        coded, places = [], []
        for part in chunks(blocks_NB, TIMES):
            positions_NK = largest(blocks_NB[part], self._keep)
            coded.append(self._code(blocks_NB[part], positions_NK))
            starts_N = torch.arange(len(positions_NK), device=positions_NK.device).add_(part.start) * self._block
            places.append((positions_NK + starts_N[:, None]).view(-1).cpu().numpy())
        rice, low, high = support.pack(np.concatenate(places))
        arrays = {"low": torch.from_numpy(low), "high": torch.from_numpy(high)} | _joined(coded)
        return replaced(packet, ("values",), arrays, self._entry("topk") | {"rice": rice})

    @staticmethod
    def decode(packet: Packet) -> Packet:
        """Raises PacketError."""
        block, keep, kept_NK = _read(packet)
        rice = wire.integer(packet.trail[-1], "rice", 0, support.MAX_RICE)
        low, high = (wire.array(packet, name, torch.uint8).cpu().numpy() for name in _SUPPORT)
        count, total = kept_NK.numel(), len(kept_NK) * block
        positions_NK = torch.from_numpy(support.unpack(rice, low, high, count, total)).view(-1, keep)
        if not (positions_NK // block == torch.arange(len(positions_NK))[:, None]).all():
            raise PacketError(f"the packet does not keep {keep} of each {block} values")
        return _placed(packet, kept_NK, positions_NK.to(kept_NK.device), total, (*_SUPPORT, *_VALUES))


class RandomK(_Sparse):
    """Array "values" (F32) becomes "kept", and "scales" (BF16) below 32 bits."""

    def encode(self, packet: Packet) -> Packet:
        """Leaves in "values" what was not sent. The seed is a sum over the bits of the values: another in each round,
        the same for the same values on any device. Raises PacketError as TopK does."""
        values = packet.arrays["values"]
        blocks_NB = values.view(-1, self._block)
        grids.peaks(blocks_NB)
        seed = int(values.view(torch.int32).sum()) & 0xFFFFFFFF
        coded = []
        for part in chunks(blocks_NB, TIMES):
            rows = range(len(blocks_NB))[part]
            coded.append(self._code(blocks_NB[part], drawn(seed, rows, self._block, self._keep, values.device)))
        return replaced(packet, ("values",), _joined(coded), self._entry("randomk") | {"seed": seed})

    @staticmethod
    def decode(packet: Packet) -> Packet:
        """Raises PacketError."""
        block, keep, kept_NK = _read(packet)
        seed = wire.integer(packet.trail[-1], "seed", 0, 2**32 - 1)
        if block % keep:
            raise PacketError(f"a packet cannot keep {keep} of {block} values evenly")
        starts_N1 = torch.arange(len(kept_NK), device=kept_NK.device)[:, None] * block
        positions_NK = drawn(seed, range(len(kept_NK)), block, keep, kept_NK.device) + starts_N1
        return _placed(packet, kept_NK, positions_NK, len(kept_NK) * block, _VALUES)


def largest(blocks_NB: Tensor, keep: int) -> Tensor:
    """[N, keep] ascending positions of the largest magnitudes in each row; of equal ones, the first."""
    bits_NB = blocks_NB.view(torch.int32) & 0x7FFFFFFF  # magnitudes, in the order of integers
    if blocks_NB.is_cuda:
        least_N1 = bits_NB.topk(keep, dim=1).values[:, -1:]
    else:
        at = bits_NB.shape[1] - keep
        least_N1 = torch.from_numpy(np.partition(bits_NB.numpy(), at, axis=1)[:, at : at + 1])
    kept_NB = bits_NB >= least_N1
    if int(kept_NB.sum()) != keep * len(kept_NB):
        above_NB, tied_NB = bits_NB > least_N1, bits_NB == least_N1
        kept_NB = above_NB | (tied_NB & (tied_NB.cumsum(1) <= keep - above_NB.sum(1, keepdim=True)))
    if blocks_NB.is_cuda:
        return kept_NB.nonzero()[:, 1].view(-1, keep)
    return torch.from_numpy(np.flatnonzero(kept_NB.numpy()) % kept_NB.shape[1]).view(-1, keep)


def drawn(seed: int, rows: range, block: int, keep: int, device: torch.device) -> Tensor:
    """[rows, keep] positions in blocks, one in each of `keep` equal parts: integers only, the same on any device."""
    seeds = _mixed(torch.tensor([seed], device=device))
    counters = torch.arange(rows.start * keep, rows.stop * keep, device=device)
    parts_K = torch.arange(keep, device=device) * (block // keep)
    return (_mixed(_mixed(counters & 0xFFFFFFFF) ^ seeds) % (block // keep)).view(-1, keep) + parts_K


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers without visible structure (the finalizer of MurmurHash3), in 64-bit ones."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _coded(kept_NK: Tensor, bits: int) -> dict[str, Tensor]:
    if bits == 32:
        return {"kept": kept_NK}
    if bits == 8:
        scales_N = grids.scales(_INT8, kept_NK, grids.peaks(kept_NK), kept_NK)
        return {"kept": grids.encode(_INT8, kept_NK, scales_N), "scales": scales_N[:, None]}
    magnitudes_N2 = _two_magnitudes(kept_NK.abs())
    upper_NK = kept_NK.abs() > magnitudes_N2.float().mean(1, keepdim=True)
    codes_NK = (kept_NK > 0).to(torch.uint8).add_(upper_NK, alpha=2)
    return {"kept": grids.pack(codes_NK.view(-1), 2).view(-1, kept_NK.shape[1] // 4), "scales": magnitudes_N2}


def _decoded(coded: Mapping[str, Tensor], bits: int) -> Tensor:
    """[N, K] fp32, by at most one multiplication per value."""
    if bits == 32:
        return coded["kept"]
    scales = coded["scales"].float()
    if bits == 8:
        return grids.values(_INT8, coded["kept"]).mul_(scales)
    codes = coded["kept"][:, :, None] >> torch.arange(0, 8, 2, dtype=torch.uint8, device=scales.device)
    codes_NK = codes.view(len(scales), 4 * coded["kept"].shape[1])
    signs_NK = (codes_NK & 1).float().mul_(2).sub_(1)
    return torch.where((codes_NK & 2).bool(), scales[:, 1:], scales[:, :1]) * signs_NK


def _two_magnitudes(x_NK: Tensor) -> Tensor:
    """[N, 2] bf16: a lower and an upper magnitude, near those of least squared error, by three steps of Lloyd's."""
    count = x_NK.shape[1]
    border_N1 = grids.sums(x_NK / count)[:, None]
    for _ in range(3):
        upper_NK = x_NK > border_N1
        above_N = upper_NK.sum(1)
        high_N = grids.sums(torch.where(upper_NK, x_NK, 0.0).div_(count)) / above_N.clamp_min(1) * count
        low_N = grids.sums(torch.where(upper_NK, 0.0, x_NK).div_(count)) / (count - above_N).clamp_min(1) * count
        border_N1 = ((low_N + high_N) / 2)[:, None]
    return torch.stack([low_N, high_N], 1).clamp_min_(grids.SMALLEST_SCALE).to(torch.bfloat16)


def _joined(coded: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([rows[name] for rows in coded]).view(-1) for name in coded[0]}


def _read(packet: Packet) -> tuple[int, int, Tensor]:
    """block, keep and the kept values [N, keep] by the trail's last entry. Raises PacketError."""
    entry = packet.trail[-1]
    bits, block = wire.integer(entry, "bits", 2, 32), wire.integer(entry, "block", 8, layout.MAX_ALIGN)
    keep = wire.integer(entry, "keep", 8, block)
    count, rest = divmod(layout.read(packet).padded, block)
    if bits not in (2, 8, 32) or keep % 8 or rest:
        raise PacketError(f"a packet cannot keep {keep} of each {block} values with {bits} bits")
    kept = wire.array(packet, "kept", torch.float32 if bits == 32 else torch.uint8)
    if kept.nbytes * 8 != count * keep * bits:
        raise PacketError(f"{kept.nbytes} bytes are not {keep} values of {bits} bits for each of {count} blocks")
    coded = {"kept": kept.view(count, keep * bits // (8 * kept.itemsize))}
    if bits == 32:
        finite(kept, 1.0)
    else:
        each = 2 if bits == 2 else 1
        scales = finite(wire.array(packet, "scales", torch.bfloat16), _INT8.largest)
        if len(scales) != each * count:
            raise PacketError(f"{len(scales)} scales are not {each} for each of {count} blocks")
        coded["scales"] = scales.view(count, each)
    return block, keep, _decoded(coded, bits)


def _placed(packet: Packet, kept_NK: Tensor, positions_NK: Tensor, total: int, gone: tuple[str, ...]) -> Packet:
    values = torch.zeros(total, dtype=torch.float32, device=kept_NK.device)
    values[positions_NK.view(-1)] = kept_NK.view(-1)
    return replaced(packet, gone, {"values": values})
