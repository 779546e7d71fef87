"""How coarsely to quantise for a wanted rate, decided on a sample.

With a slice's step Δ and a threshold t (of a step): q = ⌊|x| / Δ + 1 − t⌋, decoded sign(x)·level[q]·Δ, where level[q]
is the mean of what falls into q. A coarse step makes it ternary, then mostly zeros.

A dead zone in proportion to a slice's root mean square has the least error at a rate and yet diverges in training: what
it leaves out comes back as residual, raises the mean, and with it the dead zone, until nothing passes. So steps are set
by rank: below one bit or so every slice keeps the same share of its values, whatever their distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from nebula.wan.codec import kernels
from nebula.wan.codec.prior import CELLS
from nebula.wan.codec.rans import Model, normalise

MAX_HALF = 100
"""At most so many symbols on either side of zero; beyond, low bits are sent raw, and what is rare is escaped."""
RARE = 20000
"""A symbol that, with all beyond it, is rarer than one in this many has none of its own."""
MAX_CONTEXTS = 32
TABLE_BITS = 9.0
"""What one frequency costs in a packet, about."""
MAX_LEVELS = 16
FEW = 16
"""A level is fitted to at least so many values."""

CLOSE = 0.998
"""The rate of a sample is that near to the one that is wanted."""

MIDDLE = 1024
"""Where a histogram counts zeros."""
Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """Values of some slices, over their slice's scale; their cells; where the last update was negative. `sizes`: how
    many are of each slice, in order. `parameters`: how many it stands for."""

    x_N: NDArray[np.float32]
    cells_N: NDArray[np.uint8]
    turned_N: NDArray[np.bool_]
    sizes: Sequence[int]
    parameters: int


@dataclass(frozen=True)
class Tables:
    """`contexts`: of each cell. `levels`: decoded magnitudes in steps, the first ones; beyond them, q itself."""

    contexts: NDArray[np.uint8]
    levels: NDArray[np.float32]
    model: Model

    def sizes(self) -> tuple[int, int, int, int]:
        """Contexts, symbols, raw bits, levels."""
        contexts, symbols = self.model.frequencies_CA.shape
        return contexts, symbols, self.model.shift, len(self.levels)


def steps(sample: Sample, bits: float, threshold: float) -> Floats:
    """Each slice's step, in its scale: the finest that take at most about `bits` per parameter."""
    ladder = _Ladder(sample, threshold)
    fineness = math.log2(bits / 4 + 1e-4)
    for _ in range(2):  # contexts depend on the step, and the step that the rate allows on the contexts
        x_N = sample.x_N / np.repeat(ladder.steps(fineness), sample.sizes)
        contexts_N = _merge(_histogram(x_N, sample.cells_N, sample, threshold), _weight(sample))[sample.cells_N]
        cost = partial(_rate, ladder, sample, contexts_N, threshold)
        fineness = _solve(cost, bits, fineness)
    return ladder.steps(fineness)


def tables(sample: Sample, steps: Floats, threshold: float) -> tuple[Tables, float]:
    """What to code with at these steps, and the bits per parameter to expect, tables included."""
    x_N = sample.x_N / np.repeat(steps, sample.sizes)
    contexts = _merge(_histogram(x_N, sample.cells_N, sample, threshold), _weight(sample))
    counts = _histogram(x_N, contexts[sample.cells_N], sample, threshold)
    half, shift = _alphabet(counts)
    model = Model(normalise(_widened(_symbols(counts, half, shift))), shift)
    bits = _cost(counts, _weight(sample)) / max(len(x_N), 1)
    return Tables(contexts, _levels(np.abs(x_N), threshold), model), bits


def threshold(bits: float) -> float:
    """Where the first level begins, in steps: half way at high rates, later where zeros are much the cheapest."""
    return 0.5 + 0.3 * float(2.0**-bits)


def rough_step(bits: float) -> float:
    """About the step that a Gaussian needs for the rate."""
    return float(min(4.0, 4.0 * 2.0**-bits))


