"""Any rate from 0.1 to 8 bits per parameter: dead-zone uniform quantisation with fitted levels (`rate`), entropy coded
(`rans`) in contexts that the last update gives (`prior`).

One pass: a chunk of values becomes symbols, and their error in place, while it is in the cache, then a stream of its
own. What has to be known before (scales, steps, levels, probabilities) comes from a sample of about SAMPLE values, on
the host. The few parameters of fine slices (`groups`) are quantised FINER times finer, with tables of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from torch import Tensor

from nebula.errors import PacketError
from nebula.types import Json, Packet
from nebula.wan.codec import grids, kernels, layout, rate, wire
from nebula.wan.codec.entropy import inflate
from nebula.wan.codec.groups import Chunk, Group, Segment, groups
from nebula.wan.codec.prior import CELLS, Guide, guide
from nebula.wan.codec.quantize import replaced
from nebula.wan.codec.rans import LANES, Coder, Model
from nebula.wan.codec.rate import Sample, Tables

SAMPLE = 1 << 17
LEAST = 256
"""Of each slice at least so many values are looked at, or all."""
FINER = 16.0
FINEST = 2.0**-6
"""Steps of fine slices are no smaller, in their own scale."""

UNITS = 2.0**-100, 2.0**112
"""Bounds of a slice's step: nothing decoded vanishes or overflows."""

ARRAYS = "codes", "lengths", "units", "tables"
Item = TypeVar("Item")
Result = TypeVar("Result")
Floats = NDArray[np.float32]


class Adaptive:
    """Array "values" becomes "codes" (U8: a stream per chunk), "lengths" (I32, bytes of each), "units" (BF16: a step
    per slice) and "tables" (U8: the rest, compressed). The last update, if it is there, is what the receiver has, too:
    it is not sent."""

    lossless: ClassVar[bool] = False
    align: ClassVar[int] = 1

    def __init__(self, bits: float) -> None:
        self.bits, self.threshold = bits, rate.threshold(bits)

    def encode(self, packet: Packet) -> Packet:
        """Leaves in "values" what was lost. Raises PacketError on NaN, infinities and absurd magnitudes."""
        values = packet.arrays["values"]
        shape, last = layout.read(packet), layout.last_of(packet)
        guides, both = [guide(update) for update in last or ()], groups(shape)
        units, tables = _plan(values, shape, both, guides, self.bits, self.threshold)
        codes: list[bytes] = []
        for group, table in zip(both, tables, strict=True):
            section = Section(table, units, guides)
            codes += _threaded(section.encoder(values, self.threshold), group.chunks)
        arrays = {
            "codes": wire.from_bytes(b"".join(codes)),
            "lengths": torch.tensor([len(code) for code in codes], dtype=torch.int32),
            "units": torch.from_numpy(units).to(torch.bfloat16),
            "tables": wire.from_bytes(_pack(tables)),
        }
        sizes: list[Json] = [list(table.sizes()) for table in tables]
        entry: dict[str, Json] = {"kind": "adaptive", "last": last is not None, "tables": sizes}
        return layout.without_last(replaced(packet, ("values",), arrays, entry))

    @staticmethod
    def decode(packet: Packet) -> Packet:
        """One fp32 multiplication per value, so the result is the same on any device; done on the CPU. Raises
        PacketError, too if the packet was coded with a last update and that is missing."""
        shape, entry = layout.read(packet), packet.trail[-1]
        both, tables = groups(shape), _unpack(packet)
        units = wire.array(packet, "units", torch.bfloat16).float().numpy()
        if len(units) != len(shape.slices) or not (np.abs(units) <= UNITS[1]).all():
            raise PacketError("the packet's steps are not one per slice, or absurd")
        last = layout.last_of(packet) if entry.get("last") else []
        if last is None:
            raise PacketError("the packet can be read only with the update before it, which is not here")
        guides = [guide(update) for update in last]
        streams = _streams(packet, [len(group.chunks) for group in both])
        values = torch.zeros(shape.padded, dtype=torch.float32)
        for group, table, mine in zip(both, tables, streams, strict=True):
            section = Section(table, units, guides)
            _threaded(section.decoder(values), list(zip(group.chunks, mine, strict=True)))
        return layout.without_last(replaced(packet, ARRAYS, {"values": values}))


