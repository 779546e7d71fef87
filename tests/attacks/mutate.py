"""Mutants of packets that are still packets: their trails and arrays are edited apart and put together again.

Of random bytes hardly any get past zstandard, JSON, and sizes that must agree. So what is compressed is opened first,
and an edit that changes the size of an array mostly says so in the header.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
import zstandard
from packets import STEPS, assemble, honest

from nebula import config
from nebula.errors import NebulaError
from nebula.types import Packet, Slice
from nebula.wan.codec import groups, layout, wire
from nebula.wan.codec.entropy import Zstd, inflate
from nebula.wan.codec.prior import CELLS
from nebula.wan.codec.rans import TOTAL, Coder, Model
from nebula.wan.codec.rate import Tables
from nebula.wan.frame import unpack

LIMIT = 1 << 20
ELEMENTS = 160_000

BOTH = Slice("w", (0, 0), (80, 60)), Slice("norm", (4,), (100,))
"""Coarse and fine."""
LONG = Slice("w", (0, 0), (384, 384)), Slice("norm", (4,), (100,))
"""More than one chunk."""

_wild = torch.Generator().manual_seed(1)
WILD = torch.randint(-(2**15), 2**15, (ELEMENTS,), generator=_wild, dtype=torch.int16).view(torch.bfloat16)
"""Any bits, infinities and NaN too."""


def before(where: Slice) -> torch.Tensor:
    """The update before, of any slice. Half of it is zero."""
    flat = WILD[: wire.numel(where.shape)].clone()
    flat[::2] = 0
    return flat.view(where.shape)


def seeds() -> list[bytes]:
    plain = [honest(), *(honest(step) for step in STEPS), honest(config.Blockwise(), config.Zstd())]
    known = {where: before(where) for where in (*BOTH, *LONG)}
    rates = [config.Adaptive(bits=bits) for bits in (0.1, 0.5, 1.0, 2.0, 4.0, 8.0)]
    adaptive = [honest(step, slices=BOTH, last=last) for step in rates for last in (None, known)]
    squeezed = honest(rates[0], config.Zstd(), slices=BOTH, last=known)
    long = honest(rates[0], slices=LONG, last=known)
    return [*plain, honest(config.LowRank(rank=2), slices=BOTH), *adaptive, squeezed, long]


@dataclass
class Form:
    """A packet as plain lists: [name, dtype, shape, bytes] of each array, and the trail. `opened`: trail entries "zstd"
    that were undone, and are done again; "tables" is without its compression if `tables`."""

    arrays: list[list[Any]]
    trail: list[Any]
    opened: int
    tables: bool


Flip = Callable[[bytes], bytes]
"""Random bytes for other bytes."""

UNFIT = (
    NebulaError,
    zstandard.ZstdError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What comes of an edit that does not fit the packet."""


def mutant(data: bytes, dice: Random, flip: Flip, others: list[bytes]) -> bytes:
    """Near a packet, mostly in form. What is too broken for that is edited as bytes, or given up for another."""
    if dice.random() < 0.1:
        return flip(data)
    try:
        form = disassembled(data)
        for _ in range(dice.randint(1, 3)):
            dice.choice(EDITS)(form, dice, flip, others)
        return assembled(form)
    except UNFIT:
        return flip(data) if dice.random() < 0.8 else dice.choice(others)


def disassembled(data: bytes) -> Form:
    packet, opened = unpack(data, max_bytes=LIMIT), 0
    _bounded(packet.trail)
    while len(packet.trail) > 1 and packet.trail[-1].get("kind") == "zstd":
        packet, opened = Zstd.decode(packet), opened + 1
    arrays = [
        [name, wire.NAMES[x.dtype], list(x.shape), bytes(wire.as_bytes(x))]
        for name, x in sorted(packet.arrays.items(), key=lambda item: -item[1].itemsize)
    ]
    tables = any(name == "tables" for name, *_ in arrays)
    for array in arrays:
        if array[0] == "tables":
            size = min(zstandard.get_frame_parameters(array[3]).content_size, LIMIT)
            array[3] = inflate(memoryview(array[3]), size)
    return Form(arrays, copy.deepcopy(list(packet.trail)), opened, tables)


def _bounded(trail: Sequence[Any]) -> layout.Layout:
    """Raises NebulaError or ValueError where the layout is broken, or large."""
    found = layout.read(Packet({}, tuple(trail)))
    if found.elements > ELEMENTS:
        raise ValueError("too large to be edited")
    return found