def spread(sizes: Sequence[int], wanted: int, least: int) -> list[Counts]:
    """Which elements of each slice to look at: evenly spread, `wanted` of all by size, `least` of each if there are."""
    total = max(sum(sizes), 1)
    counts = [min(size, max(least, wanted * size // total)) for size in sizes]
    return [np.arange(count) * size // max(count, 1) for size, count in zip(sizes, counts, strict=True)]


def _weight(sample: Sample) -> float:
    """Parameters that one value of the sample stands for."""
    return max(sample.parameters, 1) / max(len(sample.x_N), 1)


class _Ladder:
    """Steps by fineness f: while f < −1, every slice keeps a share 2^f of its values, its largest; from then on, steps
    are halved as f grows by one."""

    def __init__(self, sample: Sample, threshold: float) -> None:
        ends = np.cumsum([0, *sample.sizes])
        cut = [np.abs(sample.x_N[start:end]) for start, end in pairwise(ends)]
        self._sorted = [np.sort(magnitudes)[::-1] for magnitudes in cut]
        self._threshold = threshold

    def steps(self, fineness: float) -> Floats:
        share = 2.0 ** min(fineness, -1.0)
        limits = [m[min(int(share * len(m)), len(m) - 1)] if len(m) else 1.0 for m in self._sorted]
        scales = np.array([limit or 1.0 for limit in limits], np.float64)  # mostly zeros: its root mean square will do
        # Just below the limit, even if the step is rounded: where many values are as large as it, all of them are kept.
        found: Floats = scales * ((1 - 2.0**-8) * 2.0 ** -max(fineness + 1.0, 0.0) / self._threshold)
        return found


def _rate(ladder: _Ladder, sample: Sample, contexts_N: NDArray[np.uint8], threshold: float, fineness: float) -> float:
    """Bits per parameter."""
    x_N = sample.x_N / np.repeat(ladder.steps(fineness), sample.sizes)
    counts = _histogram(x_N, contexts_N, sample, threshold)
    return _cost(counts, _weight(sample)) / max(len(x_N), 1)


def _solve(rate: Callable[[float], float], bits: float, guess: float) -> float:
    """Fineness for the rate, never above it. By Newton's steps: below one bit the rate's logarithm grows by about one
    with fineness, later the rate itself does. By halving where they leave the bracket."""
    low, high = -14.0, 12.0  # next to no bits, and far too many
    for _ in range(14):
        found = rate(guess)
        low, high = (guess, high) if found <= bits else (low, guess)
        if CLOSE * bits <= found <= bits or high - low < 1e-3:
            break
        guess += math.log2((1 + CLOSE) / 2 * bits / max(found, 1e-6)) * max(1.0, math.log(2) * found) if bits else low
        if not low < guess < high:
            guess = (low + high) / 2
    return low


def _histogram(x_N: Floats, contexts_N: NDArray[np.uint8], sample: Sample, threshold: float) -> Counts:
    """[context, value + MIDDLE] of x in steps; the first and the last bin hold all that is beyond."""
    counts = np.zeros((int(contexts_N.max(initial=0)) + 1, 2 * MIDDLE), np.int64)
    kernels.count(x_N, contexts_N, sample.turned_N, 1 - threshold, counts)
    return counts


def _alphabet(counts: Counts) -> tuple[int, int]:
    """Symbols on either side of zero, and raw low bits."""
    tail = counts.sum(0)
    reach, shift = int(np.abs(np.nonzero(tail)[0] - MIDDLE).max(initial=1)), 0
    reach = min(reach, MIDDLE - 64)
    while reach >> shift > MAX_HALF:
        shift += 1
    half = (reach >> shift) + 1
    symbols = _symbols(tail[None], half, shift)[0]
    sides = symbols[half + 1 : -1] + symbols[:half][::-1]
    beyond = sides[::-1].cumsum()[::-1]
    return max(1, int((beyond * RARE > tail.sum()).sum())), shift


def _symbols(counts: Counts, half: int, shift: int) -> Floats:
    """[context, symbol]: −half … half, of values without their `shift` low bits, and the escape."""
    inner = counts[:, MIDDLE - (half << shift) : MIDDLE + ((half + 1) << shift)]
    symbols = inner.reshape(len(counts), 2 * half + 1, 1 << shift).sum(2)
    return np.column_stack([symbols, counts.sum(1) - symbols.sum(1)]).astype(np.float64)


def _cost(counts: Counts, weight: float) -> float:
    """Bits of the sample, with its part of the tables."""
    half, shift = _alphabet(counts)
    symbols = _symbols(counts, half, shift)
    raw = 16.0 * symbols[:, -1].sum() + shift * symbols[:, :-1].sum()
    return float(_entropies(symbols).sum() + raw + TABLE_BITS * np.count_nonzero(symbols) / weight)


def _entropies(counts_CA: Floats) -> Floats:
    """Bits of each context."""
    share = counts_CA / np.maximum(counts_CA.sum(1, keepdims=True), 1)
    return np.asarray(-(counts_CA * np.log2(np.where(share > 0, share, 1))).sum(1))


def _merge(counts: Counts, weight: float) -> NDArray[np.uint8]:
    """A context for each cell: those next to each other, by their mean magnitude, are joined while that saves bits."""
    half, shift = _alphabet(counts)
    symbols = _symbols(counts, half, shift)
    filled = np.nonzero(symbols.sum(1))[0]
    magnitude = symbols[filled] @ np.abs(np.arange(2 * half + 2.0) - half) / symbols[filled].sum(1)
    groups = [[cell] for cell in filled[np.argsort(magnitude, kind="stable")].tolist()]
    sums = [symbols[cells[0]] for cells in groups]

    def size(one: Floats) -> float:
        return float(_entropies(one[None])[0]) * weight + TABLE_BITS * np.count_nonzero(one)

    sizes = [size(one) for one in sums]
    gains = [sizes[i] + sizes[i + 1] - size(sums[i] + sums[i + 1]) for i in range(len(sums) - 1)]
    while gains and (max(gains) > 0 or len(groups) > MAX_CONTEXTS):
        at = int(np.argmax(gains))
        groups[at] += groups.pop(at + 1)
        sums[at] = sums[at] + sums.pop(at + 1)
        sizes[at : at + 2] = [size(sums[at])]
        gains.pop(at)
        for i in (at - 1, at):
            if 0 <= i < len(gains):
                gains[i] = sizes[i] + sizes[i + 1] - size(sums[i] + sums[i + 1])
    contexts = np.full(CELLS, len(groups) // 2, np.uint8)  # a cell that the sample lacks is taken for an average one
    for number, cells in enumerate(groups):
        contexts[cells] = number
    return contexts


def _widened(counts_CA: Floats) -> Floats:
    """The symbols next to those that a context has shown can come, too, at a low price."""
    seen = counts_CA[:, :-1] > 0
    next_to = np.zeros_like(seen)
    next_to[:, 1:] |= seen[:, :-1]
    next_to[:, :-1] |= seen[:, 1:]
    widened = counts_CA.copy()
    widened[:, :-1] += 1e-3 * (next_to & ~seen)
    return widened


def _levels(magnitudes: Floats, threshold: float) -> NDArray[np.float32]:
    q = np.minimum(magnitudes + 1 - threshold, MAX_LEVELS).astype(np.int64)
    counts, sums = np.bincount(q, minlength=2), np.bincount(q, weights=magnitudes, minlength=2)
    few = np.nonzero(counts[1:MAX_LEVELS] < FEW)[0]
    known = int(few[0]) + 1 if len(few) else min(len(counts), MAX_LEVELS)
    levels = sums[:known] / np.maximum(counts[:known], 1)
    levels[0] = 0.0
    return levels.astype(np.float32)