class Section:
    """Codes the chunks of one group."""

    def __init__(self, tables: Tables, units: Floats, guides: Sequence[Guide]) -> None:
        self._tables, self._units, self._guides = tables, units, guides
        self._coder = Coder(tables.model)
        self._levels = np.arange(kernels.LADDER, dtype=np.float32)
        self._levels[: len(tables.levels)] = tables.levels

    def encoder(self, values: Tensor, threshold: float) -> Callable[[Chunk], bytes]:
        """Codes chunks of `values`, which become their errors."""
        quantise = _quantise_here if values.device.type == "cpu" else _quantise_there
        offset = np.float32(1 - threshold)

        def encode(chunk: Chunk) -> bytes:
            symbols, contexts = self._scratch(chunk)
            for segment, mine in _cut(chunk, symbols):
                quantise(
                    values[segment.at : segment.at + segment.count],
                    self._units[segment.piece],
                    offset,
                    self._levels,
                    mine,
                )
            self._turn(chunk, symbols)
            return self._coder.encode(symbols, contexts)

        return encode

    def decoder(self, values: Tensor) -> Callable[[tuple[Chunk, memoryview]], None]:
        """Fills chunks of `values`."""
        flat = values.numpy()

        def decode(job: tuple[Chunk, memoryview]) -> None:
            chunk, stream = job
            symbols, contexts = self._scratch(chunk)
            self._coder.decode(stream, contexts, symbols)
            self._turn(chunk, symbols)
            for segment, mine in _cut(chunk, symbols):
                unit = self._units[segment.piece]
                kernels.dequantise(mine, unit, self._levels, flat[segment.at : segment.at + segment.count])

        return decode

    def _scratch(self, chunk: Chunk) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
        """Room for a chunk's symbols, and its contexts."""
        count = sum(segment.count for segment in chunk)
        contexts = np.zeros(count, np.uint8)
        if self._guides:
            for segment, mine in _cut(chunk, contexts):
                self._guides[segment.piece].contexts(segment.start, self._tables.contexts, mine)
        return np.empty(count, np.int16), contexts

    def _turn(self, chunk: Chunk, symbols: NDArray[np.int16]) -> None:
        if self._guides:
            for segment, mine in _cut(chunk, symbols):
                self._guides[segment.piece].turn(segment.start, mine)


# --- what is decided before ---------------------------------------------------------------------------------------


def _plan(
    values: Tensor, shape: layout.Layout, both: Sequence[Group], guides: Sequence[Guide], bits: float, threshold: float
) -> tuple[Floats, list[Tables]]:
    """Each slice's step, and what each group is coded with. Raises PacketError if the sample is not finite."""
    scales = np.zeros(len(shape.slices))
    coarse, fine = (_sample(values, shape, group, guides, scales) for group in both)
    units = np.zeros(len(shape.slices), np.float32)
    finer = max(rate.rough_step(bits) / FINER, FINEST)
    rest = _tables(fine, both[1], scales, np.full(len(fine.sizes), finer), units, threshold)
    budget = bits * shape.elements - 16 * len(shape.slices) - (32 * LANES + 32) * sum(len(g.chunks) for g in both)
    budget = max(budget - rest[1] * fine.parameters, 0.0) / max(coarse.parameters, 1)
    main = _tables(coarse, both[0], scales, rate.steps(coarse, budget, threshold), units, threshold)
    return units, [main[0], rest[0]]


def _tables(
    sample: Sample,
    group: Group,
    scales: NDArray[np.float64],
    steps: NDArray[np.float64],
    units: Floats,
    threshold: float,
) -> tuple[Tables, float]:
    """For steps in the slices' scales; the rounded ones go to `units`."""
    mine = scales[list(group.pieces)]
    rounded = torch.from_numpy(np.clip(mine * steps, *UNITS)).to(torch.bfloat16).float().numpy()
    units[list(group.pieces)] = rounded
    exact = np.divide(rounded, mine, out=np.ones_like(mine), where=mine > 0)
    return rate.tables(sample, exact, threshold)


def _sample(
    values: Tensor, shape: layout.Layout, group: Group, guides: Sequence[Guide], scales: NDArray[np.float64]
) -> Sample:
    """Values of a group, evenly spread, over the root mean square of their slice, which is put in `scales`."""
    sizes = [shape.sizes[piece] for piece in group.pieces]
    starts = np.cumsum([0, *shape.rooms])
    places = rate.spread(sizes, SAMPLE, LEAST)
    at = np.concatenate([starts[p] + mine for p, mine in zip(group.pieces, places, strict=True)] or [np.zeros(0, int)])
    x_N = values[torch.from_numpy(at).to(values.device)].cpu().numpy()
    if not (np.abs(x_N) < np.float32(grids.LARGEST)).all():
        raise grids.not_finite()
    cells, turned = np.zeros(len(at), np.uint8), np.zeros(len(at), np.bool_)
    begin = 0
    for piece, mine in zip(group.pieces, places, strict=True):
        here = slice(begin, begin + len(mine))
        scale = float(np.sqrt(np.mean(np.square(x_N[here], dtype=np.float64)))) if len(mine) else 0.0
        scales[piece] = scale
        if scale:
            x_N[here] /= scale
        if guides:
            cells[here], turned[here] = guides[piece].cells(mine)
        begin = here.stop
    return Sample(x_N, cells, turned, [len(mine) for mine in places], sum(sizes))


