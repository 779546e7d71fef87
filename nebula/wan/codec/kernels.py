"""The compiled loops of the codec: numba (LLVM) without fast-math, so that every operation is the IEEE one, and without
the GIL, so that threads can share a packet. What calls them checks the bounds; see there for what they do."""

# ruff: noqa: ANN001, ANN201
# mypy: disallow_untyped_defs=false, disallow_untyped_decorators=false, disallow_untyped_calls=false

from __future__ import annotations

import numba
import numpy as np

LADDER = 256
"""Decoded magnitudes are looked up below this, and are q itself from there on."""
LARGEST = 1 << 14
"""Magnitudes are quantised to at most this."""

_compiled = numba.njit(nogil=True, cache=True, boundscheck=False)


@_compiled
def rans_encode(values, contexts, table, shift, words):
    """Backwards, from the end of `words`. Returns where the stream begins. `table`: see rans.py. A state gives up a
    word without a branch: the word is written and then counted, or not."""
    symbols = table.shape[1]
    half, escape = symbols // 2 - 1, np.uint64(symbols - 1)
    states = np.full(8, 65536, np.uint64)
    at = np.int64(len(words))
    low_mask = (1 << shift) - 1
    for i in range(len(values) - 1, -1, -1):
        state, value, context = states[i & 7], np.int64(values[i]), contexts[i]
        symbol = min(np.uint64((value >> shift) + half), escape)  # what is below the first wraps around
        limit = table[context, symbol, 0]
        if symbol == escape or limit == 0:
            symbol, limit = escape, table[context, escape, 0]
            at -= 1
            words[at] = np.uint16(state & np.uint64(0xFFFF))  # 16 raw bits always need a word
            state = ((state >> np.uint64(16)) << np.uint64(16)) | np.uint64(value & 0xFFFF)
        elif shift:
            words[at - 1] = np.uint16(state & np.uint64(0xFFFF))
            over = np.uint64(state >= np.uint64(1) << np.uint64(32 - shift))
            at -= np.int64(over)
            state = ((state >> (over << np.uint64(4))) << np.uint64(shift)) | np.uint64(value & low_mask)
        words[at - 1] = np.uint16(state & np.uint64(0xFFFF))
        over = np.uint64(state >= limit)
        at -= np.int64(over)
        state >>= over << np.uint64(4)
        rest = table[context, symbol, 2]
        dividend = state + ((rest >> np.uint64(6)) & np.uint64(1))
        quotient = (dividend * table[context, symbol, 1]) >> (rest & np.uint64(63))
        # quotient · 4096 + (state − quotient · frequency) + start
        states[i & 7] = state + quotient * ((rest >> np.uint64(8)) & np.uint64(0xFFFF)) + (rest >> np.uint64(32))
    for lane in range(7, -1, -1):
        at -= 2
        words[at] = np.uint16(states[lane] & np.uint64(0xFFFF))
        words[at + 1] = np.uint16(states[lane] >> np.uint64(16))
    return at


@_compiled
def rans_decode(words, contexts, table, shift, symbols, values):
    """Returns 0, or 1 if the stream is too short, too long, or does not end in the states it began with."""
    half, escape = symbols // 2 - 1, symbols - 1
    states = np.empty(8, np.uint32)
    for lane in range(8):
        states[lane] = np.uint32(words[2 * lane]) | (np.uint32(words[2 * lane + 1]) << np.uint32(16))
    at, end = 16, len(words)
    low_mask = np.uint32((1 << shift) - 1)
    for i in range(len(values)):
        state = states[i & 7]
        entry = table[contexts[i], state & np.uint32(4095)]
        symbol = np.int64(entry & np.uint32(255))
        high = state >> np.uint32(12)
        state = ((entry >> np.uint32(8)) & np.uint32(4095)) * high + high + (entry >> np.uint32(20))
        if state < np.uint32(65536):
            if at == end:
                return 1
            state = (state << np.uint32(16)) | np.uint32(words[at])
            at += 1
        if symbol == escape:
            if at == end:
                return 1
            values[i] = np.int16(state & np.uint32(0xFFFF))
            state = (state & np.uint32(0xFFFF0000)) | np.uint32(words[at])
            at += 1
        else:
            value = symbol - half
            if shift:
                value = (value << shift) | np.int64(state & low_mask)
                state >>= np.uint32(shift)
                if state < np.uint32(65536):
                    if at == end:
                        return 1
                    state = (state << np.uint32(16)) | np.uint32(words[at])
                    at += 1
            values[i] = np.int16(value)
        states[i & 7] = state
    for lane in range(8):
        if states[lane] != np.uint32(65536):
            return 1
    return 0 if at == end else 1