def assembled(form: Form) -> bytes:
    arrays = copy.deepcopy(form.arrays)
    for array in arrays:
        if array[0] == "tables" and form.tables:
            array[3] = zstandard.ZstdCompressor(write_content_size=True).compress(array[3])
            array[2] = [len(array[3])]
    trail = form.trail
    for _ in range(form.opened):
        tensors = {
            name: wire.from_bytes(data).view(wire.DTYPES[dtype]).view(shape) for name, dtype, shape, data in arrays
        }
        packet = Zstd(1).encode(Packet(tensors, tuple(trail)))
        arrays = [[name, "U8", [len(x)], bytes(wire.as_bytes(x))] for name, x in packet.arrays.items()]
        trail = list(packet.trail)
    return assemble([tuple(array) for array in arrays], trail)


# --- edits --------------------------------------------------------------------------------------------------------

NEAR = [-1, 0, 1, 2, 4, 7, 8, 9, 16, 64, 256, 600, 65536, 2**20, 2**31, 2**36, 2**48, 2**63, True, 1.0, "8", None, []]
WORDS = [0x0000, 0x0001, 0x7F80, 0xFF80, 0x7FC0, 0x7F7F, 0xFFFF, 0x8000, 0x7FFF, 0x1000]
"""Of 16 bits: in bf16 infinities, NaN, the largest, and bounds of integers."""


def another_value(form: Form, dice: Random, flip: Flip, others: list[bytes]) -> None:
    """Somewhere in the trail or in what the header says of arrays."""
    node: Any = form.trail if dice.random() < 0.8 else dice.choice(form.arrays)[:3]
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = dice.choice(keys)
        if not isinstance(node[key], dict | list) or not node[key] or dice.random() < 0.1:
            break
        node = node[key]
    value, move = node[key], dice.randrange(4)
    if type(value) is int and move:
        node[key] = value + dice.choice((-8, -1, 1, 8)) if move == 1 else max(0, value) << 1 >> dice.randrange(3)
    elif isinstance(node, list) and move == 1:
        node.insert(key, copy.deepcopy(value))
    elif move == 2:
        del node[key]
    else:
        node[key] = dice.choice([*NEAR, *form.trail])


