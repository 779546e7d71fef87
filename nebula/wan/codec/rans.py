"""Entropy coding of small integers in contexts: interleaved range asymmetric numeral systems (Duda, arXiv 1311.2540).

A value v is split into v >> shift, coded by the probabilities of its context, and `shift` raw low bits. What no table
has a symbol for is escaped: 16 raw bits. Probabilities are multiples of 2^-12. Eight states of 32 bits take turns, each
in [2^16, 2^32), and share one stream of 16-bit words: independent chains of arithmetic that one core overlaps.

The kernels release the GIL, and one call codes one chunk, so threads can share a packet. Decoding never reads or writes
out of bounds, whatever the words are: a stream that does not end where it began is damaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from nebula.errors import PacketError
from nebula.wan.codec import kernels

BITS = 12
TOTAL = 1 << BITS
LANES = 8
WORST = 2
"""Words that one value takes at most: one for its symbol, one for its escape or its low bits."""


@dataclass(frozen=True)
class Model:
    """`frequencies_CA`: for C contexts how often each of A symbols is, of TOTAL; the last one is the escape. Symbol s
    stands for the values v with v >> shift = s + 1 − A // 2."""

    frequencies_CA: NDArray[np.uint16]
    shift: int

    def __post_init__(self) -> None:
        """Raises PacketError unless every context's frequencies add up to TOTAL."""
        contexts, symbols = self.frequencies_CA.shape
        if not (1 <= contexts <= 256 and 2 <= symbols <= 256 and 0 <= self.shift <= 15):
            raise PacketError(f"{contexts} contexts of {symbols} symbols and {self.shift} raw bits cannot be decoded")
        if (self.frequencies_CA.sum(1, dtype=np.int64) != TOTAL).any():
            raise PacketError("the frequencies of a context do not add up")

    def starts(self) -> NDArray[np.int64]:
        """Where each symbol's share begins."""
        ends: NDArray[np.int64] = self.frequencies_CA.cumsum(1, dtype=np.int64)
        return ends - self.frequencies_CA.astype(np.int64)


class Coder:
    """Codes with one model."""

    def __init__(self, model: Model) -> None:
        self.model = model

    @cached_property
    def _to(self) -> NDArray[np.uint64]:
        return encoding_table(self.model)

    @cached_property
    def _from(self) -> NDArray[np.uint32]:
        return decoding_table(self.model)

    def encode(self, values: NDArray[np.int16], contexts: NDArray[np.uint8]) -> bytes:
        """One chunk. Every context must be able to escape, or have all the symbols that it meets."""
        words = np.empty(WORST * len(values) + 2 * LANES + 1, np.uint16)
        at = kernels.rans_encode(values, contexts, self._to, self.model.shift, words)
        return words[at:].tobytes()

    def decode(self, data: memoryview, contexts: NDArray[np.uint8], values: NDArray[np.int16]) -> None:
        """Fill `values` from what `encode` gave, with the same contexts. Raises PacketError if the data is damaged."""
        if len(data) % 2 or len(data) < 4 * LANES:
            raise PacketError(f"{len(data)} bytes are no chunk of an entropy-coded packet")
        words = np.frombuffer(bytes(data), np.uint16)  # a copy: aligned, which compiled code counts on
        symbols = self.model.frequencies_CA.shape[1]
        if kernels.rans_decode(words, contexts, self._from, self.model.shift, symbols, values) != 0:
            raise PacketError("an entropy-coded chunk is damaged")


def normalise(counts_CA: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Frequencies for counts, none zero where the count is not; the escape always can be coded.

    Largest remainders; what the minimum of 1 takes is given by the most frequent symbol."""
    counts = counts_CA.copy()
    counts[:, -1] = np.maximum(counts[:, -1], 1e-9)
    exact = counts / counts.sum(1, keepdims=True) * TOTAL
    frequencies = np.maximum(np.floor(exact), counts > 0).astype(np.int64)
    for row, want in zip(frequencies, exact, strict=True):
        missing = TOTAL - int(row.sum())
        if missing > 0:
            order = np.argsort(row - want, kind="stable")[:missing]
            row[order] += 1
            missing = TOTAL - int(row.sum())
        while missing:  # the minimum of 1 took too much, or there were too few symbols to give to
            top = int(row.argmax())
            step = max(missing, 1 - int(row[top]))
            row[top] += step
            missing -= step
    narrow: NDArray[np.uint16] = frequencies.astype(np.uint16)
    return narrow


def encoding_table(model: Model) -> NDArray[np.uint64]:
    """[C, A, 3]: of a symbol of frequency f: f << 20, from where on a state gives up a word first, so that its quotient
    by f stays below 2^20; a reciprocal r; and in one word, from bit 0, 6, 8 and 32: s, b, TOTAL − f and where its share
    begins. The quotient of a state is (state + b)·r >> s, exactly: with r = ⌈2^s / f⌉ where that errs by less than 1/f
    for every state below f << 20, else with the floor and b = 1 (Robison 2005, "N-bit unsigned division via N-bit
    multiply-add"); no product leaves 64 bits."""
    f = model.frequencies_CA.astype(np.int64)
    s = 31 + np.ceil(np.log2(np.maximum(f, 1))).astype(np.int64)
    power = np.int64(1) << s
    ceiling = -(-power // np.maximum(f, 1))
    b = (ceiling * f - power) * f << 20 > power
    rest = s | b << 6 | (TOTAL - f) << 8 | model.starts() << 32
    return np.stack([f << 20, ceiling - b, rest], axis=2).astype(np.uint64)


def decoding_table(model: Model) -> NDArray[np.uint32]:
    """Context and slot → symbol, frequency − 1, slot − start, in 8, 12 and 12 bits."""
    contexts, symbols = model.frequencies_CA.shape
    table = np.empty((contexts, TOTAL), np.uint32)
    starts = model.starts()
    for context in range(contexts):
        symbol = np.repeat(np.arange(symbols), model.frequencies_CA[context])
        width = model.frequencies_CA[context].astype(np.int64)[symbol] - 1
        table[context] = symbol | (width << 8) | ((np.arange(TOTAL) - starts[context][symbol]) << 20)
    return table