@_compiled
def peak(bits):
    """The largest magnitude, as the bits of bf16."""
    largest = np.int16(0)
    for i in range(len(bits)):
        largest = max(largest, bits[i] & np.int16(0x7FFF))
    return largest


@_compiled
def sums(bits, top, rows_R, columns_C):
    """Sums of magnitudes, in units of 2^(top − 127 + 1 − _FIXED)."""
    at = 0
    for row in range(len(rows_R)):
        total = 0
        for column in range(len(columns_C)):
            magnitude = np.int64(bits[at]) & 0x7FFF
            exponent = magnitude >> 7
            shift = top - exponent
            value = ((128 | (magnitude & 127)) << 8) >> shift if exponent > 0 and shift < 16 else 0
            total += value
            columns_C[column] += value
            at += 1
        rows_R[row] = total


@_compiled
def cells(bits, places, columns, rows_R, columns_C, base, cells):
    for i in range(len(places)):
        row, column = places[i] // columns, places[i] % columns
        bucket = min(max(((np.int64(bits[places[i]]) & 0x7FFF) >> 6) - base, 0), 7)
        cells[i] = np.uint8((rows_R[row] + columns_C[column]) * 8 + bucket)


@_compiled
def contexts(bits, start, columns, rows_R, columns_C, base, context_of, contexts):
    row, column, i = start // columns, start % columns, 0
    while i < len(contexts):
        stop = min(len(contexts), i + columns - column)
        across = rows_R[row]
        for j in range(i, stop):
            bucket = min(max(((np.int64(bits[start + j]) & 0x7FFF) >> 6) - base, 0), 7)
            contexts[j] = context_of[(across + columns_C[column + j - i]) * 8 + bucket]
        i, column, row = stop, 0, row + 1


@_compiled
def turn(bits, start, values):
    for i in range(len(values)):
        if bits[start + i] < 0:
            values[i] = -values[i]


@_compiled
def count(x_N, cells_N, turned_N, offset, counts):
    half = counts.shape[1] // 2
    for i in range(len(x_N)):
        q = int(min(abs(x_N[i]) + offset, 1e6))
        value = q if (x_N[i] < 0) == turned_N[i] else -q
        counts[cells_N[i], min(max(value + half, 0), counts.shape[1] - 1)] += 1


@_compiled
def quantise(x, inverse, unit, offset, levels, symbols):
    """Returns whether something is not finite. Two loops, because the first is one of vectors."""
    bad = False
    for i in range(len(x)):
        magnitude = abs(x[i])
        bad |= not (magnitude < np.float32(2.0**127))
        symbols[i] = np.int16(min(magnitude * inverse, np.float32(LARGEST)) + offset)
    for i in range(len(x)):
        value, q = x[i], np.int32(symbols[i])
        decoded = (levels[q & (LADDER - 1)] if q < LADDER else np.float32(q)) * unit
        x[i] = value - np.copysign(decoded, value)
        symbols[i] = np.int16(-q if value < 0 else q)
    return bad


@_compiled
def dequantise(symbols, unit, levels, x):
    for i in range(len(symbols)):
        q = np.int32(symbols[i])
        magnitude = abs(q)
        decoded = (levels[magnitude] if magnitude < LADDER else np.float32(magnitude)) * unit
        x[i] = -decoded if q < 0 else decoded