def other_bytes(form: Form, dice: Random, flip: Flip, others: list[bytes]) -> None:
    array = dice.choice(form.arrays)
    data = flip(array[3])
    width = wire.DTYPES[array[1]].itemsize
    if dice.random() < 0.9:  # of the same length
        data = (data + array[3][len(data) :])[: len(array[3])]
    array[3] = data[: len(data) // width * width]
    array[2] = [len(array[3]) // width]


def special_words(form: Form, dice: Random, flip: Flip, others: list[bytes]) -> None:
    array = dice.choice(form.arrays)
    words = np.frombuffer(bytearray(array[3]), np.uint16, len(array[3]) // 2)
    for _ in range(dice.choice((1, 2, 50))):
        words[dice.randrange(len(words))] = dice.choice(WORDS)
    array[3] = words.tobytes() + array[3][2 * len(words) :]


def shifted_weight(form: Form, dice: Random, flip: Flip, others: list[bytes]) -> None:
    """From one number to another near it: the sum (of frequencies, of lengths) stays."""
    array = dice.choice(form.arrays)
    kind = np.int32 if array[1] == "I32" else np.uint16
    numbers = np.frombuffer(bytearray(array[3]), kind, len(array[3]) // kind().itemsize)
    for _ in range(dice.randint(1, 4)):
        start = dice.randrange(len(numbers))
        end = (start + dice.randint(1, 9)) % len(numbers)
        moved = np.arange(dice.randint(0, 1 << dice.randrange(1, 13)) + 1, dtype=kind)[-1:]
        numbers[start : start + 1] -= moved
        numbers[end : end + 1] += moved
    array[3] = numbers.tobytes() + array[3][numbers.nbytes :]


def other_arrays(form: Form, dice: Random, flip: Flip, others: list[bytes]) -> None:
    foreign = disassembled(dice.choice(others))
    _bounded(form.trail)
    at, move = dice.randrange(len(form.arrays)), dice.randrange(4)
    if move == 0:
        del form.arrays[at]
    elif move == 1:
        form.arrays[at] = dice.choice(foreign.arrays)
    elif move == 2:
        form.arrays.append(dice.choice(foreign.arrays))
    else:  # an update before, brought along
        for number, (_, _, shape) in enumerate(form.trail[0]["slices"]):
            values = before(Slice("", (), tuple(shape)))
            form.arrays.append([f"last.{number}", "BF16", shape, bytes(wire.as_bytes(values))])
        form.trail[-1]["last"] = True
    form.arrays.sort(key=lambda array: -wire.DTYPES[array[1]].itemsize)


def another_trail(form: Form, dice: Random, flip: Flip, others: list[bytes]) -> None:
    at, move = dice.randrange(len(form.trail)), dice.randrange(4)
    if move == 0:
        form.trail.insert(at, form.trail[-1])
    elif move == 1:
        form.trail[0] = disassembled(dice.choice(others)).trail[0]
    elif move == 2:
        form.trail[-1] = disassembled(dice.choice(others)).trail[-1]
    else:
        form.opened = dice.randrange(3)


def another_slice(form: Form, dice: Random, flip: Flip, others: list[bytes]) -> None:
    """Of any shape, mostly one that holds nothing, so that the other arrays still fit."""
    shape = [dice.choice((0, 0, 1, 3, 60, 2**20, 2**31, 2**40, 2**47)) for _ in range(dice.randint(0, 4))]
    piece = ["x" * dice.choice((0, 1, 1, 5000)), [0] * len(shape), shape]
    form.trail[0]["slices"].insert(dice.randrange(len(form.trail[0]["slices"]) + 1), piece)
    for array in form.arrays:
        if array[0] == "units":  # one per slice
            array[2], array[3] = [array[2][0] + 1], array[3] + b"\x80\x3f"


def hostile_encoder(form: Form, dice: Random, flip: Flip, others: list[bytes]) -> None:
    """Adaptive, sound, and with tables, levels, steps and symbols that no honest sender would choose."""
    shape = _bounded(form.trail)
    if shape.elements > 1 << 13:
        raise ValueError("too large to be made up")
    drawn = np.random.default_rng(dice.getrandbits(32))
    tables: list[bytes] = []
    sizes, streams = [], []
    for group in groups.groups(shape):
        table = _made_up(dice, drawn)
        tables += [x.tobytes() for x in (table.contexts, table.model.frequencies_CA, table.levels)]
        sizes.append(list(table.sizes()))
        coder = Coder(table.model)
        for chunk in group.chunks:
            count = sum(segment.count for segment in chunk)
            values = drawn.integers(-(2**15), 2**15, count) >> dice.randrange(16)
            streams.append(coder.encode(values.astype(np.int16), np.zeros(count, np.uint8)))
    unit = dice.choice([*WORDS, 0x7780, 0xF780])  # ±2^112 are the largest
    units = np.full(len(shape.slices), unit, np.uint16)
    lengths = np.array([len(stream) for stream in streams], "<i4")
    form.arrays = [
        ["lengths", "I32", [len(lengths)], lengths.tobytes()],
        ["units", "BF16", [len(units)], units.tobytes()],
        ["codes", "U8", [sum(map(len, streams))], b"".join(streams)],
        ["tables", "U8", [0], b"".join(tables)],
    ]
    form.trail[1:] = [{"kind": "adaptive", "last": False, "tables": sizes}]
    form.tables = True


def _made_up(dice: Random, drawn: np.random.Generator) -> Tables:
    contexts, symbols, levels = dice.choice((1, 1, 3, 256)), dice.choice((2, 3, 9, 255, 256)), dice.randint(1, 16)
    share = drawn.dirichlet(np.full(symbols, dice.choice((0.01, 1.0))), contexts)
    frequencies_CA = np.floor(share * (TOTAL - 2)).astype(np.uint16)
    frequencies_CA[:, -1] += (TOTAL - frequencies_CA.sum(1, dtype=int)).astype(np.uint16)
    of_cells = drawn.integers(0, contexts + (dice.random() < 0.1), CELLS).astype(np.uint8)
    ladder = drawn.uniform(-1, 1, levels) * dice.choice((1.0, 16384.0, 16385.0))
    return Tables(of_cells, ladder.astype(np.float32), Model(frequencies_CA, dice.randint(0, 15)))


EDITS: list[Callable[[Form, Random, Flip, list[bytes]], None]] = [
    another_value,
    another_value,
    other_bytes,
    other_bytes,
    special_words,
    shifted_weight,
    other_arrays,
    another_trail,
    another_slice,
    hostile_encoder,
]