# --- packing ------------------------------------------------------------------------------------------------------


def _pack(tables: Sequence[Tables]) -> bytes:
    raw = b"".join(
        table.contexts.tobytes() + table.model.frequencies_CA.astype("<u2").tobytes() + table.levels.tobytes()
        for table in tables
    )
    return zstandard.ZstdCompressor(level=19, write_content_size=True).compress(raw)


def _unpack(packet: Packet) -> list[Tables]:
    """Raises PacketError before anything large is allocated."""
    rows = wire.rows(packet.trail[-1], "tables", 4)
    if len(rows) != 2:
        raise PacketError(f"the packet has tables for {len(rows)} groups of slices, expected 2")
    named = [dict(zip(("contexts", "symbols", "shift", "levels"), row, strict=True)) for row in rows]
    bounds = {"contexts": (1, 256), "symbols": (2, 256), "shift": (0, 15), "levels": (1, rate.MAX_LEVELS)}
    sizes = [[wire.integer(row, key, *bounds[key]) for key in bounds] for row in named]
    total = sum(CELLS + 2 * contexts * symbols + 4 * levels for contexts, symbols, _, levels in sizes)
    raw = inflate(wire.as_bytes(wire.array(packet, "tables", torch.uint8)), total)
    tables, at = [], 0
    for contexts, symbols, shift, levels in sizes:
        context_of = np.frombuffer(raw, np.uint8, CELLS, at)
        frequencies = np.frombuffer(raw, "<u2", contexts * symbols, at + CELLS).reshape(contexts, symbols)
        ladder = np.frombuffer(raw, "<f4", levels, at + CELLS + 2 * contexts * symbols)
        at += CELLS + 2 * contexts * symbols + 4 * levels
        if context_of.max() >= contexts or not (np.abs(ladder) <= kernels.LARGEST).all():
            raise PacketError("the packet's tables name contexts that are not there, or absurd levels")
        tables.append(Tables(context_of, ladder, Model(frequencies.astype(np.uint16), shift)))
    return tables


def _streams(packet: Packet, counts: Sequence[int]) -> list[list[memoryview]]:
    """The streams of each group. Raises PacketError unless there is one for each chunk and nothing else."""
    codes = wire.as_bytes(wire.array(packet, "codes", torch.uint8))
    lengths = wire.array(packet, "lengths", torch.int32).tolist()
    if len(lengths) != sum(counts) or min(lengths, default=0) < 0 or sum(lengths) != len(codes):
        raise PacketError(f"the packet has {len(lengths)} streams in {len(codes)} bytes, which do not fit its slices")
    ends = np.cumsum([0, *lengths]).tolist()
    streams = iter([codes[start:end] for start, end in pairwise(ends)])
    return [[next(streams) for _ in range(count)] for count in counts]


def _cut(chunk: Chunk, array: NDArray[Any]) -> Iterator[tuple[Segment, NDArray[Any]]]:
    """Each segment's part of an array for the chunk."""
    at = 0
    for segment in chunk:
        yield segment, array[at : at + segment.count]
        at += segment.count


def _threaded(act: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """On as many threads as torch uses; in order."""
    items, threads = list(items), torch.get_num_threads()
    if threads == 1 or len(items) < 2:
        return [act(item) for item in items]
    with ThreadPoolExecutor(min(threads, len(items))) as pool:
        return list(pool.map(act, items))


# --- the arithmetic, here and on a device -------------------------------------------------------------------------


def _quantise_here(x: Tensor, unit: np.float32, offset: np.float32, levels: Floats, symbols: NDArray[np.int16]) -> None:
    """Symbols of x, which becomes its error."""
    if kernels.quantise(x.numpy(), np.float32(1) / unit, unit, offset, levels, symbols):
        raise grids.not_finite()


def _quantise_there(
    x: Tensor, unit: np.float32, offset: np.float32, levels: Floats, symbols: NDArray[np.int16]
) -> None:
    """The same on x's device, bit for bit: every operation is the same single one."""
    magnitudes = x.abs()
    if not bool((magnitudes < grids.LARGEST).all()):
        raise grids.not_finite()
    q = (magnitudes * float(np.float32(1) / unit)).clamp_(max=kernels.LARGEST).add_(float(offset)).int()
    ladder = torch.from_numpy(levels).to(x.device)
    decoded = torch.where(q < kernels.LADDER, ladder[q.clamp(max=kernels.LADDER - 1)], q.float()).mul_(float(unit))
    symbols[:] = torch.where(x < 0, -q, q).short().cpu().numpy()
    x.sub_(torch.copysign(decoded, x))
